use axum_core::body::Body;
use http::Response;
use http::header::HeaderValue;

use super::Exchange;
use crate::cache::Fill;
use crate::headers;
use crate::moment::Moment;
use crate::rejection::{Code, Rejection};
use crate::stats::Event;
use crate::store::{Completed, Existing, Store};

impl<S: Store> Exchange<S> {
    /// The replay of an answer that is in memory, counted.
    pub(super) fn cached(&self) -> Option<Response<Body>> {
        if !self.policy.replay_cache || self.shared.is_closing() {
            return None;
        }
        let replays = self.shared.core.replays.load();
        let shown = replays.get(&self.identity, &self.fingerprint, Moment::now())?;
        Some(self.answer_existing(&shown))
    }

    /// To be called before a record is read or written that may then be replayed from memory.
    pub(super) fn fill(&self) -> Option<Fill> {
        let replays = || self.shared.core.replays.load_full();
        let is_cached = self.policy.replay_cache;
        is_cached.then(|| replays().fill(&self.identity, Moment::now()))
    }

    /// What a duplicate is answered, counted.
    pub(super) fn answer_existing(&self, existing: &Existing) -> Response<Body> {
        match self.existing(existing) {
            Ok(replay) => {
                self.count(Event::Replayed);
                replay
            }
            Err(rejection) => self.reject(rejection),
        }
    }

    /// The replay of a kept answer, or what is said in place of it.
    pub(super) fn existing(&self, existing: &Existing) -> Result<Response<Body>, Rejection> {
        match existing {
            Existing::Completed(completed) => self.replay(completed),
            Existing::InProgress { .. } => Err(Rejection::new(Code::RequestInProgress)),
            Existing::Mismatch => Err(Rejection::new(Code::KeyReused)),
            Existing::Held => {
                self.warn_held();
                Err(Rejection::new(Code::OutcomeUnknown))
            }
        }
    }

    /// For whoever is called because of a held record: its id is in the log.
    pub(super) fn warn_held(&self) {
        let (id, operation) = (self.identity.id(), self.identity.operation());
        tracing::warn!(%id, operation, "held for a person: its outcome is unknown");
    }

    fn replay(&self, completed: &Completed) -> Result<Response<Body>, Rejection> {
        let Some(body) = completed.answer.body() else {
            let references = completed.references.clone();
            return Err(Rejection::not_retained(&completed.answer, references));
        };
        let mut response = Response::new(Body::from(body.clone()));
        *response.status_mut() = completed.answer.status();
        let headers = response.headers_mut();
        // Without room, it grows as it is filled: for what follows here, and the length that axum adds.
        drop(headers.try_reserve(completed.answer.headers().len() + 3));
        for (name, value) in completed.answer.headers() {
            headers.append(name, value.clone());
        }
        headers.insert(headers::REPLAYED, HeaderValue::from_static("true"));
        self.show_expiry(headers, completed.expires_at);
        Ok(response)
    }
}
