//! An operation whose writes, messages and answer commit in one transaction.

use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use axum_core::body::Body;
use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::time::timeout;
use tower_service::Service;

use super::execute::Ended;
use super::follow::Entered;
use super::open::{Opening, Way};
use super::settle::Write;
use super::{Exchange, Reply};
use crate::backoff::Backoff;
use crate::body::Whole;
use crate::extract::{IdempotencyContext, References, Standing};
use crate::policy::{Disposition, Ending, Lost, Policy, TransactionalDisposition};
use crate::rejection::{Code, Rejection};
use crate::stats::Event;
use crate::store::transaction::Slot;
use crate::store::{
    ClaimRequest, Claimed, CommitError, Completion, Entry, Existing, StoreError, StoreErrorKind,
    Token, TransactionalStore, Verdict, Writes,
};

/// What became of one run.
enum Finished<E, T> {
    Answer(Result<Response<Body>, E>),
    /// The answer is committed, until this end of its retention.
    Recorded(Result<Response<Body>, E>, Completion, SystemTime),
    /// Everything is rolled back, and another run may succeed.
    Conflict(Code),
    /// Nobody is to run it again: the handler has held its key, or has ended the transaction, and may have
    /// committed. A transaction that is still open keeps others out until that is recorded.
    ToHold(Result<Response<Body>, E>, Option<T>, References),
}

impl<S: TransactionalStore> Exchange<S> {
    /// # Cancel safety
    ///
    /// Runs in the detached task. Where the process ends before the commit, the server rolls back;
    /// where it ends after it, a retry finds the record.
    pub(crate) async fn run_transaction<I, B>(
        &self,
        mut inner: I,
        parts: Parts,
        body: Whole,
        mut reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>> + Clone,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut reruns = self.policy.reruns;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(250));
        loop {
            let Ok(token) = Token::random() else {
                let rejection = Rejection::new(Code::StoreUnavailable);
                return reply.send(Ok(self.reject(rejection)));
            };
            let mut opening = Opening::new(self, token);
            let (transaction, listed) = match self.enter(token, &mut opening, &mut reply).await {
                Entered::Granted(Way::Open(transaction), listed) => (transaction, listed),
                Entered::Granted(Way::Abandoned(grant), listed) => {
                    return self.answer_lost(grant, listed, reply).await;
                }
                Entered::Existing(existing) => {
                    return reply.send(Ok(self.answer_existing(&existing)));
                }
                Entered::Down(error) => return reply.send(Ok(self.transaction_down(&error))),
            };
            listed.confirm();
            let Opening { attempt, sent, .. } = opening;
            if reruns == self.policy.reruns {
                self.count(Event::Executed);
            }
            let slot = Slot::new(transaction);
            let context = IdempotencyContext::new(self.identity.clone(), 1, Standing::Transaction);
            let mut request = Request::from_parts(parts.clone(), body.clone().into_body());
            self.prepare(&mut request, &context, true);
            request.extensions_mut().insert(slot.clone());
            let limit = self.policy.execution_limit.unwrap_or(S::EXECUTION_LIMIT);
            // The one that was polled ready; another run needs a clone, which is not.
            let again = inner.clone();
            let ended = self.perform(inner, request, limit).await;
            inner = again;
            let fill = self.fill();
            let finished = self.finish(&attempt, slot, ended, context.references());
            match finished.await {
                Finished::Conflict(code) if reruns > 0 => {
                    tracing::info!(id = %self.identity.id(), %code, "rolled back, runs again");
                    reruns -= 1;
                    let ready = poll_fn(|context| inner.poll_ready(context));
                    match timeout(limit, ready).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return reply.send(Err(error)),
                        Err(_elapsed) => {
                            let rejection = Rejection::new(code);
                            return reply.send(Ok(self.render(rejection)));
                        }
                    }
                }
                Finished::Conflict(code) => {
                    drop(listed);
                    return reply.send(Ok(self.render(Rejection::new(code))));
                }
                // A client that retries at once must not be told that its request is running: the
                // attempt is over before the client knows.
                Finished::Answer(answer) => {
                    drop(listed);
                    return reply.send(answer);
                }
                Finished::Recorded(answer, completion, expires_at) => {
                    let shown = self.completed(&completion, expires_at, sent);
                    self.tell(listed, Some(shown), fill);
                    return reply.send(answer);
                }
                Finished::ToHold(answer, transaction, references) => {
                    let mut held = pin!(async {
                        self.hold_ended(&attempt, &references).await;
                        if let Some(transaction) = transaction {
                            drop(self.roll_back(transaction, token).await);
                        }
                    });
                    if timeout(self.policy.settle_timeout, &mut held).await.is_ok() {
                        drop(listed);
                        return reply.send(answer);
                    }
                    reply.send_early(answer);
                    return held.await;
                }
            }
            drop(listed);
            backoff.pause().await;
        }
    }

    /// Takes the transaction back from the handler, and ends it as the handler's answer says.
    async fn finish<E>(
        &self,
        attempt: &ClaimRequest,
        slot: Slot<S::Transaction>,
        ended: Ended<E>,
        references: References,
    ) -> Finished<E, S::Transaction> {
        let Some(transaction) = slot.close() else {
            tracing::error!(id = %self.identity.id(), operation = self.identity.operation(),
                "the transaction outlived its handler: nothing is committed");
            return Finished::Answer(Ok(self.render(Rejection::new(Code::TransactionHeld))));
        };
        let (writes, held) = match disposition(&ended) {
            TransactionalDisposition::Commit => (Writes::Keep, false),
            TransactionalDisposition::Refuse => (Writes::Undo, false),
            TransactionalDisposition::Hold => (Writes::Undo, true),
            TransactionalDisposition::Undo => {
                return match self.roll_back(transaction, attempt.token).await {
                    Err(CommitError::Ended) => self.ended(references),
                    Ok(()) | Err(_) => Finished::Answer(self.answer_of(ended).await),
                };
            }
            TransactionalDisposition::Conflict => {
                return match self.roll_back(transaction, attempt.token).await {
                    Err(CommitError::Ended) => self.ended(references),
                    Ok(()) | Err(_) => Finished::Conflict(Code::TransactionConflict),
                };
            }
        };
        let (mut answer, answered) = self.answers(ended, Disposition::Store).await;
        let entry = Entry {
            writes,
            held,
            completion: Completion {
                answer: answered,
                references,
            },
        };
        if held && self.shared.core.store.lock_ends_with_writes() {
            let references = entry.completion.references;
            return Finished::ToHold(answer, Some(transaction), references);
        }
        if held {
            self.warn_held();
        }
        match self.commit(attempt, transaction, &entry).await {
            Ok(expires_at) => {
                if held {
                    return Finished::Answer(answer);
                }
                if let Ok(response) = &mut answer {
                    self.show_expiry(response.headers_mut(), expires_at);
                }
                Finished::Recorded(answer, entry.completion, expires_at)
            }
            Err(error) => {
                let references = entry.completion.references;
                if held && !matches!(error, CommitError::Ended) {
                    let (id, source) = (self.identity.id(), std::error::Error::source(&error));
                    tracing::error!(%id, error = source, "what is to be held is not recorded yet: {error}");
                    return Finished::ToHold(answer, None, references);
                }
                self.uncommitted(&error, references).await
            }
        }
    }

    async fn roll_back(
        &self,
        transaction: S::Transaction,
        token: Token,
    ) -> Result<(), CommitError> {
        let store = &self.shared.core.store;
        let rollback = timeout(
            self.shared.store_timeout,
            store.rollback(transaction, token),
        );
        rollback.await.unwrap_or_else(|_elapsed| {
            let (id, operation) = (self.identity.id(), self.identity.operation());
            tracing::warn!(%id, operation, "rollback is not acknowledged");
            Ok(())
        })
    }

    fn ended<E>(&self, references: References) -> Finished<E, S::Transaction> {
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::error!(%id, operation, "{}", CommitError::Ended);
        let answer = Ok(self.render(Rejection::new(Code::TransactionEnded)));
        Finished::ToHold(answer, None, references)
    }

    /// What the handler may have committed, or has held, must not be done again: a person is to look first.
    async fn hold_ended(&self, attempt: &ClaimRequest, references: &References) {
        let claim = ClaimRequest {
            lost: Lost::Hold,
            ..attempt.clone()
        };
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));
        let claimed = loop {
            match self.try_claim(&claim, &mut false).await {
                Ok(Claimed::Existing(Existing::InProgress { .. })) => {}
                Err(error) if error.kind() == StoreErrorKind::Unavailable => {}
                claimed => break claimed,
            }
            backoff.pause().await;
        };
        let held = match claimed {
            Ok(Claimed::Acquired(claim) | Claimed::Abandoned(claim)) => {
                self.write(&claim, &Write::Hold(references.clone())).await
            }
            Ok(Claimed::Existing(Existing::Held)) => Ok(()),
            Ok(Claimed::Existing(_)) => Err(StoreError::claim_lost()),
            Err(error) => Err(error),
        };
        match held {
            Ok(()) => self.warn_held(),
            Err(error) => {
                let (id, operation) = (self.identity.id(), self.identity.operation());
                let cause: &dyn std::error::Error = &error;
                tracing::error!(%id, operation, error = cause, "cannot be held, and may have run twice");
            }
        }
    }

    /// Until it is known whether it is committed, or the settle timeout is over. Of a connection that
    /// went silent nothing will be heard: after the store timeout, another one is asked.
    async fn commit(
        &self,
        attempt: &ClaimRequest,
        transaction: S::Transaction,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        let store = &self.shared.core.store;
        let deadline = tokio::time::Instant::now() + self.policy.settle_timeout;
        let patience = || deadline.min(tokio::time::Instant::now() + self.shared.store_timeout);
        let commit = store.commit(transaction, attempt, entry);
        let mut unknown = match tokio::time::timeout_at(patience(), commit).await {
            Ok(Err(CommitError::Unknown(error))) => error,
            Ok(known) => return known,
            Err(elapsed) => StoreError::unavailable(elapsed),
        };
        self.warn_unacknowledged(&unknown);
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(250));
        while tokio::time::Instant::now() < deadline {
            let confirmed = tokio::time::timeout_at(patience(), store.confirm(attempt)).await;
            match confirmed {
                Ok(Ok(Verdict::Committed(expires_at))) => return Ok(expires_at),
                Ok(Ok(Verdict::Recorded)) => return Err(CommitError::Recorded),
                Ok(Ok(Verdict::RolledBack)) => return Err(CommitError::Conflict(unknown)),
                Ok(Err(error)) => unknown = error,
                Err(elapsed) => unknown = StoreError::unavailable(elapsed),
            }
            backoff.pause().await;
        }
        Err(CommitError::Unknown(unknown))
    }

    fn warn_unacknowledged(&self, error: &StoreError) {
        let cause: &dyn std::error::Error = error;
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::warn!(%id, operation, error = cause, source = cause.source(), "commit is not acknowledged");
    }

    async fn uncommitted<E>(
        &self,
        error: &CommitError,
        references: References,
    ) -> Finished<E, S::Transaction> {
        let id = self.identity.id();
        let operation = self.identity.operation();
        let source = std::error::Error::source(error);
        let code = match error {
            CommitError::Conflict(_) => {
                tracing::warn!(%id, operation, error = source, "{error}");
                return Finished::Conflict(Code::TransactionConflict);
            }
            CommitError::Recorded => return self.recorded().await,
            CommitError::Aborted(_) => {
                tracing::error!(%id, operation, error = source, "{error}");
                return Finished::Conflict(Code::TransactionAborted);
            }
            CommitError::Ended => return self.ended(references),
            CommitError::Unknown(_) => {
                tracing::error!(%id, operation, error = source, "{error}");
                Code::AnswerNotRecorded
            }
        };
        Finished::Answer(Ok(self.render(Rejection::new(code))))
    }

    /// Another record was in the way. One that is gone again, as that of a claim that cleared away an
    /// expired answer, leaves the key free: this attempt is rolled back, and may run again.
    async fn recorded<E>(&self) -> Finished<E, S::Transaction> {
        match self.seen().await {
            Ok(None) => Finished::Conflict(Code::TransactionConflict),
            Ok(Some(answer)) => Finished::Answer(Ok(answer)),
            Err(_) => Finished::Answer(Ok(self.render(Rejection::new(Code::AnswerNotRecorded)))),
        }
    }

    /// A route that promises a transaction never runs without one, whatever its policy says of a
    /// store that is down.
    fn transaction_down(&self, error: &StoreError) -> Response<Body> {
        let cause: &dyn std::error::Error = error;
        let (id, operation) = (self.identity.id(), self.identity.operation());
        if error.kind() == StoreErrorKind::Corrupt {
            tracing::error!(%id, operation, error = cause, source = cause.source(), "record cannot be read");
            return self.reject(Rejection::new(Code::RecordUnreadable));
        }
        tracing::warn!(%id, operation, error = cause, source = cause.source(), "cannot begin");
        self.reject(Rejection::new(Code::StoreUnavailable))
    }
}

fn disposition<E>(ended: &Ended<E>) -> TransactionalDisposition {
    let ending = match ended {
        Ended::Answered(response, outcome) => Ending::Answered(response.status(), *outcome),
        Ended::Streaming(response, outcome) => Ending::Answered(response.status(), *outcome),
        Ended::Failed(_) | Ended::Error(_) => Ending::Unknown,
    };
    Policy::transactional_disposition(ending)
}
