//! A fresh PostgreSQL database for one test, dropped with the value.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a helper of tests, which fail by panicking; not every test uses all of it"
)]

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection};
use tokio::runtime::{Builder, Handle, RuntimeFlavor};

const NEEDED: &str = "this test needs PostgreSQL: run ./scripts/test, or set DATABASE_URL to a \
                      server on which databases may be created";

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct TestDatabase {
    /// Where the new database is.
    pub url: String,
    /// Its name on the server.
    pub name: String,
    /// What `DATABASE_URL` says: from there, databases are created and dropped.
    server_url: String,
}

impl TestDatabase {
    /// # Panics
    ///
    /// Without a server on which databases may be created.
    pub async fn create() -> Self {
        static COUNTER: AtomicU64 = AtomicU64::new(0);

        let server_url = env::var("DATABASE_URL")
            .ok()
            .filter(|url| !url.is_empty())
            .unwrap_or_else(|| panic!("{NEEDED} (DATABASE_URL is not set)"));
        let name = format!(
            "ti_test_{}_{}_{:016x}",
            process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed),
            RandomState::new().hash_one(()),
        );

        // Nothing can be connected to template0, and so nothing can be in the way.
        let create = format!(r#"create database "{name}" template template0"#);
        if let Err(error) = execute(&server_url, create).await {
            panic!("{NEEDED} ({error})");
        }
        Self {
            url: with_database(&server_url, &name),
            name,
            server_url,
        }
    }

    pub async fn pool(&self, max: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(max)
            .acquire_timeout(PATIENCE)
            .connect(&self.url)
            .await
            .expect("a database which was just created accepts connections")
    }
}

/// What the README says that a service needs, and less than others have: the server does not tell it of sessions.
/// Databases may create it at once.
const SERVICE: &str = "
do $$
begin
    create role ti_test_service nologin;
exception
    when duplicate_object or unique_violation then null;
end
$$;
grant usage on schema idempotency to ti_test_service;
grant select, insert, update, delete on all tables in schema idempotency to ti_test_service;
revoke select on pg_catalog.pg_stat_activity from public";

impl TestDatabase {
    /// Connections with the rights of a service in a database that somebody else has migrated. The role cannot
    /// log in, and stays behind.
    ///
    /// # Panics
    ///
    /// Where no roles may be created.
    pub async fn service_pool(&self, max: u32) -> PgPool {
        if let Err(error) = execute(&self.url, SERVICE.to_owned()).await {
            panic!("{NEEDED}, by a superuser ({error})");
        }
        let options: PgConnectOptions = self.url.parse().unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(max)
            .acquire_timeout(PATIENCE)
            .connect_with(options.options([("role", "ti_test_service")]))
            .await
            .unwrap();
        let refused = sqlx::query("select from pg_catalog.pg_stat_activity");
        let refused = refused.execute(&pool).await.unwrap_err();
        assert!(refused.to_string().contains("permission denied"));
        pool
    }
}

/// As good as it gets: a database which is left behind goes with the server of `./scripts/test`.
impl Drop for TestDatabase {
    fn drop(&mut self) {
        let server_url = self.server_url.clone();
        let name = self.name.clone();
        let (done, dropped) = mpsc::channel();
        // Its own thread and runtime: a runtime cannot block on another one, and the test's may be
        // shutting down.
        thread::spawn(move || {
            let drop = format!(r#"drop database if exists "{name}" with (force)"#);
            let result = Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| error.to_string())
                .and_then(|runtime| runtime.block_on(execute(&server_url, drop)));
            if let Err(error) = result {
                eprintln!("could not drop the database {name}: {error}");
            }
            let _ = done.send(());
        });
        // PostgreSQL drops a database only after every connection which is being authenticated has
        // got further, and that may be one of the runtime in which this waits: so leave it its
        // workers where it has several, and do not wait for ever.
        let wait = move || {
            let _ = dropped.recv_timeout(Duration::from_secs(3));
        };
        match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
            Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
            _ => wait(),
        }
    }
}

async fn execute(url: &str, sql: String) -> Result<(), String> {
    let executing = async {
        let mut connection = PgConnection::connect(url).await?;
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await?;
        connection.close().await
    };
    tokio::time::timeout(PATIENCE, executing)
        .await
        .map_err(|_| format!("no answer within {PATIENCE:?}"))?
        .map_err(|error| error.to_string())
}

/// The URL with another database; all else in it stays as it is.
fn with_database(url: &str, name: &str) -> String {
    let (base, query) = match url.split_once('?') {
        Some((base, query)) => (base, format!("?{query}")),
        None => (url, String::new()),
    };
    let authority = base.find("://").map_or(0, |at| at + 3);
    let end = base[authority..]
        .find('/')
        .map_or(base.len(), |at| authority + at);
    format!("{}/{name}{query}", &base[..end])
}
