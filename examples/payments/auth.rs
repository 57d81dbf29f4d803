//! Who asks: outside of the idempotency layer, which needs to know.

use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;

/// Whoever a token stands for. Charges belong to the account, a profile to the member.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Principal {
    pub(crate) account: &'static str,
    pub(crate) member: &'static str,
}

/// Demo only: a real service verifies a session or a signed token here. Ada's token was refreshed: both
/// of hers are the same principal, so a retry with the new one is still a retry.
const TOKENS: [(&str, Principal); 3] = [
    ("ada-monday", ADA),
    ("ada-tuesday", ADA),
    ("grace-monday", GRACE),
];
const ADA: Principal = Principal {
    account: "acme",
    member: "acme/ada",
};
const GRACE: Principal = Principal {
    account: "globex",
    member: "globex/grace",
};

pub(crate) async fn authenticate(mut request: Request, next: Next) -> Response {
    let Some(principal) = principal(&request) else {
        return ApiError::Unauthorized.into_response();
    };
    request.extensions_mut().insert(principal);
    next.run(request).await
}

fn principal(request: &Request) -> Option<Principal> {
    let header = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let token = header.strip_prefix("Bearer ")?;
    let (_, principal) = TOKENS.iter().find(|(known, _)| *known == token)?;
    Some(*principal)
}
