//! Providers, as they sign, and a route that receives from them.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::routing::MethodRouter;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ed25519_dalek::{Signer, SigningKey};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tower_idempotency::webhook::{Scheme, WebhookLayer};

use crate::site::{Sent, Site};

pub const STANDARD_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub const STRIPE_SECRET: &str = "whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH";
pub const GITHUB_SECRET: &str = "It's a Secret to Everybody";
/// Of the first test of RFC 8032, section 7.1.
pub const PUBLIC_KEY: &str = "whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
const PRIVATE_KEY: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";

pub const SIGNED: [Provider; 3] = [Provider::Standard, Provider::Asymmetric, Provider::Stripe];
pub const ALL: [Provider; 4] = [SIGNED[0], SIGNED[1], SIGNED[2], Provider::GitHub];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Standard,
    Asymmetric,
    Stripe,
    GitHub,
}

impl Provider {
    /// The scheme without a secret.
    pub fn scheme(self) -> Scheme {
        match self {
            Self::Standard | Self::Asymmetric => Scheme::standard_webhooks("bank"),
            Self::Stripe => Scheme::stripe("stripe"),
            Self::GitHub => Scheme::github("github"),
        }
    }

    /// The scheme with the secret that [`delivery`](Self::delivery) signs with.
    pub fn keyed(self) -> Scheme {
        let scheme = self.scheme();
        match self {
            Self::Standard => scheme.with_secret(STANDARD_SECRET),
            Self::Asymmetric => scheme.with_public_key(PUBLIC_KEY),
            Self::Stripe => scheme.with_secret(STRIPE_SECRET),
            Self::GitHub => scheme.with_secret(GITHUB_SECRET),
        }
        .unwrap()
    }

    /// The scheme with a secret that is not the sender's.
    pub fn keyed_wrongly(self) -> Scheme {
        let other = STANDARD.encode([7; 32]);
        match self {
            // Another point of the curve: the second test of RFC 8032.
            Self::Asymmetric => {
                let other = "whpk_PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=";
                self.scheme().with_public_key(other)
            }
            _ => self.scheme().with_secret(&format!("whsec_{other}")),
        }
        .unwrap()
    }

    pub fn delivery(self) -> Delivery {
        Delivery {
            provider: self,
            id: "evt_1".into(),
            time: now(),
            body: r#"{"id":"evt_1","object":"event","amount":500}"#.into(),
        }
    }

    pub fn signature_header(self) -> &'static str {
        match self {
            Self::Standard | Self::Asymmetric => "webhook-signature",
            Self::Stripe => "stripe-signature",
            Self::GitHub => "x-hub-signature-256",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Delivery {
    provider: Provider,
    /// In the header, where it is there.
    pub id: String,
    pub time: u64,
    pub body: Bytes,
}

impl Delivery {
    /// Another time, in seconds from now.
    pub fn at(mut self, seconds: i64) -> Self {
        self.time = self.time.checked_add_signed(seconds).unwrap();
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub fn id(mut self, id: &str) -> Self {
        self.id = id.into();
        self
    }

    /// One signature, as it stands in a list of them.
    pub fn signature(&self) -> String {
        let Self { id, time, body, .. } = self;
        let head = match self.provider {
            Provider::Standard | Provider::Asymmetric => format!("{id}.{time}."),
            Provider::Stripe => format!("{time}."),
            Provider::GitHub => String::new(),
        };
        let content = [head.as_bytes(), body].concat();
        match self.provider {
            Provider::Standard => {
                let secret = STANDARD.decode(&STANDARD_SECRET[6..]).unwrap();
                format!("v1,{}", STANDARD.encode(hmac(&secret, &content)))
            }
            Provider::Asymmetric => {
                let secret = hex::decode(PRIVATE_KEY).unwrap().try_into().unwrap();
                let signature = SigningKey::from_bytes(&secret).sign(&content);
                format!("v1a,{}", STANDARD.encode(signature.to_bytes()))
            }
            Provider::Stripe => {
                let mac = hmac(STRIPE_SECRET.as_bytes(), &content);
                format!("v1={}", hex::encode(mac))
            }
            Provider::GitHub => {
                let mac = hmac(GITHUB_SECRET.as_bytes(), &content);
                format!("sha256={}", hex::encode(mac))
            }
        }
    }

    /// The header with this list of signatures.
    pub fn header(&self, signatures: &str) -> String {
        match self.provider {
            Provider::Stripe => format!("t={},{signatures}", self.time),
            _ => signatures.to_owned(),
        }
    }

    pub fn sent(&self) -> Sent {
        self.sent_with(&self.header(&self.signature()))
    }

    pub fn sent_with(&self, signature: &str) -> Sent {
        self.unsigned()
            .header(self.provider.signature_header(), signature)
    }

    pub fn unsigned(&self) -> Sent {
        let sent = Sent::post("/hooks").body(self.body.clone());
        match self.provider {
            Provider::Standard | Provider::Asymmetric => sent
                .header("webhook-id", &self.id)
                .header("webhook-timestamp", &self.time.to_string()),
            Provider::Stripe => sent,
            Provider::GitHub => sent.header("x-github-delivery", &self.id),
        }
    }
}

pub fn hmac(secret: &[u8], content: &[u8]) -> Vec<u8> {
    let mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
    mac.chain_update(content).finalize().into_bytes().to_vec()
}

pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// `POST /hooks` behind a layer of the scheme.
pub async fn site(scheme: Scheme, handler: MethodRouter) -> Site {
    site_of(WebhookLayer::new(scheme).unwrap(), handler).await
}

pub async fn site_of(layer: WebhookLayer, handler: MethodRouter) -> Site {
    Site::start(Router::new().route("/hooks", handler.layer(layer))).await
}
