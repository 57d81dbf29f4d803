//! B08: a leased request that is dropped at each point at which it waits, on real PostgreSQL: by
//! whoever waits for its answer, or with the task that does the work, as at the end of a runtime.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::post;
use faults::cut::Cut;
use faults::database::Database;
use faults::random::fresh_key;
use faults::wait::until;
use http::{Request, StatusCode};
use tokio::sync::watch;
use tower::ServiceExt as _;
use tower_idempotency::{
    Detached, Duplicates, IdempotencyContext, IdempotencyLayer, PgStore, Policy, Scope, Store as _,
};

/// Who goes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Caller,
    Task,
}

type Layer = IdempotencyLayer<PgStore>;

/// That a run began, or ended.
#[derive(Debug, Clone)]
struct Run {
    execution: String,
    key: String,
    finished: bool,
}

struct Place {
    store: PgStore,
    runs: Arc<Mutex<Vec<Run>>>,
    /// Whether handlers may end.
    gate: watch::Sender<bool>,
    database: Database,
}

/// How often it waits depends on how fast the server is: a request has to be through this often in a
/// row.
const DONE: usize = 5;

impl Place {
    async fn new() -> Self {
        let database = Database::postgres().await;
        let pool = sqlx::PgPool::connect(&database.url).await.unwrap();
        let store = PgStore::builder(pool).with_max_connections(1).unwrap();
        let store = store.build();
        store.migrate().await.unwrap();
        Self {
            store,
            runs: Arc::default(),
            gate: watch::channel(true).0,
            database,
        }
    }

    fn layer(&self, policy: Policy) -> Layer {
        let scope = Scope::header("x-tenant").unwrap();
        let policy = policy.with_lease(Duration::from_millis(500));
        let layer = IdempotencyLayer::new(self.store.clone(), scope);
        let layer = layer.with_store_timeout(Duration::from_secs(10)).unwrap();
        // What is cut counts as a failure of the store.
        let layer = layer.with_breaker(1000).unwrap();
        layer.with_policy(policy).unwrap()
    }

    fn router(&self, layer: Layer) -> Router {
        let (runs, gate) = (self.runs.clone(), self.gate.clone());
        let handler = async move |context: IdempotencyContext, body: String| {
            let execution = fresh_key();
            let run = |finished| Run {
                execution: execution.clone(),
                key: context.identity().key().to_owned(),
                finished,
            };
            runs.lock().unwrap().push(run(false));
            tokio::task::yield_now().await;
            let mut gate = gate.subscribe();
            gate.wait_for(|open| *open).await.unwrap();
            tokio::task::yield_now().await;
            runs.lock().unwrap().push(run(true));
            (StatusCode::CREATED, body.replace("tea", &execution))
        };
        Router::new().route("/pay", post(handler).layer(layer))
    }

    /// How many runs of a key began, and the one that ended.
    fn runs(&self, key: &str) -> (usize, Option<String>) {
        let runs = self.runs.lock().unwrap();
        let runs = runs.iter().filter(|run| run.key == key);
        let (ended, begun): (Vec<_>, Vec<_>) = runs.partition(|run| run.finished);
        (begun.len(), ended.last().map(|run| run.execution.clone()))
    }

    /// Sends a request that is cut; whether it was.
    async fn cut(
        &self,
        layer: Layer,
        whose: Whose,
        (polls, late): (usize, bool),
        request: Request<Body>,
    ) -> bool {
        // To connect anew, sqlx waits for itself alone, hundreds of times.
        self.store.list_held(None, 1).await.unwrap();
        if whose == Whose::Caller {
            let sent = Box::pin(self.router(layer).oneshot(request));
            return Cut::new(sent, polls, late).await.is_none();
        }
        let is_cut = Arc::new(AtomicBool::new(false));
        let seen = is_cut.clone();
        let layer = layer.with_spawn_hook(move |task| {
            let seen = seen.clone();
            Detached::new(async move {
                let cut = Cut::new(task, polls, late).await.is_none();
                seen.store(cut, Ordering::SeqCst);
            })
        });
        self.router(layer).oneshot(request).await.unwrap();
        is_cut.load(Ordering::SeqCst)
    }

    /// Retries until there is something else to say than that it runs.
    async fn settled(&self, layer: &Layer, key: &str) -> (StatusCode, bool, String) {
        until("the cut one to be over", async || {
            let sent = self.router(layer.clone()).oneshot(request(key, "tea"));
            let answer = sent.await.unwrap();
            let is_replay = answer.headers().contains_key("idempotent-replayed");
            let status = answer.status();
            let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await;
            let body = String::from_utf8(body.unwrap().to_vec()).unwrap();
            let is_running = body.contains("request-in-progress");
            (!is_running).then_some((status, is_replay, body))
        })
        .await
    }

    /// The one answer, of the one effect, over and over.
    async fn has_one_effect(&self, layer: &Layer, key: &str) {
        let (status, _, body) = self.settled(layer, key).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
        assert_eq!(self.settled(layer, key).await, (status, true, body.clone()));
        assert_eq!(self.runs(key), (1, Some(body)));
    }

    /// Nothing is left open, and the connection is not lost: there is one.
    async fn is_whole(&self, layer: &Layer) {
        self.database.is_clean().await;
        for _ in 0..4 {
            self.has_one_effect(layer, &fresh_key()).await;
        }
    }
}

fn request(key: &str, body: &'static str) -> Request<Body> {
    request_with(key, Body::from(body))
}

/// In pieces, each of which is waited for.
fn in_pieces(key: &str) -> Request<Body> {
    let pieces = futures_util::stream::unfold("tea".chars(), |mut left| async move {
        tokio::task::yield_now().await;
        let piece = left.next()?;
        Some((Ok::<_, std::io::Error>(piece.to_string()), left))
    });
    request_with(key, Body::from_stream(pieces))
}

fn request_with(key: &str, body: Body) -> Request<Body> {
    let request = Request::post("/pay")
        .header("content-type", "text/plain")
        .header("x-tenant", "acme")
        .header("idempotency-key", key);
    request.body(body).unwrap()
}

/// Cuts at every point: the keys of the requests.
async fn everywhere(mut cut: impl AsyncFnMut((usize, bool), &str) -> bool) -> Vec<String> {
    let mut keys = Vec::new();
    for late in [false, true] {
        let (mut cuts, mut done_in_a_row) = (0, 0);
        for polls in 1..300 {
            let key = fresh_key();
            let is_cut = cut((polls, late), &key).await;
            keys.push(key);
            cuts += usize::from(is_cut);
            done_in_a_row = if is_cut { 0 } else { done_in_a_row + 1 };
            if done_in_a_row == DONE {
                break;
            }
        }
        println!("cut {cuts} times");
        assert!(cuts > 0, "nothing was cut");
        assert_eq!(done_in_a_row, DONE, "it never finishes");
    }
    keys
}

#[tokio::test]
async fn b08_a_leased_request_whose_caller_goes_away_at_any_point_has_one_effect() {
    let place = Place::new().await;
    let layer = place.layer(Policy::critical());
    for send in [|key: &str| request(key, "tea"), in_pieces] {
        let keys = everywhere(async |at, key| {
            place.cut(layer.clone(), Whose::Caller, at, send(key)).await
        });
        for key in keys.await {
            place.has_one_effect(&layer, &key).await;
        }
    }
    place.is_whole(&layer).await;
}

#[tokio::test]
async fn b08_a_leased_request_whose_task_ends_at_any_point_is_settled_as_its_policy_says() {
    let place = Place::new().await;
    for (policy, lost) in [
        (Policy::critical(), "outcome-unknown"),
        (Policy::high(), "attempt-lost"),
        (Policy::medium(), ""),
    ] {
        let layer = place.layer(policy);
        let keys = everywhere(async |at, key| {
            place
                .cut(layer.clone(), Whose::Task, at, in_pieces(key))
                .await
        });
        let (mut effects, mut unknown) = (0, 0);
        for key in keys.await {
            let (status, _, body) = place.settled(&layer, &key).await;
            let (begun, ended) = place.runs(&key);
            if status == StatusCode::CREATED {
                assert_eq!(ended.as_ref(), Some(&body));
                assert_eq!(place.settled(&layer, &key).await, (status, true, body));
                effects += 1;
            } else {
                assert!(!lost.is_empty() && body.contains(lost), "{body}");
                unknown += 1;
            }
            // What may run again has run twice at most.
            assert!(begun <= 1 + usize::from(lost.is_empty()), "{begun} runs");
        }
        println!("{effects} answered, {unknown} {lost}");
        assert!(effects > 0);
        assert_eq!(unknown > 0, !lost.is_empty());
        place.is_whole(&layer).await;
    }
}

#[tokio::test]
async fn b08_a_waiting_duplicate_that_goes_away_at_any_point_disturbs_nobody() {
    let place = Place::new().await;
    let layer = place.layer(Policy::critical());
    let waiting = Policy::critical().with_duplicates(Duplicates::Wait(Duration::from_millis(150)));
    let waiting = place.layer(waiting);
    for whose in [Whose::Caller, Whose::Task] {
        let key = fresh_key();
        place.gate.send_replace(false);
        let first = tokio::spawn(place.router(layer.clone()).oneshot(request(&key, "tea")));
        until("the first to begin", async || {
            (place.runs(&key).0 == 1).then_some(())
        })
        .await;
        everywhere(async |at, _| place.cut(waiting.clone(), whose, at, in_pieces(&key)).await)
            .await;
        assert_eq!(place.database.state(&key).await.as_deref(), Some("running"));
        place.gate.send_replace(true);
        let first = first.await.unwrap().unwrap();
        assert_eq!(first.status(), StatusCode::CREATED);
        place.has_one_effect(&layer, &key).await;
    }
    place.is_whole(&layer).await;
}

#[tokio::test]
async fn b08_a_replay_and_a_mismatch_that_go_away_at_any_point_change_nothing() {
    let place = Place::new().await;
    let layer = place.layer(Policy::critical());
    let key = fresh_key();
    place.has_one_effect(&layer, &key).await;
    let before = place.database.record(&key).await;
    for whose in [Whose::Caller, Whose::Task] {
        for body in ["tea", "coffee"] {
            everywhere(async |at, _| {
                let request = request(&key, body);
                place.cut(layer.clone(), whose, at, request).await
            })
            .await;
            assert_eq!(place.database.record(&key).await, before);
            place.has_one_effect(&layer, &key).await;
        }
    }
    place.is_whole(&layer).await;
}
