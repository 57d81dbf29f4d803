use std::time::Duration;

use sqlx::PgPool;
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::{PgStore, Store};

use crate::common::database::TestDatabase;

/// Every time of every record, set back by so many seconds.
pub const AGE: &str = "
update idempotency.record set
    claimed_at = claimed_at - make_interval(secs => $1),
    leased_until = leased_until - make_interval(secs => $1),
    expires_at = expires_at - make_interval(secs => $1),
    sweep_at = sweep_at - make_interval(secs => $1)";

pub struct Postgres {
    store: PgStore,
    pub pool: PgPool,
    _database: TestDatabase,
}

impl Postgres {
    pub async fn new() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(1).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            _database: database,
        }
    }
}

impl Subject for Postgres {
    type Store = PgStore;

    fn store(&self) -> &PgStore {
        &self.store
    }

    async fn age(&self, by: Duration) {
        let age = sqlx::query(AGE).bind(by.as_secs_f64());
        age.execute(&self.pool).await.unwrap();
    }
}

mod rules {
    tower_idempotency::conformance_tests!(super::Postgres::new().await);
}

#[tokio::test]
async fn postgres_is_durable() {
    let pool = sqlx::postgres::PgPoolOptions::new();
    let pool = pool.connect_lazy("postgres://localhost/none").unwrap();
    assert!(PgStore::new(pool).is_durable());
}
