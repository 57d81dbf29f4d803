//! A schema of one version or another.

use std::path::Path;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, Connection as _, SqlSafeStr as _};
use tower_idempotency::PgStore;

use crate::fired::fired;

/// Which schema there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// None at all.
    None,
    /// What the last version of the crate made.
    Older,
    /// What this one makes.
    Current,
    /// What a later one may make: like all upgrades, it only adds to what there is.
    Newer,
}

/// A column with its index, as they were added before.
const LATER: &str = "
alter table idempotency.record add column if not exists later text;
create index if not exists record_later on idempotency.record (id) where later is not null;";

/// Makes it, as a process of that version does when it starts, and sees that it is there.
///
/// # Panics
///
/// When it cannot be made.
pub async fn put(url: &str, version: Version) {
    let files = files();
    let current = files.len();
    let versions = match version {
        Version::None => 0,
        Version::Older => migrate(url, &files[..current - 1]).await,
        Version::Current => {
            let pool = PgPool::connect(url).await.expect("it is there");
            PgStore::new(pool).migrate().await.expect("it is made");
            current
        }
        Version::Newer => {
            let mut files = files;
            files.push(("later".to_owned(), LATER.to_owned()));
            migrate(url, &files).await
        }
    };
    assert_eq!(versions_of(url).await, versions);
    fired(&format!("schema {version:?}").to_lowercase());
}

/// The files of the crate, by their numbers, with their names.
fn files() -> Vec<(String, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations/postgres");
    let files = std::fs::read_dir(directory).expect("the crate is there");
    let mut files: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    files.sort();
    let read = |path: &std::path::PathBuf| {
        let name = path.file_stem().expect("a name").to_string_lossy();
        let (_, name) = name.split_once('_').expect("a number and a name");
        let sql = std::fs::read_to_string(path).expect("it can be read");
        (name.replace('_', " "), sql)
    };
    files.iter().map(read).collect()
}

/// As [`PgStore::migrate`] does it. How many there are.
async fn migrate(url: &str, files: &[(String, String)]) -> usize {
    let migration = |(version, (name, sql)): (i64, &(String, String))| {
        let sql = AssertSqlSafe(sql.clone()).into_sql_str();
        let kind = MigrationType::Simple;
        Migration::new(version, name.clone().into(), kind, sql, false)
    };
    let migrations = (1..).zip(files).map(migration).collect();
    let mut migrator = Migrator::with_migrations(migrations);
    migrator.create_schema("idempotency");
    migrator.dangerous_set_table_name("idempotency._migrations");
    let mut connection = PgConnection::connect(url).await.expect("it is there");
    let migrated = migrator.run_direct(None, &mut connection, false).await;
    migrated.expect("it can be migrated");
    files.len()
}

async fn versions_of(url: &str) -> usize {
    const THERE: &str = "select to_regclass('idempotency._migrations') is not null";
    let mut connection = PgConnection::connect(url).await.expect("it is there");
    let there = sqlx::query_scalar(THERE).fetch_one(&mut connection).await;
    let there: bool = there.expect("it can be asked");
    if !there {
        return 0;
    }
    let count = sqlx::query_scalar("select count(*) from idempotency._migrations");
    let count: i64 = count.fetch_one(&mut connection).await.expect("it is there");
    usize::try_from(count).expect("a small number")
}
