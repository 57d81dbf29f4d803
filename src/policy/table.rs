use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::Method;

use super::Policy;
use crate::error::ConfigError;
use crate::operation;

/// The policies of one layer: one for each named route, and one for all others.
#[derive(Debug, Clone)]
pub(crate) struct PolicyTable {
    pub(crate) default: Arc<Policy>,
    routes: HashMap<String, Arc<Policy>>,
    /// All methods that one of them covers: a request of another one passes without a look at them.
    methods: Vec<Method>,
}

impl PolicyTable {
    pub(crate) fn new(default: Policy) -> Self {
        Self::of(Arc::new(default), HashMap::new())
    }

    fn of(default: Arc<Policy>, routes: HashMap<String, Arc<Policy>>) -> Self {
        let mut methods: Vec<Method> = Vec::new();
        for policy in routes.values().chain([&default]) {
            let others = policy
                .methods
                .iter()
                .filter(|method| !methods.contains(method));
            methods.extend(others.cloned().collect::<Vec<_>>());
        }
        Self {
            default,
            routes,
            methods,
        }
    }

    pub(crate) fn covers(&self, method: &Method) -> bool {
        self.methods.contains(method)
    }

    pub(crate) fn for_operation(&self, operation: &str) -> &Arc<Policy> {
        self.routes.get(operation).unwrap_or(&self.default)
    }
}

/// The policies of a running layer, to be changed while it runs.
///
/// A request reads its policy once, when it arrives, and settles under it.
///
/// ```
/// use tower_idempotency::{Duplicates, IdempotencyLayer, MemoryStore, Policy, Scope};
/// use std::time::Duration;
///
/// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
/// let policies = layer.policies();
/// // Later, from an admin endpoint, for every service this layer made:
/// policies.replace_default(Policy::high().with_duplicates(Duplicates::Wait(Duration::from_secs(2))))?;
/// policies.replace_route("POST /orders/{id}/cancel", Policy::medium())?;
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
pub struct PolicyHandle {
    table: Arc<ArcSwap<PolicyTable>>,
    store_is_durable: bool,
}

impl PolicyHandle {
    pub(crate) fn new(default: Policy, store_is_durable: bool) -> Self {
        Self {
            table: Arc::new(ArcSwap::from_pointee(PolicyTable::new(default))),
            store_is_durable,
        }
    }

    /// A handle of its own, with the same policies.
    pub(crate) fn forked(&self) -> Self {
        Self {
            table: Arc::new(ArcSwap::new(self.table.load_full())),
            store_is_durable: self.store_is_durable,
        }
    }

    pub(crate) fn load(&self) -> arc_swap::Guard<Arc<PolicyTable>> {
        self.table.load()
    }

    /// Replaces the policy of every route that has none of its own.
    ///
    /// # Errors
    ///
    /// Settings that cannot work; the old policy stays in force.
    pub fn replace_default(&self, policy: Policy) -> Result<(), ConfigError> {
        policy.validate(self.store_is_durable)?;
        let policy = Arc::new(policy);
        let replaced =
            |table: &Arc<PolicyTable>| PolicyTable::of(policy.clone(), table.routes.clone());
        self.table.rcu(replaced);
        Ok(())
    }

    /// Replaces, or adds, the policy of one route, written as in
    /// [`IdempotencyLayer::with_route`](crate::IdempotencyLayer::with_route).
    ///
    /// # Errors
    ///
    /// Settings that cannot work, a route that is not `METHOD /template`, or a policy that does not
    /// cover its method; nothing is changed.
    pub fn replace_route(&self, route: &str, policy: Policy) -> Result<(), ConfigError> {
        let (method, operation) = operation::of_route(route)?;
        policy.validate(self.store_is_durable)?;
        if !policy.methods.is_empty() && !policy.covers(&method) {
            let reason = format!(
                "is {method}, which its policy does not cover: add with_methods([Method::{method}]), or with_methods([]) to take the route out"
            );
            return Err(ConfigError::new("route", reason));
        }
        let policy = Arc::new(policy);
        self.table.rcu(|table| {
            let mut routes = table.routes.clone();
            routes.insert(operation.clone(), policy.clone());
            PolicyTable::of(table.default.clone(), routes)
        });
        Ok(())
    }
}
