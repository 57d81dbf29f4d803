//! What those that follow an attempt are told by it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{Attempt, Listed};
use crate::fingerprint::Fingerprint;
use crate::store::Existing;

/// How far an attempt has got.
#[derive(Debug, Clone)]
pub(crate) enum News {
    /// The store has not answered it yet.
    Asking,
    /// The record runs in another process, as the store said when it was asked at this moment; it will be
    /// asked again in a while.
    Elsewhere(Instant),
    /// It runs, and the record has its fingerprint.
    Running,
    /// The store answered this.
    Told(Said),
    /// Its own answer is in the record, as the store would show it.
    Recorded(Said),
    /// The store did not answer.
    Failed,
    /// It is known no longer what the record says.
    Over,
}

/// The clock of a store may be behind by as much: that of SQLite tells whole milliseconds.
const COARSENESS: Duration = Duration::from_millis(1);

/// What the store said, and when it was asked.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    pub(crate) existing: Arc<Existing>,
    pub(crate) asked: Instant,
}

impl Said {
    /// Whether it says as much to a request that came at this moment. Of a record that is not completed,
    /// only what was asked for later does; one that is stays as it is until its retention is over.
    pub(crate) fn holds_for(&self, arrived: Instant) -> bool {
        match &*self.existing {
            Existing::Completed(completed) => {
                self.asked.elapsed() + COARSENESS < completed.retention_left
            }
            _ => arrived <= self.asked,
        }
    }
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
            let waits = matches!(news, News::Elsewhere(_));
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
    pub(crate) fn elsewhere(&self, asked: Instant) {
        self.tell(News::Elsewhere(asked));
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
    pub(crate) fn told(self, said: Said) {
        self.end(News::Told(said));
    }

    /// It ends with its own answer, which the store has confirmed.
    pub(crate) fn recorded(self, said: Said) {
        self.end(News::Recorded(said));
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http::Response;

    use super::*;
    use crate::envelope::Envelope;
    use crate::extract::References;
    use crate::store::Completed;

    fn completed(retention_left: Duration) -> Said {
        Said {
            existing: Arc::new(Existing::Completed(Box::new(Completed {
                answer: Envelope::new(Response::new("made".into())),
                references: References::default(),
                expires_at: SystemTime::UNIX_EPOCH,
                retention_left,
            }))),
            asked: Instant::now(),
        }
    }

    #[test]
    fn an_answer_is_shared_until_its_retention_is_over() {
        assert!(completed(Duration::from_secs(60)).holds_for(Instant::now()));
        assert!(!completed(Duration::ZERO).holds_for(Instant::now()));
        assert!(!completed(COARSENESS).holds_for(Instant::now()));
    }

    #[test]
    fn what_may_have_changed_is_told_to_those_who_came_before_it_was_asked_for() {
        let before = Instant::now();
        let said = Said {
            existing: Arc::new(Existing::Held),
            asked: before + Duration::from_millis(1),
        };
        assert!(said.holds_for(before));
        assert!(!said.holds_for(before + Duration::from_millis(2)));
    }
}
