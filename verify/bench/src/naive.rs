//! The middleware that people write, in two orders, and a handler that does all of it in its transaction;
//! their table has the columns of this crate's.

use std::sync::atomic::Ordering;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http::request::Parts;
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use sqlx::PgPool;
use tower_idempotency::Envelope;

use crate::serve::App;

/// A key is all that identifies an operation, and the index on it all that finds it.
pub(crate) const SCHEMA: &str = "
create schema peer;
create table peer.record (like idempotency.record including defaults including compression);
alter table peer.record alter state type text, alter lost type text;
alter table peer.record add primary key (key);
";

const SELECT: &str = "select state, fingerprint, answer from peer.record where key = $1";

const INSERT: &str = "
insert into peer.record (id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at)
select gen_random_uuid(), $2, '', 'POST /charges', $1, 'running', gen_random_uuid(), 1, 'answer', $3,
    now, now + interval '30 s', now + interval '72 h', now + interval '72 h'
from (select clock_timestamp()) as clock (now)";

const INSERT_OR_NOTHING: &str = "
insert into peer.record (id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at)
select gen_random_uuid(), $2, '', 'POST /charges', $1, 'running', gen_random_uuid(), 1, 'answer', $3,
    now, now + interval '30 s', now + interval '72 h', now + interval '72 h'
from (select clock_timestamp()) as clock (now)
on conflict (key) do nothing";

const UPDATE: &str = "
update peer.record set state = 'completed', answer = $2 where key = $1 and state = 'running'";

const LOCK: &str = "
select pg_try_advisory_xact_lock(hashtextextended($1, 0)) as is_locked, state, fingerprint, answer
from (values ($1)) as wanted (key) left join peer.record using (key)";

const RECORD: &str = "
insert into peer.record (id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, answer)
select gen_random_uuid(), $2, '', 'POST /charges', $1, 'completed', gen_random_uuid(), 1, 'answer', $3,
    now, now, now + interval '72 h', now + interval '72 h', $4
from (select clock_timestamp()) as clock (now)";

type Found = (String, Vec<u8>, Option<Vec<u8>>);

/// Whether the lock is got, and what is found.
type Locked = (bool, Option<String>, Option<Vec<u8>>, Option<Vec<u8>>);

/// A request that was read.
struct Asked {
    pool: PgPool,
    parts: Parts,
    body: Bytes,
    key: String,
    digest: [u8; 32],
    fingerprint: [u8; 32],
}

pub(crate) async fn select_first(
    State(pool): State<PgPool>,
    request: Request,
    next: Next,
) -> Result<Response, StatusCode> {
    let asked = read(pool, request).await?;
    if let Some(found) = asked.find().await? {
        return asked.replay(found);
    }
    asked.insert(INSERT).await?;
    asked.execute(next).await
}

pub(crate) async fn insert_first(
    State(pool): State<PgPool>,
    request: Request,
    next: Next,
) -> Result<Response, StatusCode> {
    let asked = read(pool, request).await?;
    if asked.insert(INSERT_OR_NOTHING).await? == 1 {
        return asked.execute(next).await;
    }
    let found = asked.find().await?.ok_or(StatusCode::CONFLICT)?;
    asked.replay(found)
}

/// The least that keeps effects from being doubled: a lock, and the record last. A client that leaves drops
/// the transaction, and where the lookup came before another's commit, the handler runs, its record meets the
/// other's, all of it is rolled back, and the answer is a 500.
pub(crate) async fn one_transaction(
    State(app): State<App>,
    request: Request,
) -> Result<Response, StatusCode> {
    let asked = read(app.pool.clone(), request).await?;
    let mut transaction = asked.pool.begin().await.map_err(failed)?;
    let found: Locked = sqlx::query_as(LOCK)
        .bind(&asked.key)
        .fetch_one(&mut *transaction)
        .await
        .map_err(failed)?;
    match found {
        (_, Some(state), Some(fingerprint), answer) => {
            return asked.replay((state, fingerprint, answer));
        }
        (true, ..) => {}
        (false, ..) => return Err(StatusCode::CONFLICT),
    }
    app.runs.fetch_add(1, Ordering::SeqCst);
    app.insert(&mut transaction).await.map_err(failed)?;
    let answer = buffered(app.answer()).await?;
    let record = sqlx::query(RECORD)
        .bind(&asked.key)
        .bind(asked.digest.as_slice())
        .bind(asked.fingerprint.as_slice())
        .bind(Envelope::new(answer.clone()).encode());
    record.execute(&mut *transaction).await.map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    Ok(answer.map(Body::from))
}

async fn buffered(response: Response) -> Result<http::Response<Bytes>, StatusCode> {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(|_| StatusCode::BAD_GATEWAY)?;
    Ok(http::Response::from_parts(parts, body.to_bytes()))
}

async fn read(pool: PgPool, request: Request) -> Result<Asked, StatusCode> {
    let (parts, body) = request.into_parts();
    let key = parts.headers.get("idempotency-key");
    let key = key.and_then(|key| key.to_str().ok());
    let key = key.ok_or(StatusCode::BAD_REQUEST)?.to_owned();
    let body = to_bytes(body, 2 << 20).await;
    let body = body.map_err(|_| StatusCode::BAD_REQUEST)?;
    Ok(Asked {
        digest: Sha256::digest(&key).into(),
        fingerprint: Sha256::digest(&body).into(),
        pool,
        parts,
        body,
        key,
    })
}

impl Asked {
    async fn find(&self) -> Result<Option<Found>, StatusCode> {
        let query = sqlx::query_as(SELECT).bind(&self.key);
        query.fetch_optional(&self.pool).await.map_err(failed)
    }

    async fn insert(&self, sql: &'static str) -> Result<u64, StatusCode> {
        let query = sqlx::query(sql)
            .bind(&self.key)
            .bind(self.digest.as_slice())
            .bind(self.fingerprint.as_slice());
        let done = query.execute(&self.pool).await.map_err(failed)?;
        Ok(done.rows_affected())
    }

    async fn execute(self, next: Next) -> Result<Response, StatusCode> {
        let request = Request::from_parts(self.parts, Body::from(self.body));
        let answer = buffered(next.run(request).await).await?;
        let update = sqlx::query(UPDATE)
            .bind(&self.key)
            .bind(Envelope::new(answer.clone()).encode());
        update.execute(&self.pool).await.map_err(failed)?;
        Ok(answer.map(Body::from))
    }

    fn replay(&self, found: Found) -> Result<Response, StatusCode> {
        let (_, fingerprint, answer) = found;
        let answer = answer.ok_or(StatusCode::CONFLICT)?;
        if fingerprint != self.fingerprint {
            return Err(StatusCode::UNPROCESSABLE_ENTITY);
        }
        let answer = Envelope::decode(&answer).map_err(|_| StatusCode::BAD_GATEWAY)?;
        let mut response = Response::new(Body::from(answer.body().cloned().unwrap_or_default()));
        *response.status_mut() = answer.status();
        response
            .headers_mut()
            .extend(answer.headers().iter().cloned());
        Ok(response)
    }
}

fn failed(_: sqlx::Error) -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}
