use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// The task that runs a keyed request to its end, whether or not its client waits for it.
///
/// A [spawn hook](crate::IdempotencyLayer::with_spawn_hook) may wrap it.
pub struct Detached(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Detached {
    /// A task made of a future; for hooks that wrap the one they are given.
    pub fn new(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Box::pin(future))
    }
}

impl Future for Detached {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

impl fmt::Debug for Detached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Detached")
    }
}

/// Called where the request is, before its task is spawned.
#[derive(Clone, Default)]
pub(crate) struct SpawnHook(Option<Arc<Hook>>);

type Hook = dyn Fn(Detached) -> Detached + Send + Sync;

impl SpawnHook {
    pub(crate) fn new(hook: impl Fn(Detached) -> Detached + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    pub(crate) fn apply(&self, task: Detached) -> Detached {
        match &self.0 {
            Some(hook) => hook(task),
            None => task,
        }
    }
}

impl fmt::Debug for SpawnHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SpawnHook").field(&self.0.is_some()).finish()
    }
}
