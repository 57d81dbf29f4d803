//! Operations whose clients never come back.

use std::convert::Infallible;

use axum::body::Bytes;
use axum::http::{Response, StatusCode};
use tower_idempotency::{Completer, Envelope, Finished, Operation, Policy};

use crate::resume::crashed_at;
use crate::shop::{Deaf, Script, Shopping, resuming};

on_both_stores!(
    an_abandoned_operation_is_finished_and_its_client_gets_the_answer,
    an_operation_that_fails_again_is_left_to_be_resumed,
    an_operation_that_is_running_is_left_alone,
    an_operation_that_waits_for_a_person_is_left_alone,
    an_operation_that_nobody_registered_is_left_alone,
    an_answered_operation_is_not_finished_again,
);

const DONE: Finished = Finished {
    completed: 1,
    failed: 0,
};

/// Finishes orders; says how often it did.
fn completer<S: Shopping>(shop: &S, script: &Script) -> Completer<Deaf<S::Store>> {
    let script = script.clone();
    let finish = move |operation: Operation<Deaf<S::Store>>| {
        let script = script.clone();
        async move {
            let phases = operation.phases();
            let order: Option<String> = phases.saved("ordered").await?;
            let order = order.ok_or("no order")?;
            let again = async |_: &mut _| Ok::<_, Infallible>(String::new());
            let ordered: String = phases.run("ordered", again).await?;
            assert_eq!(ordered, order);
            let charge = script.charge(phases.downstream_key("charge")).await;
            let charged = async |_: &mut _| Ok::<_, Infallible>(charge);
            phases.run("charged", charged).await?;
            let answer = Response::builder().status(201).body(Bytes::from(order))?;
            Ok(Envelope::new(answer))
        }
    };
    Completer::new(shop.store().clone()).register("POST /orders", finish)
}

async fn an_abandoned_operation_is_finished_and_its_client_gets_the_answer(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after charge", resuming()).await;
    assert_eq!(completer(&shop, &script).complete().await.unwrap(), DONE);
    assert_eq!((script.calls(), script.charges()), (2, 1));
    let answer = node.order("").await;
    assert!(answer.is_replay());
    assert_eq!(answer.body, "ordered by run 1");
    assert_eq!(script.worked("charged"), 0);
}

async fn an_operation_that_fails_again_is_left_to_be_resumed(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after charge", resuming()).await;
    let failing = Completer::new(shop.store().clone());
    let failing = failing.register("POST /orders", async |_| Err("planted".into()));
    let failed = Finished {
        completed: 0,
        failed: 1,
    };
    assert_eq!(failing.complete().await.unwrap(), failed);
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(script.worked("ordered"), 1);
}

async fn an_operation_that_is_running_is_left_alone(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    script.halt_at("after ordered");
    let look = async {
        script.reached().await;
        let finished = completer(&shop, &script).complete().await.unwrap();
        assert_eq!(finished, Finished::default());
        script.let_go();
    };
    let (answer, ()) = tokio::join!(node.order(""), look);
    assert_eq!(answer.status, StatusCode::CREATED);
}

async fn an_operation_that_waits_for_a_person_is_left_alone(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after charge", Policy::critical()).await;
    for _ in 0..2 {
        let finished = completer(&shop, &script).complete().await.unwrap();
        assert_eq!(finished, Finished::default());
        node.order("").await.assert_problem(409, "outcome-unknown");
    }
}

async fn an_operation_that_nobody_registered_is_left_alone(shop: impl Shopping) {
    let script = Script::default();
    let _node = crashed_at(&shop, &script, "after charge", resuming()).await;
    let other = Completer::new(shop.store().clone());
    let other = other.register("POST /refunds", async |_| Err("planted".into()));
    assert_eq!(other.complete().await.unwrap(), Finished::default());
}

async fn an_answered_operation_is_not_finished_again(shop: impl Shopping) {
    let script = Script::default();
    let _node = crashed_at(&shop, &script, "after charge", resuming()).await;
    let completer = completer(&shop, &script);
    assert_eq!(completer.complete().await.unwrap(), DONE);
    shop.lease_is_over().await;
    assert_eq!(completer.complete().await.unwrap(), Finished::default());
    assert_eq!(shop.progress().await, None);
}
