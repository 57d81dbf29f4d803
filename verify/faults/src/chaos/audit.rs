//! What the database holds when all is over.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use sqlx::Row as _;
use sqlx::postgres::{PgPool, PgRow};
use tower_idempotency::Envelope;

use super::checker::{Effect, Logged, Record, examine};
use super::counts::Class;
use super::load::World;
use super::options::Plant;
use super::plan::{MARK, Operation};
use super::service::CONNECTIONS;

/// Every effect beside the record of its operation, one operation after the other.
const ALL: &str = "
select coalesce(record.scope, effect.scope) as scope,
    coalesce(record.operation, effect.route) as route,
    coalesce(record.key, effect.key) as key,
    record.state, record.attempt as record_attempt, record.sweep_at = 'infinity' as is_visible,
    record.answer, effect.execution, effect.send, effect.operation, effect.amount, effect.attempt,
    coalesce(effect.xmin = record.xmin and pg_xact_status(effect.xid::xid8) = 'committed', false)
        as is_paired
from (select *, xmin from idempotency.record where key like $1) as record
full join (select *, xmin from effect where key like $1) as effect
    on record.scope = effect.scope and record.operation = effect.route and record.key = effect.key
order by 3, 1, 2";

/// Compares all operations with the database.
///
/// # Panics
///
/// When it cannot be asked.
pub async fn compare(world: &World, pool: &PgPool, logged: &Logged) {
    let (verdicts, sent) = (world.verdicts(), world.sent());
    let of_send = |send: i64| {
        let send = usize::try_from(send).ok();
        let sent = send.and_then(|send| sent.get(send)).copied();
        sent.unwrap_or_default()
    };
    let mut is_there = vec![false; verdicts.len()];
    let mut check = |group: &Group| {
        let seed = world.options.seed;
        let found = Operation::find(seed, &group.scope, &group.route, &group.key);
        let Some(operation) = found else {
            let (scope, route) = (&group.scope, &group.route);
            return world.violated(format!("I-7 {scope} {route} {}: nobody's", group.key));
        };
        let number = usize::try_from(operation.number).unwrap_or(usize::MAX);
        if let Some(place) = is_there.get_mut(number) {
            *place = true;
        }
        let verdict = verdicts.get(number).and_then(Option::as_ref);
        let (record, effects) = (group.record.as_ref(), &group.effects);
        let violations = examine(&operation, verdict, record, effects, of_send, logged);
        violations.into_iter().for_each(|text| world.violated(text));
    };
    let mut rows = sqlx::query(ALL).bind(format!("{MARK}%")).fetch(pool);
    let mut group: Option<Group> = None;
    while let Some(row) = rows.try_next().await.expect("the database can be asked") {
        let next = Group::read(&row).expect("rows can be read");
        match &mut group {
            Some(group) if group.is_of(&next) => group.effects.extend(next.effects),
            group => {
                if let Some(group) = group.replace(next) {
                    check(&group);
                }
            }
        }
    }
    if let Some(group) = group {
        check(&group);
    }
    for (number, verdict) in verdicts.iter().enumerate().filter(|(n, _)| !is_there[*n]) {
        let operation = Operation::new(world.options.seed, number as u64);
        let violations = examine(&operation, verdict.as_ref(), None, &[], of_send, logged);
        violations.into_iter().for_each(|text| world.violated(text));
    }
}

/// What there is of one operation.
struct Group {
    scope: String,
    route: String,
    key: String,
    record: Option<Record>,
    effects: Vec<Effect>,
}

impl Group {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        let state: Option<String> = row.try_get("state")?;
        let record = match state {
            Some(state) => Some(Record {
                state,
                attempt: row.try_get("record_attempt")?,
                is_visible: row.try_get("is_visible")?,
                answer: row.try_get("answer")?,
            }),
            None => None,
        };
        let execution: Option<String> = row.try_get("execution")?;
        let effects = match execution {
            Some(execution) => vec![Effect {
                execution,
                send: row.try_get("send")?,
                operation: row.try_get("operation")?,
                amount: row.try_get("amount")?,
                attempt: row.try_get("attempt")?,
                is_paired: row.try_get("is_paired")?,
            }],
            None => Vec::new(),
        };
        Ok(Self {
            scope: row.try_get("scope")?,
            route: row.try_get("route")?,
            key: row.try_get("key")?,
            record,
            effects,
        })
    }

    fn is_of(&self, other: &Self) -> bool {
        (&self.key, &self.scope, &self.route) == (&other.key, &other.scope, &other.route)
    }
}

/// Counts the faults that only the handlers met, and what was swept.
///
/// # Panics
///
/// When the database cannot be asked.
pub async fn count_faults(world: &World, pool: &PgPool) {
    use std::sync::atomic::Ordering;
    // A transaction that is rolled back leaves no trace: these are of leased routes alone.
    let met = async |pattern: &str| -> u64 {
        let query = sqlx::query_scalar("select count(*) from effect where behave like $1");
        let count: i64 = query
            .bind(pattern)
            .fetch_one(pool)
            .await
            .expect("it counts");
        u64::try_from(count).unwrap_or(0)
    };
    let counts = &world.counts;
    counts.add(Class::Hang, met("%hang%").await);
    counts.add(Class::Panic, met("%panic%").await);
    counts.add(Class::ServerError, met("%status=500%").await);
    counts.add(Class::Slow, met("%delay=%").await);
    let query =
        sqlx::query_scalar("select count(*) from idempotency.record where key like 'brief-%'");
    let left: i64 = query.fetch_one(pool).await.expect("it counts");
    let answered = world.totals.brief.load(Ordering::Relaxed);
    let swept = answered.saturating_sub(u64::try_from(left).unwrap_or(0));
    counts.add(Class::Sweep, swept);
}

/// Invariant I-11, of the server: nothing open, and no more connections than there may be.
pub async fn hygiene(world: &World, pool: &PgPool) {
    const OPEN: &str = "
        select count(*) filter (where state like 'idle in transaction%'), count(*)
        from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
    let most = i64::from(CONNECTIONS) * i64::try_from(world.targets.len()).unwrap_or(0) + 8;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let counted = sqlx::query_as(OPEN).fetch_one(pool).await;
        let (open, all): (i64, i64) = counted.unwrap_or((-1, -1));
        if open == 0 && all <= most {
            return;
        }
        if Instant::now() > deadline {
            let text = format!("I-11: {open} transactions are open, {all} connections of {most}");
            return world.violated(text);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Breaks the record of an answer behind the layer's back.
///
/// # Errors
///
/// While the server is down, or before there is an answer.
pub async fn plant(plant: Plant, pool: &PgPool) -> Result<(), Box<dyn std::error::Error>> {
    const PICK: &str = "
        select id::text, answer from idempotency.record
        where state = 'completed' and key like $1 order by claimed_at desc limit 1";
    const CHANGE: &str = "update idempotency.record set answer = $2 where id = $1::uuid";
    const DELETE: &str = "delete from idempotency.record where id = $1::uuid";
    let picked = sqlx::query(PICK).bind(format!("{MARK}%"));
    let picked = picked.fetch_one(pool).await?;
    let (id, answer): (String, Vec<u8>) = (picked.try_get(0)?, picked.try_get(1)?);
    let query = match plant {
        Plant::DoubleEffect => return Ok(()),
        Plant::LostReply => sqlx::query(DELETE).bind(id),
        Plant::ChangedByte => {
            let envelope = Envelope::decode(&answer)?;
            let body = envelope.body().cloned().unwrap_or_default();
            let mut body = body.to_vec();
            // In the filling, which means nothing.
            let filling = body.windows(4).position(|bytes| bytes == b"xxxx");
            let Some(place) = filling else { return Ok(()) };
            body[place] ^= 1;
            let mut response = http::Response::new(body.into());
            *response.status_mut() = envelope.status();
            for (name, value) in envelope.headers() {
                response.headers_mut().append(name, value.clone());
            }
            sqlx::query(CHANGE)
                .bind(id)
                .bind(Envelope::new(response).encode())
        }
    };
    query.execute(pool).await?;
    Ok(())
}
