use axum_core::body::Body;
use http::Response;
use http::header::HeaderValue;

use super::Exchange;
use crate::headers;
use crate::rejection::{Code, Rejection};
use crate::stats::Event;
use crate::store::{Completed, Existing, Store};

impl<S: Store> Exchange<S> {
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
        for (name, value) in completed.answer.headers() {
            headers.append(name, value.clone());
        }
        headers.insert(headers::REPLAYED, HeaderValue::from_static("true"));
        self.show_expiry(headers, completed.expires_at);
        Ok(response)
    }
}
