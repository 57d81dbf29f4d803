//! Writes that are safe to repeat without an idempotency key, and where each of them ends.
//!
//! | pattern | no key needed when | still needed when |
//! |---|---|---|
//! | [`register`]: natural uniqueness | the row has a name of its own, and a retry may find it there | the retry must get the *first answer*, byte for byte, or other effects follow |
//! | [`set_address`]: upsert | the request says the whole new state, and the last write may win | a late retry must not undo a newer write |
//! | [`apply_delta`]: the change has a name | the change is one transaction of one database | the handler does anything outside it |
//!
//! A fourth is in `examples/payments/states.rs`: a step from one state to the next, taken by the one
//! statement that finds the state to be legal.
//!
//! `cargo run --example patterns` runs each of them twice.

use std::error::Error;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Row, SqlitePool};

type BoxError = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let file = std::env::temp_dir().join(format!("patterns-{}.db", std::process::id()));
    let pool = open(SqliteConnectOptions::new().filename(&file)).await?;
    for time in ["first", "again"] {
        let account = register(&pool, "acme", "ada@example.com").await?;
        let address = set_address(&pool, account.id, "12 St James's Square").await?;
        let balance = apply_delta(&pool, account.id, "payout-4711", 500).await?;
        println!("{time}: {account:?}, lives at {address}, has {balance:?}");
    }
    pool.close().await;
    Ok(std::fs::remove_file(file)?)
}

async fn open(file: SqliteConnectOptions) -> Result<SqlitePool, BoxError> {
    let file = file
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    let pool = SqlitePoolOptions::new().connect_with(file).await?;
    for table in [
        "create table if not exists account (
            id integer primary key,
            tenant text not null,
            email text not null,
            balance integer not null default 0,
            unique (tenant, email)
        )",
        "create table if not exists home (
            account integer primary key references account,
            address text not null
        )",
        "create table if not exists change (
            account integer not null references account,
            key text not null,
            amount integer not null,
            balance integer not null,
            primary key (account, key)
        )",
    ] {
        sqlx::query(table).execute(&pool).await?;
    }
    Ok(pool)
}

#[derive(Debug, Clone, PartialEq)]
struct Account {
    id: i64,
    is_new: bool,
}

/// Natural uniqueness: the world allows one account for each address, and so does the table.
///
/// The constraint decides, not a look before the insert: between the two, another may insert. It
/// holds for ever, where an idempotency key expires. A welcome mail would be sent once for each
/// `is_new`, and never if the process dies between the two: that is where a key comes in.
async fn register(pool: &SqlitePool, tenant: &str, email: &str) -> sqlx::Result<Account> {
    let insert = "insert into account (tenant, email) values (?, ?)
        on conflict (tenant, email) do nothing returning id";
    let query = sqlx::query(insert).bind(tenant).bind(email);
    if let Some(row) = query.fetch_optional(pool).await? {
        let id = row.try_get("id")?;
        return Ok(Account { id, is_new: true });
    }
    let select = "select id from account where tenant = ? and email = ?";
    let query = sqlx::query(select).bind(tenant).bind(email);
    let id = query.fetch_one(pool).await?.try_get("id")?;
    Ok(Account { id, is_new: false })
}

/// Upsert: the request says what is to be true, not what to do. `PUT` means this.
///
/// Twice is as good as once, as long as nobody else writes in between: a retry that comes late puts
/// the old address back. Where that matters, let the client send the version it has seen (`If-Match`).
async fn set_address(pool: &SqlitePool, account: i64, address: &str) -> sqlx::Result<String> {
    let upsert = "insert into home (account, address) values (?, ?)
        on conflict (account) do update set address = excluded.address returning address";
    let query = sqlx::query(upsert).bind(account).bind(address);
    query.fetch_one(pool).await?.try_get("address")
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq)]
enum Applied {
    /// The balance right after it, also when it is asked for again.
    Balance(i64),
    /// Another amount was applied under this key.
    Mismatch,
}

/// A change that must not be made twice (`balance = balance + ?`) gets a name, kept beside it in the
/// same transaction. The row of the change is what an idempotency record is elsewhere: it says that
/// it was done, with what, and what came of it. It needs no lease, for a dead process leaves nothing.
async fn apply_delta(
    pool: &SqlitePool,
    account: i64,
    key: &str,
    amount: i64,
) -> sqlx::Result<Applied> {
    // Writes from its first statement on: two at once wait for each other.
    let mut transaction = pool.begin_with("begin immediate").await?;
    let select = "select amount, balance from change where account = ? and key = ?";
    let query = sqlx::query(select).bind(account).bind(key);
    if let Some(row) = query.fetch_optional(&mut *transaction).await? {
        let is_same = row.try_get::<i64, _>("amount")? == amount;
        let balance = row.try_get("balance")?;
        return Ok(if is_same {
            Applied::Balance(balance)
        } else {
            Applied::Mismatch
        });
    }
    let update = "update account set balance = balance + ? where id = ? returning balance";
    let query = sqlx::query(update).bind(amount).bind(account);
    let balance: i64 = query
        .fetch_one(&mut *transaction)
        .await?
        .try_get("balance")?;
    let insert = "insert into change (account, key, amount, balance) values (?, ?, ?, ?)";
    let query = sqlx::query(insert).bind(account).bind(key);
    query
        .bind(amount)
        .bind(balance)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(Applied::Balance(balance))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::task::JoinSet;

    use super::*;

    /// A database file of its own for each test.
    struct Database(SqlitePool, PathBuf);

    impl Database {
        async fn new() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("patterns-test-{}-{count}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            let file = SqliteConnectOptions::new().filename(directory.join("test.db"));
            Self(open(file).await.unwrap(), directory)
        }
    }

    impl Drop for Database {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.1));
        }
    }

    async fn at_once<T, F>(run: impl Fn(usize) -> F) -> Vec<T>
    where
        T: Send + 'static,
        F: Future<Output = sqlx::Result<T>> + Send + 'static,
    {
        let tasks: JoinSet<_> = (0..20).map(run).collect();
        let results = tasks.join_all().await.into_iter();
        results.collect::<sqlx::Result<_>>().unwrap()
    }

    async fn number(pool: &SqlitePool, select: &'static str) -> i64 {
        sqlx::query_scalar(select).fetch_one(pool).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_many_registrations_at_once_one_makes_the_account_and_all_get_it() {
        let database = Database::new().await;
        let pool = database.0.clone();
        let accounts = at_once(|_| {
            let pool = pool.clone();
            async move { register(&pool, "acme", "ada@example.com").await }
        });
        let accounts = accounts.await;
        assert_eq!(accounts.iter().filter(|account| account.is_new).count(), 1);
        assert!(accounts.iter().all(|account| account.id == accounts[0].id));
        assert_eq!(number(&pool, "select count(*) from account").await, 1);
    }

    #[tokio::test]
    async fn two_tenants_may_register_one_address() {
        let Database(pool, _) = &Database::new().await;
        assert!(
            register(pool, "acme", "ada@example.com")
                .await
                .unwrap()
                .is_new
        );
        assert!(
            register(pool, "globex", "ada@example.com")
                .await
                .unwrap()
                .is_new
        );
    }

    #[tokio::test]
    async fn an_address_that_is_set_twice_is_as_if_it_was_set_once() {
        let Database(pool, _) = &Database::new().await;
        let account = register(pool, "acme", "ada@example.com").await.unwrap().id;
        for _ in 0..2 {
            assert_eq!(set_address(pool, account, "here").await.unwrap(), "here");
        }
        assert_eq!(number(pool, "select count(*) from home").await, 1);
    }

    #[tokio::test]
    async fn a_late_retry_of_an_upsert_undoes_a_newer_write() {
        let Database(pool, _) = &Database::new().await;
        let account = register(pool, "acme", "ada@example.com").await.unwrap().id;
        for address in ["old", "new", "old"] {
            set_address(pool, account, address).await.unwrap();
        }
        let select = "select count(*) from home where address = 'old'";
        assert_eq!(number(pool, select).await, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_many_changes_of_one_name_at_once_one_is_made_and_all_get_its_balance() {
        let database = Database::new().await;
        let pool = database.0.clone();
        let account = register(&pool, "acme", "ada@example.com").await.unwrap().id;
        let applied = at_once(|_| {
            let pool = pool.clone();
            async move { apply_delta(&pool, account, "payout-1", 500).await }
        });
        assert_eq!(applied.await, vec![Applied::Balance(500); 20]);
        assert_eq!(number(&pool, "select balance from account").await, 500);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn changes_of_different_names_are_all_made() {
        let database = Database::new().await;
        let pool = database.0.clone();
        let account = register(&pool, "acme", "ada@example.com").await.unwrap().id;
        let applied = at_once(|i| {
            let pool = pool.clone();
            async move { apply_delta(&pool, account, &format!("payout-{i}"), 5).await }
        });
        assert_eq!(applied.await.len(), 20);
        assert_eq!(number(&pool, "select balance from account").await, 100);
    }

    #[tokio::test]
    async fn a_retry_gets_the_balance_of_its_time_and_another_amount_is_refused() {
        let Database(pool, _) = &Database::new().await;
        let account = register(pool, "acme", "ada@example.com").await.unwrap().id;
        let apply = |key, amount| apply_delta(pool, account, key, amount);
        assert_eq!(apply("a", 5).await.unwrap(), Applied::Balance(5));
        assert_eq!(apply("b", 2).await.unwrap(), Applied::Balance(7));
        assert_eq!(apply("a", 5).await.unwrap(), Applied::Balance(5));
        assert_eq!(apply("a", 6).await.unwrap(), Applied::Mismatch);
        assert_eq!(number(pool, "select balance from account").await, 7);
    }
}
