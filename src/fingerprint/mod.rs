mod fingerprinter;

use crate::digest::Fields;

pub use fingerprinter::Fingerprinter;

/// Raised whenever the same request under the same settings would get another digest.
const VERSION: u16 = 1;

/// The digest of a request, as it is kept in the record.
///
/// Says whether two requests are the same operation sent twice, and nothing else about them.
///
/// ```
/// use tower_idempotency::Fingerprint;
///
/// let first = Fingerprint::of_bytes(b"orders.csv, 3 lines");
/// let retry = Fingerprint::of_bytes(b"orders.csv, 3 lines");
/// let other = Fingerprint::of_bytes(b"orders.csv, 4 lines");
/// assert!(retry.matches(&first) && !other.matches(&first));
/// assert_eq!(Fingerprint::from_bytes(&first.to_bytes()), Some(first));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    version: u16,
    config: u64,
    digest: [u8; 32],
    raw: [u8; 32],
}

impl Fingerprint {
    /// The fingerprint of a request to be sent again unchanged: for calls of a [`Store`](crate::Store) outside HTTP.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let raw = Fields::new("tower-idempotency fingerprint 1")
            .push(bytes)
            .finish();
        Self {
            version: VERSION,
            config: Fingerprinter::raw().config(),
            digest: raw,
            raw,
        }
    }

    /// Whether both were taken of the same request, as far as they can be compared: by the
    /// configured digest if it was made the same way, else by the raw one.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        if (self.version, self.config) == (other.version, other.config) {
            self.digest == other.digest
        } else {
            self.raw == other.raw
        }
    }

    /// The bytes a store keeps: version, settings, digest, and the raw digest where it differs.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(74);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.config.to_be_bytes());
        bytes.extend(self.digest);
        if self.raw != self.digest {
            bytes.extend(self.raw);
        }
        bytes
    }

    /// The fingerprint that [`to_bytes`](Self::to_bytes) wrote, or `None` for anything else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (config, rest) = rest.split_first_chunk()?;
        let (digest, rest) = rest.split_first_chunk()?;
        let raw = match rest {
            [] => *digest,
            rest => rest.try_into().ok()?,
        };
        Some(Self {
            version: u16::from_be_bytes(*version),
            config: u64::from_be_bytes(*config),
            digest: *digest,
            raw,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::fingerprinter::tests::{JSON, taken};
    use super::*;

    #[test]
    fn under_other_settings_the_raw_digest_decides() {
        let json = JSON;
        let before = taken(&Fingerprinter::raw(), "/", None, json, r#"{"a":1}"#);
        let same = taken(
            &Fingerprinter::canonical_json(),
            "/",
            None,
            json,
            r#"{"a":1}"#,
        );
        let other = taken(
            &Fingerprinter::canonical_json(),
            "/",
            None,
            json,
            r#"{"a":2}"#,
        );
        assert!(same.matches(&before));
        assert!(!other.matches(&before));
    }

    #[test]
    fn under_another_version_the_raw_digest_decides() {
        let taken = |body| taken(&Fingerprinter::canonical_json(), "/", None, JSON, body);
        let before = Fingerprint {
            version: VERSION + 1,
            digest: [0; 32],
            ..taken(r#"{"a":1}"#)
        };
        assert!(taken(r#"{"a":1}"#).matches(&before));
        assert!(!taken(r#"{"a":1.0}"#).matches(&before));
    }

    #[test]
    fn bytes_round_trip_and_cut_bytes_are_refused() {
        let json = JSON;
        for by in [Fingerprinter::raw(), Fingerprinter::canonical_json()] {
            let taken = taken(&by, "/", None, json, r#"{"a": 1}"#);
            let bytes = taken.to_bytes();
            assert_eq!(Fingerprint::from_bytes(&bytes), Some(taken));
            assert_eq!(Fingerprint::from_bytes(&bytes[..bytes.len() - 1]), None);
        }
    }
}
