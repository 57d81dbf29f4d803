//! A service that takes charges as Stripe's API does, so that Stripe's own SDKs can be run against
//! the `stripe` profile: `./scripts/stripe-sdks` starts it and runs the checks.
//!
//! | request | answer |
//! |---|---|
//! | `POST /v1/charges` | a charge; `metadata[delay_ms]` slows it, `metadata[end]` ends it otherwise |
//! | `POST /lose/{moment}` | the connection of the account's next charge is closed, see [`Loss`] |
//! | `GET /runs` | what the account has sent and had run, see [`Seen`] |

mod bank;
mod connection;

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use axum::extract::{Extension, Form, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tower_idempotency::{
    ConfigError, Fingerprinter, IdempotencyLayer, MemoryStore, Policy, Profile, Scope,
};

use crate::bank::{Account, Bank, Loss, Seen};

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stripe-server: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let policy = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => policy(),
        ["--plant", "default-profile"] => policy().with_profile(Profile::Default),
        ["--plant", "byte-fingerprint"] => policy().with_fingerprint(Fingerprinter::raw()),
        _ => return Err("usage: stripe-server [--plant default-profile|byte-fingerprint]".into()),
    };
    let app = app(policy)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("port {}", listener.local_addr()?.port());
    connection::serve(listener, app).await
}

fn policy() -> Policy {
    Policy::high()
        .with_profile(Profile::Stripe)
        .with_fingerprint(Fingerprinter::raw().with_sorted_form())
}

fn app(policy: Policy) -> Result<Router, ConfigError> {
    let bank = Bank::default();
    // Keys belong to the account: one of its API keys may be rolled between two tries.
    let scope = Scope::extension::<Account>(|account| account.name());
    let idempotency = IdempotencyLayer::new(MemoryStore::new(), scope).with_policy(policy)?;
    let charges = post(charge)
        .layer(idempotency)
        .layer(middleware::from_fn_with_state(bank.clone(), observe));
    Ok(Router::new()
        .route("/v1/charges", charges)
        .route("/lose/{moment}", post(lose))
        .route("/runs", get(runs))
        .layer(middleware::from_fn(authenticate))
        .with_state(bank))
}

/// Every `sk_test_ACCOUNT_NUMBER` is a key of `ACCOUNT`.
async fn authenticate(mut request: Request, next: Next) -> Response {
    let Some(account) = account_of(request.headers()) else {
        let message = "You did not provide an API key.";
        return error(
            StatusCode::UNAUTHORIZED,
            json!({"type": "invalid_request_error", "message": message}),
        );
    };
    request.extensions_mut().insert(account);
    next.run(request).await
}

fn account_of(headers: &HeaderMap) -> Option<Account> {
    let bearer = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let key = bearer.strip_prefix("Bearer sk_test_")?;
    let (account, _) = key.rsplit_once('_')?;
    Some(Account::new(account))
}

/// Sees what the layer answers, and closes the connection where that was asked for.
async fn observe(
    State(bank): State<Bank>,
    Extension(account): Extension<Account>,
    request: Request,
    next: Next,
) -> Response {
    let answer = next.run(request);
    let response = match bank.request(&account) {
        None => answer.await,
        Some(Loss::Answer) => {
            answer.await;
            connection::lose()
        }
        Some(Loss::Waiting(started)) => tokio::select! {
            response = answer => response,
            _ = started => connection::lose(),
        },
    };
    bank.answered(&account, response.status());
    response
}

async fn charge(
    State(bank): State<Bank>,
    Extension(account): Extension<Account>,
    Form(form): Form<HashMap<String, String>>,
) -> Response {
    let number = bank.run(&account);
    let field = |name: &str| form.get(name).map(String::as_str);
    if let Some(delay) = field("metadata[delay_ms]").and_then(|delay| delay.parse().ok()) {
        sleep(Duration::from_millis(delay)).await;
    }
    match field("metadata[end]") {
        Some("declined") => error(
            StatusCode::PAYMENT_REQUIRED,
            json!({"type": "card_error", "code": "card_declined", "message": "Your card was declined."}),
        ),
        Some("failed") => failure(),
        Some("failed-for-good") => ([("stripe-should-retry", "false")], failure()).into_response(),
        Some("panic") => panic!("as the request asked for"),
        _ => Json(json!({
            "id": format!("ch_{number:024}"),
            "object": "charge",
            "amount": field("amount").and_then(|amount| amount.parse::<i64>().ok()),
            "currency": field("currency"),
            "status": "succeeded",
        }))
        .into_response(),
    }
}

fn failure() -> Response {
    error(
        StatusCode::INTERNAL_SERVER_ERROR,
        json!({"type": "api_error", "message": "The bank did not answer."}),
    )
}

fn error(status: StatusCode, error: Value) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

async fn lose(
    State(bank): State<Bank>,
    Extension(account): Extension<Account>,
    Path(moment): Path<String>,
) -> StatusCode {
    if bank.arm(&account, &moment) {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::NOT_FOUND
    }
}

async fn runs(State(bank): State<Bank>, Extension(account): Extension<Account>) -> Json<Seen> {
    Json(bank.seen(&account))
}
