//! axum-idempotent with its session store in memory.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use axum_idempotent::{IdempotentLayer, IdempotentOptions};
use ruts::store::Ttl;
use ruts::store::moka::MokaStore;
use ruts::{CookieOptions, Session, SessionLayer};
use tower_cookies::CookieManagerLayer;

use crate::serve::App;

/// It keeps answers only within a session that is there already.
pub(crate) fn layered(router: Router<App>) -> Router<App> {
    let options = IdempotentOptions::default().use_idempotency_key_header(None, true);
    // Whoever measures begins a session for each connection, and leaves it behind.
    let store = MokaStore::builder().time_to_idle(Duration::from_secs(20));
    let cookie = CookieOptions::build()
        .name("session")
        .path("/")
        .max_age(3600);
    router
        .layer(IdempotentLayer::<MokaStore>::new(options))
        .route("/session", get(begin))
        .layer(SessionLayer::new(Arc::new(store.build())).with_cookie_options(cookie))
        .layer(CookieManagerLayer::new())
}

async fn begin(session: Session<MokaStore>) -> StatusCode {
    let Ok(ttl) = Ttl::new(3600) else {
        return StatusCode::INTERNAL_SERVER_ERROR;
    };
    match session.set("user", &"acme", ttl, None).await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
