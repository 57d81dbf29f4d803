use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName};

use crate::error::ConfigError;
use crate::layer::longer_than_zero;
use crate::rejection::{Code, Rejection};
use crate::webhook::WebhookEvent;
use crate::webhook::key::{Key, made_any};
use crate::webhook::signature::{self, Fault, MAX_SIGNATURES, Signature};

const MAX_KEYS: usize = 4;
const MAX_HEADER: usize = 4096;
const MAX_NAME: usize = 255;

/// How a provider signs its webhooks, and with which secrets.
///
/// | scheme | headers | what is signed | event id |
/// |---|---|---|---|
/// | [`standard_webhooks`](Self::standard_webhooks) | `webhook-signature`: `v1,<base64>` (HMAC-SHA256) or `v1a,<base64>` (ed25519), separated by spaces | id, time, body | `webhook-id` |
/// | [`stripe`](Self::stripe) | `Stripe-Signature`: `t=<seconds>,v1=<hex>`; several `v1`, and `v0` is ignored | time, body | member `id` of the JSON body |
/// | [`github`](Self::github) | `X-Hub-Signature-256`: `sha256=<hex>` | body | `X-GitHub-Delivery` |
///
/// Bounds: at most 4 secrets and 8 signatures, and one line of at most 4,096 bytes for each header;
/// ids are 1 to 255 visible characters of ASCII. A request beyond them is refused.
///
/// Secrets are in no log, no error and no `Debug`.
///
/// ```
/// use tower_idempotency::webhook::Scheme;
///
/// // While a secret is rotated, both are given.
/// let scheme = Scheme::standard_webhooks("bank")
///     .with_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?
///     .with_secret("whsec_TlwTLWvKlvJv4WkOdWNPHqrzUEhSk4mK")?;
/// assert!(!format!("{scheme:?}").contains("MfKQ9r8G"));
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct Scheme {
    kind: Kind,
    source: Arc<str>,
    keys: Vec<Key>,
    tolerance: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    StandardWebhooks,
    Stripe,
    GitHub,
}

/// What the head of a request says; none of it is believed yet.
#[derive(Debug)]
pub(crate) struct Delivery {
    signatures: Vec<Signature>,
    /// What is signed in front of the body.
    signed_head: Vec<u8>,
    /// Seconds since 1970.
    timestamp: Option<u64>,
    /// `None` where the body has it.
    id: Option<String>,
}

impl Scheme {
    /// [Standard Webhooks](https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md),
    /// which many providers follow. `source` is your name for the sender, 1 to 255 visible
    /// characters of ASCII: events of two sources are never the same.
    #[must_use]
    pub fn standard_webhooks(source: &str) -> Self {
        Self::new(Kind::StandardWebhooks, source)
    }

    /// [Stripe](https://docs.stripe.com/webhooks#verify-manually). `source` as in
    /// [`standard_webhooks`](Self::standard_webhooks).
    #[must_use]
    pub fn stripe(source: &str) -> Self {
        Self::new(Kind::Stripe, source)
    }

    /// [GitHub](https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries).
    /// `source` as in [`standard_webhooks`](Self::standard_webhooks).
    ///
    /// GitHub signs the body alone, neither a time nor the id: whoever gets hold of a delivery can
    /// send its body again under another id, whenever they like. Where that could do harm, let the
    /// handler ask GitHub for the state of what the body names.
    #[must_use]
    pub fn github(source: &str) -> Self {
        Self::new(Kind::GitHub, source)
    }

    fn new(kind: Kind, source: &str) -> Self {
        Self {
            kind,
            source: source.into(),
            keys: Vec::new(),
            tolerance: Duration::from_secs(300),
        }
    }

    /// One more secret that may have made a signature; any of them will do. Standard Webhooks:
    /// `whsec_` and base64. Stripe: `whsec_..` as its dashboard shows it. GitHub: the text that was
    /// typed in.
    ///
    /// # Errors
    ///
    /// `secret` when it has another form, or is the fifth.
    ///
    /// ```
    /// use tower_idempotency::webhook::Scheme;
    ///
    /// let error = Scheme::stripe("stripe").with_secret("sk_live_1").unwrap_err();
    /// assert_eq!(error.to_string(), "`secret` must be `whsec_` and visible characters of ASCII");
    /// ```
    pub fn with_secret(self, secret: &str) -> Result<Self, ConfigError> {
        let key = match self.kind {
            Kind::StandardWebhooks => Key::standard(secret),
            Kind::Stripe => Key::stripe(secret),
            Kind::GitHub => Key::github(secret),
        };
        self.with_key("secret", key?)
    }

    /// One more public key that may belong to a signature `v1a` of Standard Webhooks: `whpk_` and
    /// base64.
    ///
    /// Unlike a secret, each key hashes the body once for every signature `v1a`, also of a stranger:
    /// lower [`with_request_limit`](crate::webhook::WebhookLayer::with_request_limit) to what the
    /// provider sends. The specification expects less than 20 kB.
    ///
    /// # Errors
    ///
    /// `public_key` when it has another form, is the fifth, or the scheme has none.
    ///
    /// ```
    /// use tower_idempotency::webhook::Scheme;
    ///
    /// let key = "whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    /// let scheme = Scheme::standard_webhooks("bank").with_public_key(key)?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_public_key(self, key: &str) -> Result<Self, ConfigError> {
        if self.kind != Kind::StandardWebhooks {
            let reason = "is not used by this scheme, which has secrets";
            return Err(ConfigError::new("public_key", reason));
        }
        self.with_key("public_key", Key::public(key)?)
    }

    fn with_key(mut self, field: &'static str, key: Key) -> Result<Self, ConfigError> {
        if self.keys.len() == MAX_KEYS {
            let reason =
                format!("must not be the fifth: every signature is compared with all {MAX_KEYS}");
            return Err(ConfigError::new(field, reason));
        }
        self.keys.push(key);
        Ok(self)
    }

    /// How far the time of signing may be from this host's clock, before and after, in whole
    /// seconds. Default: 5 min, as in the providers' own libraries; clocks differ by less, and a
    /// provider signs every try anew. Nothing for GitHub, which signs no time.
    ///
    /// # Errors
    ///
    /// `tolerance` under a second, or over a day.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use tower_idempotency::webhook::Scheme;
    ///
    /// let scheme = Scheme::stripe("stripe").with_tolerance(Duration::from_secs(60))?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_tolerance(mut self, tolerance: Duration) -> Result<Self, ConfigError> {
        let tolerance = longer_than_zero("tolerance", tolerance)?;
        if tolerance.as_secs() == 0 {
            return Err(ConfigError::new("tolerance", "must be at least a second"));
        }
        self.tolerance = tolerance;
        Ok(self)
    }

    /// Checks a delivery that came by another way than a [`WebhookLayer`](crate::webhook::WebhookLayer):
    /// its headers, and its body byte for byte. Reads no clock.
    ///
    /// # Errors
    ///
    /// As the layer answers, in this order: what the head lacks, the signature, the time, the id.
    ///
    /// ```
    /// use std::time::{Duration, UNIX_EPOCH};
    /// use axum::http::HeaderMap;
    /// use tower_idempotency::{Code, webhook::Scheme};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let scheme = Scheme::standard_webhooks("bank")
    ///     .with_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
    /// let mut headers = HeaderMap::new();
    /// headers.insert("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek".parse()?);
    /// headers.insert("webhook-timestamp", "1614265330".parse()?);
    /// let signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    /// headers.insert("webhook-signature", signature.parse()?);
    ///
    /// let now = UNIX_EPOCH + Duration::from_secs(1_614_265_330);
    /// let event = scheme.verify(&headers, br#"{"test": 2432232314}"#, now).unwrap();
    /// assert_eq!(event.id(), "msg_p5jXN8AQM9LWM0D4loKWxJek");
    ///
    /// let late = now + Duration::from_secs(301);
    /// let refused = scheme.verify(&headers, br#"{"test": 2432232314}"#, late).unwrap_err();
    /// assert_eq!(refused.code(), Code::TimestampTooOld);
    /// # Ok(())
    /// # }
    /// ```
    pub fn verify(
        &self,
        headers: &HeaderMap,
        body: &[u8],
        now: SystemTime,
    ) -> Result<WebhookEvent, Rejection> {
        self.accept(self.read(headers)?, body, now)
    }

    /// Checks the settings together.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if !is_name(&self.source) {
            let reason = format!("must be 1 to {MAX_NAME} visible characters of ASCII");
            return Err(ConfigError::new("source", reason));
        }
        if self.keys.is_empty() {
            return Err(ConfigError::new(
                "secret",
                "must be given: a scheme without one accepts nothing",
            ));
        }
        Ok(())
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// All that can be said before the body is read.
    pub(crate) fn read(&self, headers: &HeaderMap) -> Result<Delivery, Rejection> {
        match self.kind {
            Kind::StandardWebhooks => read_standard(headers),
            Kind::Stripe => read_stripe(headers),
            Kind::GitHub => read_github(headers),
        }
    }

    /// The signature goes first: what is said of the time is said of an authentic delivery.
    pub(crate) fn accept(
        &self,
        delivery: Delivery,
        body: &[u8],
        now: SystemTime,
    ) -> Result<WebhookEvent, Rejection> {
        let Delivery {
            signatures,
            signed_head,
            timestamp,
            id,
        } = delivery;
        if !made_any(&self.keys, &signatures, &signed_head, body) {
            return Err(Rejection::new(Code::SignatureInvalid));
        }
        if let Some(timestamp) = timestamp {
            self.check_time(timestamp, now)?;
        }
        let id = match id {
            Some(id) => id,
            None => id_in(body)?,
        };
        Ok(WebhookEvent::new(self.source.clone(), id, timestamp))
    }

    fn check_time(&self, timestamp: u64, now: SystemTime) -> Result<(), Rejection> {
        // Before 1970 the clock is wrong, and every signature from the future.
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let tolerance = self.tolerance.as_secs();
        let (code, off) = match timestamp.checked_sub(now) {
            Some(ahead) => (Code::TimestampInFuture, ahead),
            None => (Code::TimestampTooOld, now - timestamp),
        };
        if off <= tolerance {
            return Ok(());
        }
        let detail = format!("{off} s from this host's clock; {tolerance} s are allowed");
        Err(Rejection::new(code).with_detail(detail))
    }
}

impl fmt::Debug for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheme")
            .field("kind", &self.kind)
            .field("source", &self.source)
            .field("keys", &self.keys)
            .field("tolerance", &self.tolerance)
            .finish()
    }
}

fn read_standard(headers: &HeaderMap) -> Result<Delivery, Rejection> {
    let signatures = signature_line(headers, "webhook-signature")?;
    let signatures = signature::standard(signatures).map_err(faulty)?;
    let id = id_line(headers, "webhook-id")?;
    if id.contains('.') {
        // The full stop ends what is signed as the id: another one would move text from one part
        // of the content into the next.
        return Err(rejected(
            Code::EventIdMissing,
            "webhook-id must not have a full stop",
        ));
    }
    let time = line(headers, "webhook-timestamp", Code::TimestampMissing)?;
    let timestamp = signature::timestamp(time).ok_or_else(no_time)?;
    Ok(Delivery {
        signatures,
        signed_head: [id.as_bytes(), b".", time, b"."].concat(),
        timestamp: Some(timestamp),
        id: Some(id),
    })
}

fn read_stripe(headers: &HeaderMap) -> Result<Delivery, Rejection> {
    let header = signature_line(headers, "stripe-signature")?;
    let (time, signatures) = signature::stripe(header).map_err(faulty)?;
    let timestamp = signature::timestamp(time).ok_or_else(no_time)?;
    Ok(Delivery {
        signatures,
        signed_head: [time, b"."].concat(),
        timestamp: Some(timestamp),
        id: None,
    })
}

fn read_github(headers: &HeaderMap) -> Result<Delivery, Rejection> {
    let header = signature_line(headers, "x-hub-signature-256")?;
    Ok(Delivery {
        signatures: signature::github(header).map_err(faulty)?,
        signed_head: Vec::new(),
        timestamp: None,
        id: Some(id_line(headers, "x-github-delivery")?),
    })
}

/// Absent is another fault than malformed.
fn signature_line<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a [u8], Rejection> {
    let code = match headers.contains_key(name) {
        true => Code::SignatureInvalid,
        false => Code::SignatureMissing,
    };
    line(headers, name, code)
}

fn id_line(headers: &HeaderMap, name: &'static str) -> Result<String, Rejection> {
    let id = line(headers, name, Code::EventIdMissing)?;
    let id = std::str::from_utf8(id).ok().filter(|id| is_name(id));
    id.map(str::to_owned).ok_or_else(no_id)
}

/// The one line of a header.
fn line<'a>(headers: &'a HeaderMap, name: &'static str, code: Code) -> Result<&'a [u8], Rejection> {
    let mut lines = headers.get_all(HeaderName::from_static(name)).iter();
    match (lines.next(), lines.next()) {
        (Some(line), None) if line.len() <= MAX_HEADER => Ok(line.as_bytes()),
        (Some(_), None) => Err(rejected(
            code,
            format!("{name} has more than {MAX_HEADER} bytes"),
        )),
        (Some(_), Some(_)) => Err(rejected(code, format!("{name} must be sent on one line"))),
        (None, _) => Err(rejected(code, format!("{name} is missing"))),
    }
}

/// The member `id` of a JSON object.
fn id_in(body: &[u8]) -> Result<String, Rejection> {
    let document: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let id = document
        .as_ref()
        .and_then(|document| document.get("id")?.as_str());
    id.filter(|id| is_name(id))
        .map(str::to_owned)
        .ok_or_else(no_id)
}

fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn faulty(fault: Fault) -> Rejection {
    match fault {
        Fault::Missing => rejected(
            Code::SignatureMissing,
            "none is of a version that is known here",
        ),
        Fault::TooMany => {
            let detail = format!("more than {MAX_SIGNATURES} signatures");
            rejected(Code::SignatureInvalid, detail)
        }
        Fault::Timestamp => no_time(),
    }
}

fn no_time() -> Rejection {
    let detail = "the time must be sent once, as seconds since 1970";
    rejected(Code::TimestampMissing, detail)
}

fn no_id() -> Rejection {
    let detail = format!("the id must be 1 to {MAX_NAME} visible characters of ASCII");
    rejected(Code::EventIdMissing, detail)
}

fn rejected(code: Code, detail: impl Into<String>) -> Rejection {
    Rejection::new(code).with_detail(detail)
}
