//! What those that follow an attempt are told by it.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Attempt, Listed};
use crate::fingerprint::Fingerprint;
use crate::store::Existing;

/// How far an attempt has got.
#[derive(Debug, Clone)]
pub(crate) enum News {
    /// The store has not answered it yet.
    Asking,
    /// The record runs in another process; the store will be asked again in a while.
    Elsewhere,
    /// It runs, and the record has its fingerprint.
    Running,
    /// The store answered this.
    Told(Arc<Existing>),
    /// Its own answer is in the record, as the store would show it.
    Recorded(Arc<Existing>),
    /// The store did not answer.
    Failed,
    /// It is known no longer what the record says.
    Over,
}

/// An attempt to follow.
#[derive(Debug)]
pub(crate) struct Leader {
    pub(crate) fingerprint: Fingerprint,
    news: watch::Receiver<News>,
}

impl Leader {
    pub(super) fn new(attempt: &Attempt) -> Self {
        Self {
            fingerprint: attempt.fingerprint.clone(),
            news: attempt.news.subscribe(),
        }
    }

    pub(crate) fn news(&mut self) -> News {
        self.news.borrow_and_update().clone()
    }

    /// Until there is other news than was last seen; `false` when there will be none.
    pub(crate) async fn changed(&mut self) -> bool {
        self.news.changed().await.is_ok()
    }
}

impl Attempt {
    /// Somebody new wants to know, and what the store said last may have changed since.
    pub(super) fn want(&self) {
        let wanted = self.news.send_if_modified(|news| {
            let waits = matches!(news, News::Elsewhere);
            if waits {
                *news = News::Asking;
            }
            waits
        });
        if wanted {
            self.wanted.notify_one();
        }
    }
}

impl Listed {
    /// The record runs in another process, and the store will be asked again.
    pub(crate) fn elsewhere(&self) {
        self.tell(News::Elsewhere);
    }

    /// Asks again; `false` if it is not the one to ask, since another attempt of this process runs, or
    /// nobody follows this one.
    pub(crate) fn asks_again(&self) -> bool {
        self.tell(News::Asking);
        let attempts = self.running.lock();
        let Some(attempt) = attempts.by_token.get(&self.token) else {
            return false;
        };
        let passed_by = attempts.in_place_of(&attempt.identity, &attempt.fingerprint);
        passed_by.is_none() && attempts.asking.get(&attempt.identity) == Some(&self.token)
    }

    /// Until somebody comes who wants to know at once.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// It ends with what the store said.
    pub(crate) fn told(self, existing: Arc<Existing>) {
        self.end(News::Told(existing));
    }

    /// It ends with its own answer, which the store has confirmed.
    pub(crate) fn recorded(self, completed: Arc<Existing>) {
        self.end(News::Recorded(completed));
    }

    /// It ends because the store did not answer.
    pub(crate) fn failed(self) {
        self.end(News::Failed);
    }

    /// Who comes from now on does not find it; who follows it is told.
    fn end(self, news: News) {
        let attempt = self.running.lock().remove(self.token);
        if let Some(attempt) = attempt {
            attempt.news.send_replace(news);
        }
    }

    fn tell(&self, news: News) {
        let attempts = self.running.lock();
        if let Some(attempt) = attempts.by_token.get(&self.token) {
            attempt.news.send_replace(news);
        }
    }
}
