use axum_core::body::Body;
use http::Response;
use http::header::HeaderValue;

use super::Exchange;
use crate::headers;
use crate::rejection::{Code, Rejection};
use crate::stats::Event;
use crate::store::{Completed, Existing, Store};

impl<S: Store> Exchange<S> {
    /// What a duplicate is answered.
    pub(super) fn existing(&self, existing: Existing) -> Response<Body> {
        let rejection = match existing {
            Existing::Completed(completed) => return self.replay(*completed),
            Existing::InProgress { lease_left } => Rejection::in_progress(lease_left),
            Existing::Mismatch => Rejection::new(Code::KeyReused),
            Existing::Held => Rejection::new(Code::OutcomeUnknown),
        };
        self.shared.reject(&rejection)
    }

    fn replay(&self, completed: Completed) -> Response<Body> {
        let Some(body) = completed.answer.body() else {
            let rejection = Rejection::not_retained(&completed.answer, completed.references);
            return self.shared.reject(&rejection);
        };
        self.shared.count(Event::Replayed);
        let mut response = Response::new(Body::from(body.clone()));
        *response.status_mut() = completed.answer.status();
        let headers = response.headers_mut();
        for (name, value) in completed.answer.headers() {
            headers.append(name, value.clone());
        }
        headers.insert(headers::REPLAYED, HeaderValue::from_static("true"));
        self.show_expiry(headers, completed.expires_at);
        response
    }
}
