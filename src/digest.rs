//! SHA-256 over length-prefixed fields: no two lists of fields share an encoding.

use sha2::{Digest as _, Sha256};

#[derive(Clone)]
pub(crate) struct Fields(Sha256);

impl Fields {
    /// `domain` keeps digests of different purposes apart.
    pub(crate) fn new(domain: &str) -> Self {
        let mut fields = Self(Sha256::new());
        fields.push(domain.as_bytes());
        fields
    }

    pub(crate) fn push(&mut self, field: &[u8]) -> &mut Self {
        self.0.update((field.len() as u64).to_be_bytes());
        self.0.update(field);
        self
    }

    /// Bytes of one last field, as they come.
    #[cfg(feature = "multipart")]
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(&self) -> [u8; 32] {
        self.0.clone().finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_never_run_into_each_other() {
        let split = |a: &str, b: &str| {
            Fields::new("test")
                .push(a.as_bytes())
                .push(b.as_bytes())
                .finish()
        };
        assert_ne!(split("ab", "c"), split("a", "bc"));
    }
}
