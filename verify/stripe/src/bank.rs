use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use serde::Serialize;
use tokio::sync::oneshot;

/// Whoever an API key belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Account(String);

impl Account {
    pub(crate) fn new(name: &str) -> Self {
        Self(name.to_owned())
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

/// When a connection is closed in place of an answer.
#[derive(Debug)]
pub(crate) enum Loss {
    /// `answer`: once the handler has answered.
    Answer,
    /// `waiting`: once the handler has started, which this says.
    Waiting(oneshot::Receiver<()>),
}

/// What one account has sent, and what came of it.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Seen {
    /// Charges that were sent, with every retry.
    requests: u32,
    /// Those which were answered with 409.
    conflicts: u32,
    /// Runs of the handler.
    runs: u32,
}

/// What is known of every account.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bank(Arc<Mutex<HashMap<Account, Books>>>);

#[derive(Debug, Default)]
struct Books {
    seen: Seen,
    loss: Option<Loss>,
    started: Option<oneshot::Sender<()>>,
}

impl Bank {
    /// Counts a request, and says whether its connection is to be lost.
    pub(crate) fn request(&self, account: &Account) -> Option<Loss> {
        let mut all = self.lock();
        let books = all.entry(account.clone()).or_default();
        books.seen.requests += 1;
        books.loss.take()
    }

    pub(crate) fn answered(&self, account: &Account, status: StatusCode) {
        if status == StatusCode::CONFLICT {
            let mut all = self.lock();
            all.entry(account.clone()).or_default().seen.conflicts += 1;
        }
    }

    /// Counts a run, and gives it a number that no other run has.
    pub(crate) fn run(&self, account: &Account) -> u32 {
        let mut all = self.lock();
        let books = all.entry(account.clone()).or_default();
        books.seen.runs += 1;
        if let Some(started) = books.started.take() {
            // Nobody waits for it once the request has been answered otherwise.
            let _ = started.send(());
        }
        all.values().map(|books| books.seen.runs).sum()
    }

    /// Has the account's next connection closed; false when there is no such moment.
    pub(crate) fn arm(&self, account: &Account, moment: &str) -> bool {
        let mut all = self.lock();
        let books = all.entry(account.clone()).or_default();
        books.loss = match moment {
            "answer" => Some(Loss::Answer),
            "waiting" => {
                let (sender, receiver) = oneshot::channel();
                books.started = Some(sender);
                Some(Loss::Waiting(receiver))
            }
            _ => return false,
        };
        true
    }

    pub(crate) fn seen(&self, account: &Account) -> Seen {
        let all = self.lock();
        all.get(account).map(|books| books.seen).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Account, Books>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
