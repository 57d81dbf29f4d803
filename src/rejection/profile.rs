use axum_core::body::Body;
use http::header::{
    CONTENT_TYPE, HeaderName, HeaderValue, LINK, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};

use super::{Code, Original, Rejection};
use crate::error::ConfigError;

/// Where the default profile points a problem's `type`: the module [`problems`](crate::problems).
const PROBLEMS: &str =
    "https://docs.rs/tower-idempotency/latest/tower_idempotency/problems/index.html#";

const SHOULD_RETRY: HeaderName = HeaderName::from_static("stripe-should-retry");

/// The dialect that clients of a route expect: statuses and bodies of the layer's own answers, and
/// which spellings of a key are taken.
///
/// | | `Default` | `Ietf` | `Stripe` |
/// |---|---|---|---|
/// | key | quoted or bare | structured-field string | quoted or bare |
/// | malformed or missing key | 400 | 400 | 400 `invalid_request_error` |
/// | key used with another request | 409 | 422 | 400 `idempotency_error` |
/// | first request is running | 409 | 409 | 409 `idempotency_key_in_use` |
/// | body | problem+json | problem+json, and a `Link` to the docs | `{"error": {"type", "code", "message"}}` |
/// | whether to retry | `Retry-After` | `Retry-After` | `Retry-After`, `Stripe-Should-Retry` |
///
/// SDKs made for Stripe's API retry every 409 unless `Stripe-Should-Retry` says otherwise, and some
/// take an answer without an `error` member for a success.
///
/// ```
/// use tower_idempotency::{Policy, Profile};
///
/// let drafted = Policy::high().with_profile(Profile::ietf("https://docs.example.com/idempotency")?);
/// let stripe = Policy::high().with_profile(Profile::Stripe);
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Profile {
    /// What suits a client that was written for this API.
    #[default]
    Default,
    /// [draft-ietf-httpapi-idempotency-key-header-07](https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/07/).
    #[non_exhaustive]
    Ietf {
        /// `<url>; rel="describedby"`: where the service documents its keys (section 2.5).
        link: HeaderValue,
    },
    /// What SDKs made for [Stripe's API](https://docs.stripe.com/api/idempotent_requests) understand.
    Stripe,
}

impl Profile {
    /// The draft's dialect, with a link to where this service documents its keys.
    ///
    /// # Errors
    ///
    /// `profile` when the address is no URI reference.
    pub fn ietf(docs: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::new("profile", "must link to documentation by a valid URI");
        // Reads no further than the `#`, and lets pass what would end the link.
        docs.parse::<http::Uri>().map_err(|_| wrong())?;
        if !docs
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b))
        {
            return Err(wrong());
        }
        let link = format!("<{docs}>; rel=\"describedby\"");
        let link = HeaderValue::try_from(link).map_err(|_| wrong())?;
        Ok(Self::Ietf { link })
    }

    pub(super) fn status(&self, code: Code) -> StatusCode {
        match (self, code) {
            (Self::Ietf { .. }, Code::KeyReused) => StatusCode::UNPROCESSABLE_ENTITY,
            (Self::Stripe, Code::KeyReused) => StatusCode::BAD_REQUEST,
            _ => code.status(),
        }
    }
}

impl Rejection {
    /// The answer in the dialect of the route's profile.
    #[must_use]
    pub fn to_response(&self) -> Response<Body> {
        match &self.profile {
            Profile::Default => self.to_problem(PROBLEMS),
            Profile::Ietf { link } => {
                let mut response = self.to_problem(PROBLEMS);
                response.headers_mut().insert(LINK, link.clone());
                response
            }
            Profile::Stripe => self.to_stripe(),
        }
    }

    /// The answer as `application/problem+json`
    /// ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)), its `type` being `base` and the code.
    #[must_use]
    pub fn to_problem(&self, base: &str) -> Response<Body> {
        self.to_json("application/problem+json", &self.problem(base))
    }

    fn to_stripe(&self) -> Response<Body> {
        let mut response = self.to_json("application/json", &self.stripe_error());
        let should = if self.retry_after.is_some() {
            "true"
        } else {
            "false"
        };
        let headers = response.headers_mut();
        headers.insert(SHOULD_RETRY, HeaderValue::from_static(should));
        response
    }

    fn to_json(&self, kind: &'static str, document: &Value) -> Response<Body> {
        let mut response = Response::new(Body::from(document.to_string()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if self.status() == StatusCode::UNAUTHORIZED {
            // RFC 9110, section 15.5.2, asks for a challenge; there is no registered one.
            headers.insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Webhook-Signature"),
            );
        }
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, wait.as_secs().into());
        }
        if let Some(location) = self.original.as_ref().and_then(|o| o.location.clone()) {
            headers.insert(LOCATION, location);
        }
        response
    }

    fn problem(&self, base: &str) -> Value {
        let mut document = Map::new();
        document.insert("type".into(), format!("{base}{}", self.code).into());
        document.insert("title".into(), self.code.title().into());
        document.insert("status".into(), self.status().as_u16().into());
        document.insert("code".into(), self.code.as_str().into());
        if let Some(detail) = &self.detail {
            document.insert("detail".into(), detail.as_str().into());
        }
        if let Some(original) = &self.original {
            document.insert("original".into(), original.document());
        }
        Value::Object(document)
    }

    fn stripe_error(&self) -> Value {
        let (kind, code) = match self.code {
            Code::KeyReused => ("idempotency_error", self.code.as_str()),
            Code::RequestInProgress => ("idempotency_error", "idempotency_key_in_use"),
            _ if self.status().is_client_error() => ("invalid_request_error", self.code.as_str()),
            _ => ("api_error", self.code.as_str()),
        };
        let title = self.code.title();
        let message = match &self.detail {
            Some(detail) => format!("{title} It {detail}."),
            None => title.to_owned(),
        };
        let mut error = Map::new();
        error.insert("type".into(), kind.into());
        error.insert("code".into(), code.into());
        error.insert("message".into(), message.into());
        if let Some(original) = &self.original {
            error.insert("original".into(), original.document());
        }
        json!({ "error": error })
    }
}

impl Original {
    fn document(&self) -> Value {
        let references = self.references.as_slice().iter();
        json!({
            "status": self.status.as_u16(),
            "references": references
                .map(|(kind, id)| json!({"kind": kind, "id": id}))
                .collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn answer(profile: &Profile, rejection: Rejection) -> (Response<()>, Value) {
        let response = rejection.with_profile(profile).to_response();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let document = serde_json::from_slice(&bytes).unwrap();
        (Response::from_parts(parts, ()), document)
    }

    #[tokio::test]
    async fn every_code_has_its_whole_surface_in_the_ietf_profile() {
        let profile = Profile::ietf("https://docs.example.com/keys").unwrap();
        for code in Code::ALL {
            let (response, problem) = answer(&profile, Rejection::new(code)).await;
            let expected = match code {
                Code::KeyReused => 422,
                other => other.status().as_u16(),
            };
            assert_eq!(response.status(), expected, "{code}");
            assert_eq!(problem["status"], expected);
            assert_eq!(problem["code"], code.as_str());
            assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
            let link = "<https://docs.example.com/keys>; rel=\"describedby\"";
            assert_eq!(response.headers()[LINK], link);
        }
    }

    #[tokio::test]
    async fn every_code_has_its_whole_surface_in_the_stripe_profile() {
        for code in Code::ALL {
            let rejection = Rejection::new(code);
            let retry = rejection.retry_after().is_some();
            let (response, body) = answer(&Profile::Stripe, rejection).await;
            let error = &body["error"];
            let (status, kind, name) = match code {
                Code::KeyReused => (400, "idempotency_error", "key-reused"),
                Code::RequestInProgress => (409, "idempotency_error", "idempotency_key_in_use"),
                other if other.status().is_client_error() => (
                    other.status().as_u16(),
                    "invalid_request_error",
                    other.as_str(),
                ),
                other => (other.status().as_u16(), "api_error", other.as_str()),
            };
            assert_eq!(response.status(), status, "{code}");
            assert_eq!(
                (&error["type"], &error["code"]),
                (&kind.into(), &name.into())
            );
            assert!(!error["message"].as_str().unwrap().is_empty());
            let headers = response.headers();
            assert_eq!(
                headers["stripe-should-retry"],
                if retry { "true" } else { "false" }
            );
            assert_eq!(headers.contains_key(RETRY_AFTER), retry);
            assert_eq!(headers[CONTENT_TYPE], "application/json");
        }
    }

    #[tokio::test]
    async fn the_detail_of_a_malformed_key_reads_as_a_sentence() {
        let rejection = Rejection::new(Code::KeyInvalid).with_detail("must not be empty");
        let (_, body) = answer(&Profile::Stripe, rejection).await;
        let message = "The idempotency key is malformed. It must not be empty.";
        assert_eq!(body["error"]["message"], message);
    }

    #[test]
    fn a_link_that_is_no_uri_is_refused() {
        assert_eq!(Profile::ietf("not a uri").unwrap_err().field(), "profile");
        assert_eq!(Profile::ietf("").unwrap_err().field(), "profile");
        assert!(Profile::ietf("/docs/idempotency").is_ok());
        for wrong in ["/docs#a b", "/docs#a>; rel=\"x", "/docs?a=\"b\""] {
            assert!(Profile::ietf(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_link_to_a_section_of_a_page_keeps_its_fragment() {
        let Ok(Profile::Ietf { link }) = Profile::ietf("https://docs.example.com/api#keys") else {
            panic!("no profile");
        };
        let expected = "<https://docs.example.com/api#keys>; rel=\"describedby\"";
        assert_eq!(link, expected);
    }
}
