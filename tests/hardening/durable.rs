//! Which databases survive the process.

use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use tower_idempotency::{SqliteStore, Store};

#[tokio::test]
async fn a_database_in_memory_by_its_mode_is_not_durable() {
    for url in [
        "sqlite::memory:",
        "sqlite://orders?mode=memory",
        "sqlite:orders?mode=memory&cache=shared",
    ] {
        let options: SqliteConnectOptions = url.parse().unwrap();
        let pool = SqlitePoolOptions::new()
            .connect_with(options)
            .await
            .unwrap();
        assert!(!SqliteStore::new(pool).is_durable(), "{url}");
    }
    let options = SqliteConnectOptions::new()
        .filename("orders")
        .in_memory(true);
    let pool = SqlitePoolOptions::new()
        .connect_with(options)
        .await
        .unwrap();
    assert!(!SqliteStore::new(pool).is_durable());
}
