//! Providers' webhooks: signed, and each event handled once.
//!
//! A [`WebhookLayer`] checks the signature over the body as it came, and the time at which it was
//! signed, and leaves a [`WebhookEvent`] in the request. An [`IdempotencyLayer`](crate::IdempotencyLayer)
//! inside of it takes the sender as scope, the route as operation and the provider's id of the event
//! as key. So one handler sees an event once, however often it is delivered, and two handlers of one
//! event do not know of each other.
//!
//! ```
//! use std::time::Duration;
//!
//! use axum::{Router, body::Body, http::Request, routing::post};
//! use tower::ServiceExt;
//! use tower_idempotency::webhook::{Scheme, WebhookEvent, WebhookLayer};
//! use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let scheme = Scheme::github("github").with_secret("It's a Secret to Everybody")?;
//! let policy = Policy::medium()
//!     .with_required_key(true)
//!     // Longer than the provider goes on trying, and its staff after it.
//!     .with_ttl(Duration::from_secs(7 * 24 * 3600))
//!     .with_derived_key(WebhookEvent::derived_key())
//!     .with_fingerprint(WebhookEvent::fingerprint());
//! let idempotency = IdempotencyLayer::new(MemoryStore::new(), WebhookEvent::scope())
//!     .with_policy(policy)?;
//!
//! let app = Router::new().route(
//!     "/hooks/github",
//!     post(|event: WebhookEvent, body: String| async move { format!("{}: {body}", event.id()) })
//!         // From the outside in.
//!         .layer((WebhookLayer::new(scheme)?, idempotency)),
//! );
//!
//! let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
//! let deliver = |body: &'static str| {
//!     Request::post("/hooks/github")
//!         .header("x-github-delivery", "72d3162e-cc78-11e3-81ab-4c9367dc0958")
//!         .header("x-hub-signature-256", signature)
//!         .body(Body::from(body))
//! };
//! let first = app.clone().oneshot(deliver("Hello, World!")?).await?;
//! assert_eq!(first.status(), 200);
//! let again = app.clone().oneshot(deliver("Hello, World!")?).await?;
//! assert_eq!(again.headers()["idempotent-replayed"], "true");
//! let altered = app.oneshot(deliver("Hello, world!")?).await?;
//! assert_eq!(altered.status(), 401);
//! # Ok(())
//! # }
//! ```
//!
//! # Which policy
//!
//! A provider delivers an event until it gets a 2xx, so a failure must not become the stored answer:
//! [`Policy::medium`](crate::Policy::medium) frees the key after a 5xx or a panic, and runs an event
//! again whose attempt was lost. `high` and `critical` would answer every later delivery with the
//! first failure. That is *at least once* as soon as a handler fails in the middle: let its own
//! writes be harmless twice, by a unique column with the id of the event or an inbox of events that
//! is written in the handler's own transaction.
//!
//! On a [transactional](crate::IdempotencyLayer::transactional) route a failure rolls the handler's
//! writes back and frees the key under every policy: there the handler's own writes happen once.
//!
//! `with_required_key(true)` matters: where the `WebhookLayer` was forgotten or is inside, there is
//! no event, and the route answers 400 in place of letting anybody in.
//!
//! An event that comes too early is not a refusal to keep: answer it with
//! [`Outcome::Release`](crate::Outcome::Release), or a 409 is stored, and given to each later delivery.
//!
//! Answer with little, a 204 for example. An answer that is too large to keep is a 410 for the next
//! delivery, and 410 is how Standard Webhooks are told to stop for good.
//!
//! # Layer order
//!
//! The signature is over the body byte for byte. A layer that decompresses or rewrites bodies has to
//! be inside; if it is outside, every delivery is refused as `signature-invalid`. A layer that bounds
//! how many requests run at once belongs outside, since bodies are read before their sender is known.
//!
//! # Answers
//!
//! Like every answer of this crate, they are problems with a [`code`](crate::problems).
//!
//! | status | code |
//! |---|---|
//! | 401 | `signature-missing`, `signature-invalid` |
//! | 400 | `timestamp-missing`, `timestamp-too-old`, `timestamp-in-future`, `event-id-missing` |
//! | 413, 408, 400 | `body-too-large`, `body-timeout`, `body-unreadable` |
//!
//! Providers take 2xx for "delivered" and try again after everything else, for days, with a new
//! signature and a new time (GitHub leaves that to its users). So a refusal must never be a 2xx, or
//! the event is lost; never a 410, which turns the webhook off, nor a 3xx, which is not followed; and
//! not a 5xx, which would count what strangers send as failures of your service. The time is judged
//! by this host's clock, after the signature: who reads `timestamp-too-old` knows that the secret is
//! right.

mod event;
mod key;
mod layer;
mod scheme;
mod service;
mod signature;

pub use event::{MissingEvent, WebhookEvent};
pub use layer::WebhookLayer;
pub use scheme::Scheme;
pub use service::{ResponseFuture, Webhook};
