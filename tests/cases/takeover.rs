//! Takeovers that only say that an attempt was lost, when they are lost themselves.

use std::time::Duration;

use tower_idempotency::{IdempotencyLayer, Lost, Scope};

use crate::backend::Backend;
use crate::flaky::{Fault, Flaky};
use crate::site::{Runs, Site, policy};

on_every_store!(c11_a_takeover_whose_acknowledgement_was_lost_still_only_answers,);

const LEASE: Duration = Duration::from_secs(30);

async fn c11_a_takeover_whose_acknowledgement_was_lost_still_only_answers(backend: impl Backend) {
    let runs = Runs::gated();
    let policy = policy().with_lost(Lost::Answer);
    let layer = backend.layer().with_policy(policy.clone()).unwrap();
    let site = Site::orders(&layer, runs.handler()).await;
    let flaky = Flaky::new(backend.store());
    let layer = IdempotencyLayer::new(flaky.clone(), Scope::header("x-tenant").unwrap());
    let other = Site::orders(&layer.with_policy(policy).unwrap(), runs.handler()).await;
    let test = async {
        runs.entered().await;
        backend.age(LEASE + Duration::from_secs(1)).await;
        flaky.claims(Fault::LoseAcknowledgement);
        other.order("k").await.assert_problem(500, "attempt-lost");
        assert_eq!(flaky.fired(), 1);
        runs.let_go();
    };
    tokio::join!(site.order("k"), test);
    assert_eq!(runs.count(), 1);
}
