//! Waiting for a record that another process runs, and waking those who do.
//!
//! A notification takes a lock of the whole database at its commit, so that none is sent unless a
//! record is flagged as waited for. Flags and notifications may be lost: whoever waits polls, too.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::PgStore;
use super::listen::Ear;
use super::types::PgUuid;
use crate::identity::{Identity, RecordId};
use crate::store::StoreError;

/// Flags a running record unless somebody has it locked, and says whether the record is there and
/// runs no more. A flag that a crash takes away is not missed, so nobody waits for the disk.
const FLAG: &str = "
with flagged as (
    update idempotency.record set waited = true
    from (select set_config('synchronous_commit', 'off', true)) as session
    where id = (
        select id from idempotency.record
        where id = $1 and state = 'running' and not waited
        for no key update skip locked
    )
)
select 1 from idempotency.record where id = $1 and state <> 'running'";

/// Its own transaction, which is over soon since nobody waits for the disk.
const NOTIFY: &str = "
select set_config('synchronous_commit', 'off', true), pg_notify('idempotency_changed', id::text)
from unnest($1::uuid[]) as id";

/// What is shorter would be over before the record is flagged.
const SHORT: Duration = Duration::from_millis(50);

/// A record that has changed while it was flagged is looked at again so soon.
const SOON: Duration = Duration::from_millis(25);

/// For how long a flag is believed to be there: a new attempt begins without.
const FLAG_LASTS: Duration = Duration::from_secs(2);

/// Whoever waits for one more only polls.
const MAX_RECORDS: usize = 1024;

/// The records that this process waits for, and the connection that hears of them. Clones share
/// both; the last to go ends the connection.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    server: PgConnectOptions,
    /// How long a statement of the listening connection may take.
    patience: Duration,
    waited: Arc<Waited>,
    stop: CancellationToken,
    _stops: Arc<DropGuard>,
}

#[derive(Debug)]
pub(super) struct Waited {
    records: Mutex<Records>,
    /// Whether somebody listens: what is flagged before may be missed.
    pub(super) is_heard: watch::Sender<bool>,
}

#[derive(Debug)]
struct Records {
    by_id: HashMap<RecordId, Record>,
    is_listening: bool,
    last: Instant,
}

#[derive(Debug, Default)]
struct Record {
    changed: Arc<Notify>,
    flagged: Option<Instant>,
}

impl Record {
    fn is_flagged(&self) -> bool {
        let flagged = self.flagged;
        flagged.is_some_and(|flagged| flagged.elapsed() < FLAG_LASTS)
    }

    fn is_waited(&self) -> bool {
        Arc::strong_count(&self.changed) > 1
    }
}

impl Waiting {
    pub(super) fn new(server: PgConnectOptions, patience: Duration) -> Self {
        let stop = CancellationToken::new();
        let records = Records {
            by_id: HashMap::new(),
            is_listening: false,
            last: Instant::now(),
        };
        Self {
            server: server.application_name("tower-idempotency waits"),
            patience,
            waited: Arc::new(Waited {
                records: Mutex::new(records),
                is_heard: watch::Sender::new(false),
            }),
            _stops: Arc::new(stop.clone().drop_guard()),
            stop,
        }
    }

    pub(super) fn close(&self) {
        self.stop.cancel();
    }

    /// What is notified of changes, and somebody who listens for them; `None` where too many wait.
    fn enlist(&self, id: RecordId) -> Option<Arc<Notify>> {
        let mut records = self.waited.records();
        records.last = Instant::now();
        if records.by_id.len() >= MAX_RECORDS && !records.by_id.contains_key(&id) {
            records.by_id.retain(|_, record| record.is_waited());
            if records.by_id.len() >= MAX_RECORDS {
                return None;
            }
        }
        let changed = records.by_id.entry(id).or_default().changed.clone();
        let is_listening = mem::replace(&mut records.is_listening, true);
        // A runtime that is going down drops the task at once, which takes the lock.
        drop(records);
        if !is_listening {
            let ear = Ear::new(self.server.clone(), self.patience, self.waited.clone());
            let stop = self.stop.clone();
            tokio::spawn(async move { stop.run_until_cancelled(ear.listen()).await });
        }
        Some(changed)
    }
}

impl Waited {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is for the caller to flag the record: once for all who wait.
    fn flags(&self, id: RecordId) -> bool {
        let mut records = self.records();
        let record = records.by_id.get_mut(&id);
        let Some(record) = record.filter(|record| !record.is_flagged()) else {
            return false;
        };
        record.flagged = Some(Instant::now());
        true
    }

    pub(super) fn changed(&self, id: RecordId) {
        let mut records = self.records();
        if let Some(record) = records.by_id.get_mut(&id) {
            record.flagged = None;
            record.changed.notify_waiters();
        }
    }

    /// Whether nobody has waited for so long.
    pub(super) fn is_idle(&self, idle: Duration) -> bool {
        let mut records = self.records();
        let by_id = &mut records.by_id;
        by_id.retain(|_, record| record.is_waited() || record.is_flagged());
        by_id.is_empty() && records.last.elapsed() >= idle
    }

    /// The next who waits has to listen.
    pub(super) fn unheard(&self) {
        self.is_heard.send_replace(false);
        self.records().is_listening = false;
    }
}

/// Ids of records whose change somebody waits for: those that come while a notification is sent
/// share the next one.
#[derive(Debug, Clone, Default)]
pub(super) struct Wakes {
    ids: Arc<Mutex<Vec<RecordId>>>,
    turn: Arc<AsyncMutex<()>>,
}

impl Wakes {
    fn ids(&self) -> MutexGuard<'_, Vec<RecordId>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PgStore {
    /// Until the record may have changed, or the time is over.
    pub(super) async fn wait(&self, identity: &Identity, limit: Duration) {
        let waiting = self.waiting.as_ref();
        let waiting = waiting.filter(|waiting| limit >= SHORT && !waiting.stop.is_cancelled());
        let id = identity.id();
        let enlisted = waiting.and_then(|waiting| Some((waiting, waiting.enlist(id)?)));
        let Some((waiting, changed)) = enlisted else {
            return sleep(limit).await;
        };
        tokio::select! {
            () = sleep(limit) => {}
            () = self.wait_for(id, &changed, &waiting.waited) => {}
        }
    }

    /// It is heard of what changes from the moment of `notified` on, so that comes first.
    async fn wait_for(&self, id: RecordId, changed: &Notify, waited: &Waited) {
        let notified = changed.notified();
        // The sender outlives this.
        let _ = waited.is_heard.subscribe().wait_for(|heard| *heard).await;
        if waited.flags(id) && self.flag(id).await.unwrap_or(false) {
            return sleep(SOON).await;
        }
        notified.await;
    }

    /// Flags the record; whether it has ended already. In a task of its own: where the wait is over
    /// meanwhile, the connection of a statement that is given up would be lost.
    async fn flag(&self, id: RecordId) -> Result<bool, StoreError> {
        let store = self.clone();
        let flagging = tokio::spawn(async move {
            let done = store.run(sqlx::query(FLAG).bind(PgUuid::from(id))).await?;
            Ok(!done.rows.is_empty())
        });
        flagging.await.unwrap_or(Ok(false))
    }

    /// Wakes those who wait for records that were flagged when they changed. To be called when that is
    /// committed. Nobody waits for the notification: where it fails, they poll.
    pub(super) fn wake(&self, ids: impl IntoIterator<Item = RecordId>) {
        self.wakes.ids().extend(ids);
        let store = self.clone();
        tokio::spawn(async move {
            let _turn = store.wakes.turn.lock().await;
            let ids = mem::take(&mut *store.wakes.ids());
            if ids.is_empty() {
                return;
            }
            let ids: Vec<PgUuid> = ids.into_iter().map(PgUuid::from).collect();
            if let Err(error) = store.run(sqlx::query(NOTIFY).bind(ids)).await {
                let cause: &dyn std::error::Error = &error;
                tracing::debug!(error = cause, "cannot wake who waits; they poll");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_for_one_record_too_many_only_polls() {
        let server = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(1);
        let waiting = Waiting::new(server, Duration::from_secs(1));
        let id = |n: usize| RecordId::from_bytes((n as u128).to_be_bytes());
        let mut enlisted: Vec<_> = (0..MAX_RECORDS).map(|n| waiting.enlist(id(n))).collect();
        assert!(enlisted.iter().all(Option::is_some));
        assert!(waiting.enlist(id(0)).is_some());
        assert!(waiting.enlist(id(MAX_RECORDS)).is_none());
        enlisted.pop();
        assert!(waiting.enlist(id(MAX_RECORDS)).is_some());
    }
}
