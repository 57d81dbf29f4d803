//! One layer; each route has a clone of it, with a policy of its own. README.md says why.

use std::time::Duration;

use axum::routing::{get, patch, post};
use axum::{Router, middleware};
use tower_idempotency::webhook::{WebhookEvent, WebhookLayer};
use tower_idempotency::{
    ConfigError, DerivedKey, IdempotencyLayer, Lost, PgStore, Policy, Scope, Unknown,
};

use crate::auth::{self, Principal};
use crate::{App, charges, hooks, notifications, profile, receiver, statement};

const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn router(
    idempotency: &IdempotencyLayer<PgStore>,
    bank: WebhookLayer,
    app: App,
) -> Result<Router, ConfigError> {
    let leased = |policy| idempotency.clone().with_policy(policy);
    // What a handler does in the database, and its answer, are one transaction. A deadlock, say, is
    // none of the client's business: up to three times the handler simply runs again.
    let transactional = |policy: Policy| {
        let layer = idempotency.clone().with_policy(policy.with_reruns(3))?;
        Ok::<_, ConfigError>(layer.transactional())
    };

    let charge = Policy::critical().with_ttl(7 * DAY);
    let capture = Policy::critical()
        .with_ttl(30 * DAY)
        .with_derived_key(DerivedKey::from_fn(|request, _| {
            Some(request.uri.path().to_owned())
        }));
    let refund = Policy::critical().with_ttl(30 * DAY);
    let notification = rerunnable(Policy::high()).with_ttl(3 * DAY);
    let profile = Policy::low()
        .with_ttl(DAY)
        .with_scope(Scope::extension::<Principal>(|principal| principal.member));
    let hook = Policy::medium()
        .with_required_key(true)
        .with_ttl(7 * DAY)
        .with_scope(WebhookEvent::scope())
        .with_derived_key(WebhookEvent::derived_key())
        .with_fingerprint(WebhookEvent::fingerprint());

    let clients = Router::new()
        // `get` comes after `layer`, and is not covered.
        .route(
            "/charges",
            post(charges::create)
                .layer(transactional(charge)?)
                .get(charges::list),
        )
        .route("/charges/{id}", get(charges::show))
        .route(
            "/charges/{id}/captures",
            post(charges::capture).layer(transactional(capture)?),
        )
        .route(
            "/charges/{id}/refunds",
            post(charges::refund).layer(transactional(refund)?),
        )
        .route(
            "/charges/{id}/notifications",
            post(notifications::create).layer(leased(notification)?),
        )
        .route("/profile", patch(profile::update).layer(leased(profile)?))
        .route("/statement", get(statement::show))
        // Added after the routes, so it is outermost: who asks is known before the key is looked at.
        .layer(middleware::from_fn(auth::authenticate));
    // From the outside in: whose event it is, then whether it was handled.
    let bank = post(hooks::bank).layer((bank, transactional(hook)?));
    Ok(clients
        .route("/hooks/bank", bank)
        .with_state(app)
        .merge(receiver::routes()))
}

/// For a handler whose effect is elsewhere, with one who knows the key: an attempt that was lost needs
/// nobody to look at it, since a retry makes the same call with the same key.
fn rerunnable(policy: Policy) -> Policy {
    policy.with_lost(Lost::Rerun).with_unknown(Unknown::Release)
}
