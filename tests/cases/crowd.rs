//! Many requests at once, of which it is known when all of them wait.

#![allow(
    dead_code,
    reason = "not every test that includes this file asks for everything"
)]

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use futures_util::future::{AbortHandle, Abortable};
use tokio::sync::Semaphore;
use tower_idempotency::{Detached, IdempotencyLayer, Mode, Store};

use crate::site::{Answer, PATIENCE, Sent, Site};

/// The tasks of a layer's requests.
#[derive(Clone)]
pub struct Crowd {
    begun: Arc<Semaphore>,
    aborts: Arc<Mutex<Vec<AbortHandle>>>,
}

impl Crowd {
    /// Watches the tasks of a layer.
    pub fn of<S: Store, M: Mode<S>>(
        layer: IdempotencyLayer<S, M>,
    ) -> (Self, IdempotencyLayer<S, M>) {
        let crowd = Self {
            begun: Arc::new(Semaphore::new(0)),
            aborts: Arc::default(),
        };
        let watching = crowd.clone();
        let layer = layer.with_spawn_hook(move |task| watching.watch(task));
        (crowd, layer)
    }

    fn watch(&self, task: Detached) -> Detached {
        let (abort, registration) = AbortHandle::new_pair();
        self.aborts.lock().unwrap().push(abort);
        let begun = self.begun.clone();
        let task = async move {
            let mut task = pin!(task);
            let mut is_first = true;
            poll_fn(|context| {
                let polled = task.as_mut().poll(context);
                if std::mem::take(&mut is_first) {
                    begun.add_permits(1);
                }
                polled
            })
            .await;
        };
        Detached::new(async move {
            // Whether it was aborted is the test's own business.
            let _ = Abortable::new(task, registration).await;
        })
    }

    /// Until as many more tasks have begun, and gone as far as they get at once.
    pub async fn waits(&self, count: u32) {
        let begun = tokio::time::timeout(PATIENCE, self.begun.acquire_many(count)).await;
        begun.expect("all have begun").unwrap().forget();
    }

    /// How many tasks there were.
    pub fn len(&self) -> usize {
        self.aborts.lock().unwrap().len()
    }

    /// Drops a task, in the order in which they were made.
    pub fn abort(&self, number: usize) {
        self.aborts.lock().unwrap()[number].abort();
    }
}

/// The answers to one request, sent as often at once.
pub async fn storm(site: &Site, count: usize, sent: Sent) -> Vec<Answer> {
    let requests = (0..count).map(|_| site.send(sent.clone()));
    futures_util::future::join_all(requests).await
}
