//! Kills the connections that the store writes on, under load: no answer is lost, no handler runs
//! twice, and nobody waits for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::arena::Arena;
use crate::http1::{Connection, Template};
use crate::keys::{Keys, Version};
use crate::load::Ask;
use crate::soak::{Tally, Told, add, arena, read, tracked};

const CLIENTS: usize = 64;

/// Operations after which a client asks for an answer once more.
const LATER: usize = 50;

/// How many were killed, and how many of those were at work.
const KILL: &str = "
select count(*) filter (where killed), count(*) filter (where killed and state = 'active') from (
    select state, pg_terminate_backend(pid) as killed from pg_stat_activity
    where application_name like 'tower-idempotency writer %'
) as writer";

/// Time for the store to connect anew, and to write.
const PAUSE: Duration = Duration::from_millis(25);

/// Whether there was no violation.
pub(crate) async fn run(times: u64) -> bool {
    let mut arena = arena().await;
    let team = arena.field(tracked(1)).await;
    let port = team.load().ports[0];
    let (tally, is_over) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(client(port, tally.clone(), is_over.clone()));
    }
    let (killed, busy) = kill(&mut arena, times).await;
    is_over.store(true, Ordering::SeqCst);
    while let Some(client) = clients.join_next().await {
        client.expect("no client panics");
    }
    let duplicates = arena.duplicates().await;
    let violations = tally.violations() + duplicates;
    println!(
        "kills {killed} at work {busy} executions {} answers {} refused {} lost {} different {} \
         duplicate {duplicates} hanging {} violations {violations}",
        arena.executions().await,
        read(&tally.answered),
        read(&tally.refused),
        read(&tally.lost),
        read(&tally.different),
        read(&tally.hanging),
    );
    violations == 0 && killed >= times && busy > 0
}

async fn kill(arena: &mut Arena, times: u64) -> (u64, u64) {
    let (mut killed, mut busy) = (0, 0);
    while killed < times {
        tokio::time::sleep(PAUSE).await;
        let (now, at_work): (i64, i64) = sqlx::query_as(KILL)
            .fetch_one(&mut arena.admin)
            .await
            .expect("it answers");
        killed += now.unsigned_abs();
        busy += at_work.unsigned_abs();
    }
    (killed, busy)
}

/// Comes with a new key, and with each one again, much later.
async fn client(port: u16, tally: Arc<Tally>, is_over: Arc<AtomicBool>) {
    let mut connection = Connection::open(port).await.expect("it listens");
    let (mut request, mut keys) = (Template::charge(None), Keys::new(Ask::Fresh(Version::V4)));
    let mut given = VecDeque::new();
    while !is_over.load(Ordering::SeqCst) || !given.is_empty() {
        if !is_over.load(Ordering::SeqCst) {
            let key = keys.fresh();
            request.put(&key);
            let answer = insist(&tally, &mut connection, &request).await;
            given.push_back((key, answer));
        }
        if given.len() > LATER || is_over.load(Ordering::SeqCst) {
            let Some((key, first)) = given.pop_front() else {
                continue;
            };
            request.put(&key);
            if insist(&tally, &mut connection, &request).await != first {
                add(&tally.different);
            }
        }
    }
}

/// Until there is an answer.
async fn insist(tally: &Tally, connection: &mut Connection, request: &Template) -> Told {
    loop {
        match tally.ask(connection, request).await {
            Told::ComeAgain => tokio::time::sleep(Duration::from_millis(5)).await,
            told => return told,
        }
    }
}
