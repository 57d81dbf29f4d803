//! Millions of records, and several processes.

use std::time::{Duration, Instant};

use sqlx::PgPool;
use tower_idempotency::{PgStore, Sweeper};

use crate::arena::{Entrant, Place, Team};
use crate::keys::Version;
use crate::load::{Ask, Load, Sent};
use crate::sample::Sample;
use crate::suite::{Suite, at_base};
use crate::variants::Variant;

/// Under which a purge has to go on, a second.
const PACE: f64 = 1000.0;

/// How long it is measured without a purge.
const IDLE: Duration = Duration::from_secs(5);

const WARM_UP: Duration = Duration::from_secs(1);

const LEASED_V7: (Variant, Version) = (Variant::Leased, Version::V7);

/// Answered records under UUIDv7 keys, spread over hours that ended so many hours ago. They are small:
/// what grows is what is searched. Or under ids that are spread as those of random keys are, which are
/// made in their order because that is quicker.
const FILL: &str = "
insert into idempotency.record (id, digest, scope, operation, key, state, token, attempt, lost,
    fingerprint, claimed_at, leased_until, expires_at, sweep_at, answer)
select id, decode(noise || noise, 'hex'), '', 'POST /charges', id, 'completed', noise::uuid, 1, 'answer',
    decode(noise, 'hex'), at, at, at + interval '72 h', at + interval '72 h',
    decode(repeat('00', 200), 'hex')
from (
    select at, noise,
        (case when $4 then lpad(to_hex((n * (4294967295.0 / $1))::int8), 8, '0') || substr(noise, 20, 4)
            else lpad(to_hex((extract(epoch from at) * 1000)::int8), 12, '0')
        end || '7' || substr(noise, 1, 19))::uuid as id
    from (
        select n, md5(n::text || $2::text) as noise, clock_timestamp() - make_interval(
            secs => 3600 * ($2::float8 + $3::float8 * (1 - n::float8 / $1::float8))
        ) as at
        from generate_series(1, $1::int8) as n
    ) as times
) as records";

/// How old records are, in hours.
#[derive(Debug, Clone, Copy)]
struct Age {
    youngest: f64,
    /// Between the youngest and the oldest.
    span: f64,
}

const OVER: Age = Age {
    youngest: 73.0,
    span: 23.0,
};

const KEPT: Age = Age {
    youngest: 1.0,
    span: 47.0,
};

const TIDY: &str = "vacuum (analyze) idempotency.record";

/// The same, where the others look.
const COPY: &str = "insert into peer.record select * from idempotency.record";

const TIDY_COPY: &str = "vacuum (analyze) peer.record";

/// What was loaded is on the disk before anything is measured.
const SETTLE: &str = "checkpoint";

/// A purge in one statement.
const DELETE: &str = "delete from idempotency.record where sweep_at <= statement_timestamp()";

const EMPTY: &str = "truncate idempotency.record, peer.record";

impl Suite {
    /// S6 on a large table, S9, S10 and growth.
    pub(crate) async fn growth(&mut self) {
        if self.wants(&["growth"]) {
            self.processes().await;
        }
        if !self.wants(&["S6", "S9", "S10", "growth"]) {
            return;
        }
        let pool = self.arena.enlarge().await;
        if self.wants(&["S6", "S9", "S10"]) {
            self.ordered(&pool).await;
        }
        if self.wants(&["growth"]) {
            self.spread(&pool).await;
        }
        pool.close().await;
    }

    /// Keys that are ordered in time.
    async fn ordered(&mut self, pool: &PgPool) {
        // One that is over, and four that are kept.
        self.fill(pool, 1, OVER, Version::V7).await;
        self.fill(pool, 4, KEPT, Version::V7).await;
        if self.wants(&["S6"]) {
            let (small, large) = self.beside_empty("rows-5m", LEASED_V7).await;
            let log = large.iter().zip(&small);
            let log = log.map(|(large, small)| large.log / small.log);
            self.report.ratio("S6-wal-at-5-million-vs-small", log);
        }
        if self.wants(&["S10"]) {
            self.purges(pool).await;
        }
        if self.wants(&["S9"]) {
            // What was to be purged is left where nobody purged it.
            let missing = if self.wants(&["S10"]) { 6 } else { 5 };
            self.fill(pool, missing, KEPT, Version::V7).await;
            let (small, large) = self.beside_empty("rows-10m", LEASED_V7).await;
            let rate = large.iter().zip(&small);
            let rate = rate.map(|(large, small)| large.rate / small.rate);
            self.report.ratio("S9-fresh-at-10-million-vs-empty", rate);
        }
    }

    /// Random keys.
    async fn spread(&mut self, pool: &PgPool) {
        execute(pool, EMPTY).await;
        self.fill(pool, 5, KEPT, Version::V4).await;
        self.beside_empty("rows-5m", (Variant::Leased, Version::V4))
            .await;
        execute(pool, COPY).await;
        execute(pool, TIDY_COPY).await;
        execute(pool, SETTLE).await;
        for variant in [Variant::Naive, Variant::InsertFirst] {
            self.beside_empty("rows-5m", (variant, Version::V4)).await;
        }
    }

    async fn fill(&mut self, pool: &PgPool, millions: u32, age: Age, version: Version) {
        let began = Instant::now();
        let filled = sqlx::query(FILL)
            .bind(i64::from(millions * self.options.million))
            .bind(age.youngest)
            .bind(age.span)
            .bind(version == Version::V4);
        filled.execute(pool).await.expect("there is room");
        execute(pool, TIDY).await;
        let seconds = began.elapsed().as_secs_f64() / f64::from(millions);
        execute(pool, SETTLE).await;
        self.report.note("loading-a-million", seconds, "s");
    }

    /// On tables with nothing in them, and on large ones, in turns.
    async fn beside_empty(
        &mut self,
        point: &str,
        (variant, version): (Variant, Version),
    ) -> (Vec<Sample>, Vec<Sample>) {
        let at = |place| Entrant {
            ask: Ask::Fresh(version),
            place,
            ..at_base(variant)
        };
        let entrants = [at(Place::Small), at(Place::Large)];
        let samples = self.arena.rounds(&entrants).await;
        let [small, large] = <[_; 2]>::try_from(samples).expect("there are two");
        let keys = format!("{version:?}").to_lowercase();
        let name = variant.name();
        self.report.figure(name, &format!("rows-0-{keys}"), &small);
        self.report.figure(name, &format!("{point}-{keys}"), &large);
        (small, large)
    }

    /// S10: of five million, the one that is over.
    async fn purges(&mut self, pool: &PgPool) {
        let team = self.arena.field(Entrant {
            place: Place::Large,
            ..at_base(Variant::Leased)
        });
        let team = team.await;
        let (mut seconds, mut latencies) = (Vec::new(), Vec::new());
        for repetition in 0..3 {
            if repetition > 0 {
                self.fill(pool, 1, OVER, Version::V7).await;
            }
            let (idle, _) = paced(&team, async { tokio::time::sleep(IDLE).await }).await;
            let million = self.options.million;
            let (busy, took) = paced(&team, sweep(pool, million)).await;
            seconds.push(took.as_secs_f64());
            self.report.note("S10-idle-p99", idle.percentile(99), "ms");
            self.report.note("S10-purge-p99", busy.percentile(99), "ms");
            latencies.push(busy.percentile(99) / idle.percentile(99));
        }
        self.report.ratio("S10-purge-seconds", seconds);
        self.report.ratio("S10-purge-p99-vs-idle", latencies);
        // What the machine takes for it at all, under the same load.
        self.fill(pool, 1, OVER, Version::V7).await;
        let (busy, took) = paced(&team, delete(pool, self.options.million)).await;
        let seconds = took.as_secs_f64();
        self.report.note("S10-one-statement", seconds, "s");
        self.report
            .note("S10-one-statement-p99", busy.percentile(99), "ms");
    }

    /// The same load on more and more processes.
    async fn processes(&mut self) {
        for processes in [1, 2, 4] {
            let entrants = [Variant::Leased, Variant::Naive].map(|variant| Entrant {
                processes,
                ..at_base(variant)
            });
            self.compete(&format!("processes-{processes}"), &entrants)
                .await;
        }
    }
}

async fn execute(pool: &PgPool, sql: &'static str) {
    let done = sqlx::raw_sql(sql).execute(pool).await;
    done.expect("the statement can be executed");
}

/// Latencies of fresh requests at a pace, for as long as something takes.
async fn paced(team: &Team, meanwhile: impl Future<Output = ()>) -> (Sent, Duration) {
    let mut running = Load {
        pace: Some(PACE),
        ..team.load()
    }
    .start();
    running.ready().await;
    tokio::time::sleep(WARM_UP).await;
    running.measure(true);
    let began = Instant::now();
    meanwhile.await;
    let took = began.elapsed();
    running.measure(false);
    (running.end().await.expect("they are answered"), took)
}

async fn delete(pool: &PgPool, million: u32) {
    let deleted = sqlx::query(DELETE).execute(pool).await;
    let deleted = deleted.expect("it can be deleted").rows_affected();
    assert_eq!(deleted, u64::from(million), "the fill and the purge differ");
}

async fn sweep(pool: &PgPool, million: u32) {
    let store = PgStore::new(pool.clone());
    let swept = Sweeper::new(store.clone()).sweep().await;
    let deleted = swept.expect("it can be swept").deleted;
    assert_eq!(deleted, u64::from(million), "the fill and the purge differ");
    store.close().await;
}
