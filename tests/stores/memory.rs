use std::time::Duration;

use tower_idempotency::store::conformance::Subject;
use tower_idempotency::{MemoryStore, Store};

pub struct Memory(MemoryStore);

impl Memory {
    pub fn new() -> Self {
        Self(MemoryStore::new())
    }
}

impl Subject for Memory {
    type Store = MemoryStore;

    fn store(&self) -> &MemoryStore {
        &self.0
    }

    async fn age(&self, by: Duration) {
        self.0.advance(by);
    }
}

mod rules {
    tower_idempotency::conformance_tests!(super::Memory::new());
}

#[test]
fn memory_is_not_durable() {
    assert!(!MemoryStore::new().is_durable());
}
