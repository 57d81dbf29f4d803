//! Whatever the server, the database and the application are set to.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::{Router, routing::post};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinSet;
use tower::ServiceExt as _;
use tower_idempotency::store::{
    Claimed, Existing, PhasedStore, Progress, Renewed, Step, TransactionalStore, Within,
};
use tower_idempotency::{
    IdempotencyLayer, PgStore, References, Resolution, Scope, Store, StoreErrorKind,
};

use super::{
    Fixture, acquire, backends, claim_of, completion, number, renewal, request, sql, text, until,
};

/// Claims, completes and replays.
async fn works(fixture: &Fixture) {
    let request = request("key");
    let claim = acquire(&fixture.store, &request).await;
    fixture.store.complete(&claim, &completion()).await.unwrap();
    match fixture.store.claim(&request).await.unwrap() {
        Claimed::Existing(Existing::Completed(found)) => {
            assert_eq!(found.answer, completion().answer);
            let apart = found.expires_at.duration_since(claim.expires_at);
            assert!(apart.is_ok_and(|apart| apart < Duration::from_millis(1)));
        }
        other => panic!("expected the answer, not {other:?}"),
    }
}

#[tokio::test]
async fn formats_of_the_server_do_not_matter() {
    for setting in [
        "bytea_output = 'escape'",
        "datestyle = 'German, DMY'",
        "timezone = 'Pacific/Chatham'",
        "intervalstyle = 'sql_standard'",
        "extra_float_digits = -15",
        "search_path = 'nowhere'",
        "standard_conforming_strings = off",
        "default_transaction_deferrable = on",
        "jit_above_cost = 0",
    ] {
        works(&Fixture::with_setting(setting).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stricter_isolation_of_the_database_does_not_matter() {
    for level in ["serializable", "repeatable read"] {
        let setting = format!("default_transaction_isolation = '{level}'");
        let fixture = Fixture::with_setting(&setting).await;
        works(&fixture).await;
        let mut claims = JoinSet::new();
        for _ in 0..30 {
            let store = fixture.store.clone();
            claims.spawn(async move { store.claim(&request("contended")).await });
        }
        let claimed = claims.join_all().await;
        let acquired = |claimed: &Result<_, _>| matches!(claimed, Ok(Claimed::Acquired(_)));
        assert_eq!(claimed.iter().filter(|c| acquired(c)).count(), 1);
        assert!(claimed.iter().all(Result::is_ok), "{claimed:?}");
    }
}

/// What the store's own session shows, seen from inside one of its statements.
async fn synchronous_commit(fixture: &Fixture) -> String {
    sql(
        &fixture.pool,
        "create table seen (setting text);
        create function note() returns trigger language plpgsql as $$
        begin insert into public.seen values (current_setting('synchronous_commit')); return new; end $$;
        create trigger note before insert on idempotency.record
        for each row execute function note()",
    )
    .await;
    acquire(&fixture.store, &request("key")).await;
    text(&fixture.pool, "select setting from seen").await
}

#[tokio::test]
async fn commits_wait_for_the_disk_where_the_database_says_they_need_not() {
    let fixture = Fixture::with_setting("synchronous_commit = off").await;
    assert_eq!(text(&fixture.pool, "show synchronous_commit").await, "off");
    assert_eq!(synchronous_commit(&fixture).await, "on");
}

#[tokio::test]
async fn commits_wait_for_standbys_where_the_database_says_so() {
    let fixture = Fixture::with_setting("synchronous_commit = remote_apply").await;
    assert_eq!(synchronous_commit(&fixture).await, "remote_apply");
}

#[tokio::test]
async fn behind_a_pooler_commits_wait_for_the_disk_too() {
    let mut fixture = Fixture::with_setting("synchronous_commit = off").await;
    let builder = PgStore::builder(fixture.pool.clone());
    fixture.store = builder.with_pgbouncer(true).build();
    assert_eq!(synchronous_commit(&fixture).await, "on");
}

#[tokio::test]
async fn a_claim_whose_commit_fails_is_not_acquired() {
    let fixture = Fixture::new().await;
    sql(
        &fixture.pool,
        "create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'at commit'; end $$;
        create constraint trigger refuse after insert on idempotency.record
        deferrable initially deferred for each row execute function refuse()",
    )
    .await;
    let refused = fixture.store.claim(&request("key")).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
    sql(&fixture.pool, "drop trigger refuse on idempotency.record").await;
    works(&fixture).await;
}

#[tokio::test]
async fn the_store_works_while_the_application_has_used_up_its_pool() {
    let fixture = Fixture::new().await;
    let pool = fixture.database.pool(1).await;
    let store = PgStore::new(pool.clone());
    let _all = pool.acquire().await.unwrap();
    assert!(pool.try_acquire().is_none());
    let request = request("key");
    let claimed = tokio::time::timeout(Duration::from_secs(10), store.claim(&request));
    assert!(matches!(
        claimed.await.unwrap().unwrap(),
        Claimed::Acquired(_)
    ));
}

#[tokio::test]
async fn a_shared_pool_is_the_applications() {
    let fixture = Fixture::new().await;
    let pool = fixture.database.pool(1).await;
    let store = PgStore::builder(pool.clone())
        .with_shared_pool(true)
        .build();
    acquire(&store, &request("key")).await;
    assert_eq!(pool.size(), 1);
    let all = pool.acquire().await.unwrap();
    let other = request("other");
    let waiting = store.claim(&other);
    let waited = tokio::time::timeout(Duration::from_millis(200), waiting).await;
    assert!(waited.is_err(), "{waited:?}");
    drop(all);
}

#[tokio::test]
async fn the_store_opens_no_more_connections_than_it_may() {
    let fixture = Fixture::new().await;
    let pool = fixture.database.pool(1).await;
    let store = PgStore::builder(pool.clone())
        .with_max_connections(2)
        .unwrap()
        .build();
    let before = backends(&pool, "true").await;
    let mut claims = JoinSet::new();
    for n in 0..50 {
        let store = store.clone();
        claims.spawn(async move { store.claim(&request(&n.to_string())).await });
    }
    for claimed in claims.join_all().await {
        claimed.unwrap();
    }
    assert!(backends(&pool, "true").await <= before + 2);
}

#[tokio::test]
async fn a_backend_that_was_killed_costs_one_error_at_most() {
    let fixture = Fixture::new().await;
    let store = PgStore::builder(fixture.pool.clone());
    let store = store.with_max_connections(1).unwrap().build();
    let first = request("first");
    acquire(&store, &first).await;
    sql(
        &fixture.pool,
        "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()",
    )
    .await;
    until("the backends are gone", async || {
        backends(&fixture.pool, "query like '%idempotency.record%'").await == 0
    })
    .await;
    let next = request("next");
    let wait = Duration::from_secs(5);
    let once = tokio::time::timeout(wait, store.claim(&next))
        .await
        .unwrap();
    if let Err(error) = once {
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        let again = tokio::time::timeout(wait, store.claim(&next))
            .await
            .unwrap();
        assert!(matches!(again, Ok(Claimed::Acquired(_))), "{again:?}");
    }
    store
        .complete(&claim_of(&first), &completion())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_read_only_server_is_unavailable() {
    let fixture = Fixture::new().await;
    let name = &fixture.database.name;
    let alter = format!(r#"alter database "{name}" set default_transaction_read_only = on"#);
    sql(&fixture.pool, &alter).await;
    let store = PgStore::new(fixture.pool.clone());
    let refused = store.claim(&request("key")).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // Accepts connections in its backlog, and never answers.
    let url = format!("postgres://u@{}/d", listener.local_addr().unwrap());
    let pool = sqlx::postgres::PgPoolOptions::new()
        .connect_lazy(&url)
        .unwrap();
    let store = PgStore::builder(pool);
    let store = store
        .with_statement_timeout(Duration::from_millis(300))
        .unwrap()
        .build();
    let request = request("key");
    let asked = tokio::time::timeout(Duration::from_secs(5), store.claim(&request));
    let refused = asked.await.unwrap().unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
}

/// Each request has room for whatever its store may do: what sqlx takes to open a connection (3 KB or more, 9 KB
/// in the bench) was once part of all of them.
#[tokio::test]
async fn no_call_makes_requests_large() {
    let pool = PgPool::connect_lazy("postgres://localhost/nowhere").unwrap();
    let store = PgStore::new(pool);
    let request = request("key");
    let claim = claim_of(&request);
    let references = References::default();
    let limit = Duration::from_secs(1);
    let sizes = [
        ("claim", size_of_val(&store.claim(&request))),
        (
            "complete",
            size_of_val(&store.complete(&claim, &completion())),
        ),
        ("release", size_of_val(&store.release(&claim))),
        ("hold", size_of_val(&store.hold(&claim, &references))),
        (
            "lookup",
            size_of_val(&store.lookup(&request.identity, &request.fingerprint)),
        ),
        (
            "wait",
            size_of_val(&store.wait_for_change(&request.identity, limit)),
        ),
        ("begin", size_of_val(&store.begin(&request, limit))),
        ("confirm", size_of_val(&store.confirm(&request))),
        (
            "begin_phase",
            size_of_val(&store.begin_phase(&claim, limit)),
        ),
        ("progress", size_of_val(&store.progress(&claim))),
    ];
    for (call, size) in sizes {
        assert!(size < 1536, "{call} takes {size} bytes");
    }
}

/// What may have been made of a request is taken back, for a while.
#[tokio::test]
async fn a_shutdown_does_not_wait_for_claims_of_a_store_that_is_down() {
    let pool = PgPoolOptions::new().connect_lazy("postgres://localhost:1/nowhere");
    let layer = IdempotencyLayer::new(PgStore::new(pool.unwrap()), Scope::global())
        .with_store_timeout(Duration::from_millis(200))
        .unwrap();
    let app = Router::new().route("/orders", post(async || "ran").layer(layer.clone()));
    let order = Request::post("/orders").header("idempotency-key", "order-1");
    let answer = app.oneshot(order.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);

    let shutdown = layer.shutdown(Duration::MAX);
    let report = tokio::time::timeout(Duration::from_secs(10), shutdown).await;
    assert!(report.unwrap().unfinished.is_empty());
}

/// The README names them. The server does not even tell which sessions there are.
#[tokio::test]
async fn a_service_needs_the_rights_that_the_readme_says_and_no_more() {
    let mut fixture = Fixture::new().await;
    fixture.store = PgStore::new(fixture.database.service_pool(1).await);
    works(&fixture).await;
    let store = &fixture.store;

    let claim = acquire(store, &request("held")).await;
    assert_eq!(
        store.extend(&[renewal(&claim)]).await.unwrap(),
        [Renewed::Kept]
    );
    let mut references = References::default();
    references.push("charge", "ch_1").unwrap();
    store.hold(&claim, &references).await.unwrap();
    let found = store.find_by_reference(Within::AllScopes, "charge", "ch_1", None, 10);
    assert_eq!(found.await.unwrap().len(), 1);
    assert!(store.inspect(&claim.identity).await.unwrap().is_some());
    let held = store.list_held(None, 10).await.unwrap().remove(0);
    let resolved = store.resolve(&held.identity, held.token, &Resolution::Release);
    resolved.await.unwrap();

    let claim = acquire(store, &request("waited for")).await;
    let began = Instant::now();
    let wait = store.wait_for_change(&claim.identity, Duration::from_secs(20));
    let (_, released) = tokio::join!(wait, async {
        until("somebody waits", async || {
            let waited = "select count(*) from idempotency.record where waited";
            number(&fixture.pool, waited).await == 1
        })
        .await;
        store.release(&claim).await
    });
    released.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "it was not woken"
    );

    let claim = acquire(store, &request("phases")).await;
    let limit = Duration::from_secs(30);
    let phase = store.begin_phase(&claim, limit).await.unwrap();
    let step = Step {
        before: Progress::default(),
        after: Progress::from_json(Some(r#"[["ordered",1]]"#.into())).unwrap(),
        references,
    };
    store.save_phase(phase, &claim, &step).await.unwrap();
    assert!(store.progress(&claim).await.unwrap().is_some());

    sql(
        &fixture.pool,
        "update idempotency.record set expires_at = now(), sweep_at = now(), leased_until = now()",
    )
    .await;
    assert_eq!(store.delete_expired(10).await.unwrap().deleted, 2);
}
