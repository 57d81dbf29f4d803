//! What a sender's signatures are checked with.

use std::fmt;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use ed25519_dalek::{Signature as Ed25519Signature, VerifyingKey};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::error::ConfigError;
use crate::webhook::signature::Signature;

/// Dashboards show secrets with their padding, and without.
const ANY_PADDING: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Clone)]
pub(crate) enum Key {
    Hmac(Hmac<Sha256>),
    Ed25519(VerifyingKey),
}

impl Key {
    /// Standard Webhooks: `whsec_` and base64. The specification asks for 24 bytes or more.
    pub(crate) fn standard(secret: &str) -> Result<Self, ConfigError> {
        let encoded = secret.strip_prefix("whsec_");
        let bytes = encoded.and_then(|text| ANY_PADDING.decode(text).ok());
        match bytes {
            Some(bytes) if bytes.len() >= 24 => Self::hmac(&bytes),
            _ => Err(wrong_secret(
                "must be `whsec_` and the base64 of at least 24 bytes",
            )),
        }
    }

    /// Stripe: `whsec_` and more; the text itself is the key.
    pub(crate) fn stripe(secret: &str) -> Result<Self, ConfigError> {
        match secret.strip_prefix("whsec_") {
            Some(rest) if !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Self::hmac(secret.as_bytes())
            }
            _ => Err(wrong_secret(
                "must be `whsec_` and visible characters of ASCII",
            )),
        }
    }

    /// GitHub: any text that a person chose. The line end of a file is not part of it.
    pub(crate) fn github(secret: &str) -> Result<Self, ConfigError> {
        if secret.is_empty() || secret.trim() != secret {
            return Err(wrong_secret(
                "must be text that neither begins nor ends with white space",
            ));
        }
        Self::hmac(secret.as_bytes())
    }

    /// Standard Webhooks: `whpk_` and the base64 of an ed25519 public key.
    pub(crate) fn public(key: &str) -> Result<Self, ConfigError> {
        let encoded = key.strip_prefix("whpk_");
        let bytes = encoded.and_then(|text| ANY_PADDING.decode(text).ok());
        let bytes: Option<[u8; 32]> = bytes.and_then(|bytes| bytes.try_into().ok());
        let key = bytes.and_then(|bytes| VerifyingKey::from_bytes(&bytes).ok());
        // Under a weak key one signature fits many messages.
        let key = key.filter(|key| !key.is_weak()).ok_or_else(|| {
            let reason = "must be `whpk_` and the base64 of an ed25519 public key (32 bytes)";
            ConfigError::new("public_key", reason)
        })?;
        Ok(Self::Ed25519(key))
    }

    fn hmac(secret: &[u8]) -> Result<Self, ConfigError> {
        let mac = Hmac::new_from_slice(secret);
        mac.map(Self::Hmac)
            .map_err(|_| wrong_secret("has a length that HMAC cannot take"))
    }

    /// Whether one of the signatures is this key's, of `head` followed by `body`. Every one is
    /// compared, in constant time.
    fn made_any(&self, signatures: &[Signature], head: &[u8], body: &[u8]) -> bool {
        match self {
            Self::Hmac(mac) => {
                let mac = mac.clone().chain_update(head).chain_update(body);
                any(signatures, |signature| match signature {
                    Signature::Hmac(tag) => mac.clone().verify_slice(tag).is_ok(),
                    Signature::Ed25519(_) => false,
                })
            }
            Self::Ed25519(key) => {
                let is_ed25519 = |signature: &_| matches!(signature, Signature::Ed25519(_));
                if !signatures.iter().any(is_ed25519) {
                    return false;
                }
                let message = [head, body].concat();
                any(signatures, |signature| match signature {
                    Signature::Hmac(_) => false,
                    Signature::Ed25519(bytes) => key
                        .verify_strict(&message, &Ed25519Signature::from_bytes(bytes))
                        .is_ok(),
                })
            }
        }
    }
}

/// Whether one of the signatures is one of the keys'. Every pair is compared, so that the time
/// taken does not say which.
pub(crate) fn made_any(keys: &[Key], signatures: &[Signature], head: &[u8], body: &[u8]) -> bool {
    any(keys, |key| key.made_any(signatures, head, body))
}

/// As `Iterator::any`, but to the end.
fn any<T>(items: &[T], holds: impl Fn(&T) -> bool) -> bool {
    items.iter().fold(false, |found, item| found | holds(item))
}

fn wrong_secret(reason: &'static str) -> ConfigError {
    ConfigError::new("secret", reason)
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hmac(_) => "Hmac(..)",
            Self::Ed25519(_) => "Ed25519(..)",
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn assert_refused(parse: fn(&str) -> Result<Key, ConfigError>, secrets: &[&str]) {
        for secret in secrets {
            let error = parse(secret).unwrap_err().to_string();
            assert!(error.contains("must be"), "{error}");
            assert!(!error.contains("hidden"), "{error}");
        }
    }

    #[test]
    fn a_malformed_secret_is_refused_without_being_shown() {
        let unprefixed = "hiddenKQ9r8GKYqrTwjUPD8ILPZIo2La";
        let short = "whsec_hiddenaaaaaaaaaaaaaaaaaaaaaa";
        let not_base64 = "whsec_hidden!aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
        assert_refused(
            Key::standard,
            &["", "whsec_", unprefixed, short, not_base64],
        );
        assert_refused(
            Key::stripe,
            &["", "whsec_", "sk_hidden", "whsec_hidden\n", "whsec_hid den"],
        );
        assert_refused(Key::github, &["", "hidden\n", " hidden"]);
        assert_refused(Key::public, &["", "whpk_", "whsec_hidden", "whpk_hiddenaa"]);
    }

    #[test]
    fn a_weak_public_key_is_refused() {
        // The neutral element: any signature with the same point fits.
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let text = format!("whpk_{}", ANY_PADDING.encode(neutral));
        assert_eq!(Key::public(&text).unwrap_err().field(), "public_key");
    }

    #[test]
    fn padding_of_a_secret_does_not_matter() {
        for secret in [
            "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==",
        ] {
            assert!(Key::standard(secret).is_ok(), "{secret}");
        }
    }
}
