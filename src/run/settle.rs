use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum_core::body::Body;
use bytes::Bytes;
use http::header::HeaderValue;
use http::{HeaderMap, Response};
use http_body_util::BodyExt;

use super::claim::Grant;
use super::execute::Ended;
use super::{Exchange, Reply};
use crate::backoff::Backoff;
use crate::envelope::Envelope;
use crate::extract::References;
use crate::headers;
use crate::moment::Moment;
use crate::policy::{Disposition, Ending};
use crate::rejection::{Code, Rejection};
use crate::running::{Lease, Listed};
use crate::store::{Claim, Completion, Store, StoreError, StoreErrorKind};

/// An attempt whose handler has ended.
pub(super) struct Attempt {
    pub(super) claim: Claim,
    /// When the claim was sent.
    pub(super) sent: Moment,
    pub(super) listed: Listed,
    pub(super) lease: Arc<Lease>,
    /// As of [`Grant`].
    pub(super) unheard: bool,
}

/// What is written, and what the client gets once it is.
struct Settlement<E> {
    write: Write,
    answer: Result<Response<Body>, E>,
}

pub(super) enum Write {
    Complete(Completion),
    Release,
    Hold(References),
}

impl<S: Store> Exchange<S> {
    pub(super) fn keep(&self, grant: &Grant, listed: &Listed) -> Arc<Lease> {
        let (store, length) = (&self.shared.core.store, self.policy.lease);
        listed.keep(store, &grant.claim, length, grant.leased)
    }

    /// Writes how the handler ended, then answers: the record comes before the first byte.
    pub(super) async fn settle<E>(
        &self,
        attempt: Attempt,
        ended: Ended<E>,
        references: References,
        mut reply: Reply<E>,
    ) {
        let Attempt {
            claim,
            sent,
            listed,
            lease,
            unheard,
        } = attempt;
        let Settlement { write, answer } = self.settlement(&claim, ended, references).await;
        let fill = self.fill();
        let shown = self.shown(&claim, sent, &write);
        let told = |listed| self.tell(listed, shown.filter(|_| lease.is_current()), fill);
        let mut written = std::pin::pin!(async {
            self.write(&claim, &write).await?;
            if unheard && matches!(write, Write::Release) {
                self.withdraw(claim.clone());
            }
            Ok(())
        });
        let in_time = tokio::time::timeout(self.policy.settle_timeout, &mut written).await;
        if matches!(write, Write::Hold(_)) {
            self.warn_held();
        }
        match in_time {
            // A client that retries at once must not be told that its request is running: the attempt
            // is over before the client knows.
            Ok(Ok(())) => {
                told(listed);
                reply.send(answer);
            }
            Ok(Err(error)) => {
                let answer = self.refused(&error).await;
                drop(listed);
                reply.send(Ok(answer));
            }
            Err(_elapsed) => {
                reply.send_early(self.unrecorded(&write, answer));
                // The lease is kept and the answer in memory: a retry waits for it, and none runs.
                match written.await {
                    Ok(()) => told(listed),
                    Err(error) => self.log_refused(&error),
                }
            }
        }
    }

    /// An earlier attempt was lost, and this one took over only to say so.
    pub(super) async fn answer_lost<E>(&self, grant: Grant, listed: Listed, reply: Reply<E>) {
        let lease = self.keep(&grant, &listed);
        let Grant {
            claim,
            sent,
            unheard,
            ..
        } = grant;
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::warn!(%id, operation, attempt = claim.attempt, "earlier attempt was lost");
        let attempt = Attempt {
            claim,
            sent,
            listed,
            lease,
            unheard,
        };
        let ended = Ended::Failed(Code::AttemptLost);
        self.settle(attempt, ended, References::default(), reply)
            .await;
    }

    async fn settlement<E>(
        &self,
        claim: &Claim,
        ended: Ended<E>,
        references: References,
    ) -> Settlement<E> {
        let disposition = self.disposition(&ended);
        let (mut answer, envelope) = self.answers(ended, disposition).await;
        if let (Disposition::Store, Ok(response)) = (disposition, &mut answer) {
            self.show_expiry(response.headers_mut(), claim.expires_at);
        }
        let write = match disposition {
            Disposition::Release => Write::Release,
            Disposition::Hold => Write::Hold(references),
            Disposition::Store => Write::Complete(Completion {
                answer: envelope,
                references,
            }),
        };
        Settlement { write, answer }
    }

    /// What the client gets, and what is kept of it.
    pub(super) async fn answers<E>(
        &self,
        ended: Ended<E>,
        disposition: Disposition,
    ) -> (Result<Response<Body>, E>, Envelope) {
        match ended {
            Ended::Answered(response, _) => {
                let envelope = self.envelope(&response);
                (Ok(response.map(Body::from)), envelope)
            }
            Ended::Streaming(response, _) => {
                let tombstone = Envelope::tombstone(response.status(), response.headers());
                (Ok(response), tombstone)
            }
            Ended::Failed(code) => {
                let response = self.failure(code, disposition).await;
                let envelope = self.envelope(&response);
                (Ok(response.map(Body::from)), envelope)
            }
            Ended::Error(error) => {
                let stored = self.failure(Code::ResponseFailed, disposition).await;
                (Err(error), self.envelope(&stored))
            }
        }
    }

    fn disposition<E>(&self, ended: &Ended<E>) -> Disposition {
        match ended {
            Ended::Answered(response, outcome) => {
                let ending = Ending::Answered(response.status(), *outcome);
                self.policy.disposition(ending)
            }
            Ended::Streaming(response, outcome) => {
                let ending = Ending::Answered(response.status(), *outcome);
                self.policy.disposition(ending)
            }
            Ended::Failed(Code::AttemptLost) => Disposition::Store,
            Ended::Failed(_) | Ended::Error(_) => self.policy.disposition(Ending::Unknown),
        }
    }

    /// Writes until the store confirms or refuses.
    pub(super) async fn write(&self, claim: &Claim, write: &Write) -> Result<(), StoreError> {
        let store = &self.shared.core.store;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));
        let mut unheard = false;
        let (id, operation) = (claim.identity.id(), claim.identity.operation());
        loop {
            let attempt = async {
                match write {
                    Write::Complete(completion) => store.complete(claim, completion).await,
                    Write::Release => store.release(claim).await,
                    Write::Hold(references) => store.hold(claim, references).await,
                }
            };
            let result = tokio::time::timeout(self.shared.store_timeout, attempt).await;
            match result {
                Ok(Err(error)) if error.kind() == StoreErrorKind::Unavailable => {
                    let cause: &dyn Error = &error;
                    tracing::warn!(%id, operation, error = cause, source = error.source(), "cannot record yet");
                }
                // It was freed by then, and is another attempt's now: the answer was for its own client
                // alone anyway.
                Ok(Err(_lost)) if unheard && matches!(write, Write::Release) => return Ok(()),
                Ok(result) => return result,
                Err(_elapsed) => {
                    tracing::warn!(%id, operation, "store did not answer in time");
                }
            }
            unheard = true;
            backoff.pause().await;
        }
    }

    /// The record could not be written in time. Only an answer that would have been replayed can be
    /// lost by giving it out.
    fn unrecorded<E>(
        &self,
        write: &Write,
        answer: Result<Response<Body>, E>,
    ) -> Result<Response<Body>, E> {
        let losable = self.policy.losable_answers || !matches!(write, Write::Complete(_));
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::warn!(%id, operation, answered = losable, "not recorded in time");
        if losable {
            answer
        } else {
            let rejection = Rejection::new(Code::AnswerNotRecorded);
            Ok(self.render(rejection))
        }
    }

    /// Another attempt holds the claim, or a person resolved it: the client gets what a duplicate would.
    async fn refused(&self, error: &StoreError) -> Response<Body> {
        self.log_refused(error);
        self.look_again().await
    }

    async fn look_again(&self) -> Response<Body> {
        let unseen = || self.render(Rejection::new(Code::AnswerNotRecorded));
        self.seen().await.ok().flatten().unwrap_or_else(unseen)
    }

    /// What a duplicate would get now, or `None` where there is no record.
    pub(super) async fn seen(&self) -> Result<Option<Response<Body>>, StoreError> {
        let store = &self.shared.core.store;
        let lookup = self.until_timeout(|| store.lookup(&self.identity, &self.fingerprint));
        let existing = lookup.await?;
        let answer = existing.map(|existing| self.existing(&existing));
        Ok(answer.map(|answer| answer.unwrap_or_else(|rejection| self.render(rejection))))
    }

    fn log_refused(&self, error: &StoreError) {
        let cause: &dyn Error = error;
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::error!(%id, operation, error = cause, "the answer was refused by the record");
    }

    /// Our own answer for an attempt that gave none.
    async fn failure(&self, code: Code, disposition: Disposition) -> Response<Bytes> {
        let mut rejection = Rejection::new(code);
        if disposition == Disposition::Release {
            rejection = rejection.with_retry();
        }
        let response = if code == Code::AttemptLost {
            self.reject(rejection)
        } else {
            self.render(rejection)
        };
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.map(|body| body.to_bytes());
        Response::from_parts(parts, bytes.unwrap_or_default())
    }

    fn envelope(&self, response: &Response<Bytes>) -> Envelope {
        let hidden = &self.policy.hidden_headers;
        let headers = headers::replayable(response.headers(), response.body().len(), hidden);
        let mut stored = Response::new(response.body().clone());
        *stored.status_mut() = response.status();
        *stored.headers_mut() = headers;
        Envelope::new(stored)
    }

    pub(super) fn show_expiry(&self, headers: &mut HeaderMap, expires_at: SystemTime) {
        if !self.policy.shows_expiry {
            return;
        }
        let date = httpdate::fmt_http_date(expires_at);
        if let Ok(value) = HeaderValue::try_from(date) {
            headers.insert(headers::EXPIRES, value);
        }
    }

    /// The answer of an attempt that leaves no record.
    pub(super) async fn answer_of<E>(&self, ended: Ended<E>) -> Result<Response<Body>, E> {
        match ended {
            Ended::Answered(response, _) => Ok(response.map(Body::from)),
            Ended::Streaming(response, _) => Ok(response),
            Ended::Failed(code) => {
                let response = self.failure(code, Disposition::Release).await;
                Ok(response.map(Body::from))
            }
            Ended::Error(error) => Err(error),
        }
    }
}
