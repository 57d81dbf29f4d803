use std::fmt;

use http::StatusCode;

/// Why the layer answered in place of the handler.
///
/// [`as_str`](Self::as_str) is stable: clients may depend on it. Every code is explained in
/// [`problems`](crate::problems).
///
/// ```
/// use tower_idempotency::Code;
///
/// assert_eq!(Code::KeyReused.as_str(), "key-reused");
/// assert_eq!(Code::KeyReused.status(), 409);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// The route requires a key, and none was sent.
    KeyMissing,
    /// The key is malformed.
    KeyInvalid,
    /// It could not be told who is asking.
    ScopeMissing,
    /// The request's body is over the limit of the route.
    BodyTooLarge,
    /// The request's body did not arrive in time.
    BodyTimeout,
    /// The request's body broke off.
    BodyUnreadable,
    /// The key was used with another request before.
    KeyReused,
    /// The same request is running.
    RequestInProgress,
    /// An attempt was made and it is not known what came of it; a person resolves it.
    OutcomeUnknown,
    /// The handler ran, and its answer could not be recorded yet.
    AnswerNotRecorded,
    /// The request was answered, and its answer was not kept.
    ResponseNotRetained,
    /// The store could not be asked, so the handler was not run.
    StoreUnavailable,
    /// Too many requests are running.
    Overloaded,
    /// The service is shutting down.
    ShuttingDown,
    /// Two layers of different policies cover one route.
    NestedLayers,
    /// The record exists and cannot be read.
    RecordUnreadable,
    /// The handler panicked.
    HandlerPanicked,
    /// The handler took longer than the route allows.
    ExecutionLimit,
    /// The handler's answer broke off before it was complete.
    ResponseFailed,
    /// An earlier attempt was lost, and the route does not allow another.
    AttemptLost,
    /// Another transaction was in the way of the handler's, which is rolled back.
    TransactionConflict,
    /// The handler's transaction was aborted or could not be committed, and is rolled back.
    TransactionAborted,
    /// The handler ended its transaction by itself, so the answer could not be committed with it.
    TransactionEnded,
    /// Something still held the handler's transaction when the handler had ended.
    TransactionHeld,
    /// A webhook came without a signature.
    SignatureMissing,
    /// No secret of ours made a webhook's signature.
    SignatureInvalid,
    /// A webhook came without the time at which it was signed.
    TimestampMissing,
    /// A webhook was signed too long ago.
    TimestampTooOld,
    /// A webhook was signed later than now.
    TimestampInFuture,
    /// A webhook came without the id of its event.
    EventIdMissing,
}

impl Code {
    /// Every code there is, in the order of the documentation.
    pub const ALL: [Self; 30] = [
        Self::KeyMissing,
        Self::KeyInvalid,
        Self::ScopeMissing,
        Self::BodyTooLarge,
        Self::BodyTimeout,
        Self::BodyUnreadable,
        Self::KeyReused,
        Self::RequestInProgress,
        Self::OutcomeUnknown,
        Self::AnswerNotRecorded,
        Self::ResponseNotRetained,
        Self::StoreUnavailable,
        Self::Overloaded,
        Self::ShuttingDown,
        Self::NestedLayers,
        Self::RecordUnreadable,
        Self::HandlerPanicked,
        Self::ExecutionLimit,
        Self::ResponseFailed,
        Self::AttemptLost,
        Self::TransactionConflict,
        Self::TransactionAborted,
        Self::TransactionEnded,
        Self::TransactionHeld,
        Self::SignatureMissing,
        Self::SignatureInvalid,
        Self::TimestampMissing,
        Self::TimestampTooOld,
        Self::TimestampInFuture,
        Self::EventIdMissing,
    ];

    /// The `code` member of the problem document.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.facts().0
    }

    /// The status of the default profile.
    #[must_use]
    pub fn status(self) -> StatusCode {
        self.facts().1
    }

    /// What happened, in one sentence that names nothing of the request.
    #[must_use]
    pub fn title(self) -> &'static str {
        self.facts().2
    }

    fn facts(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::KeyMissing => (
                "key-missing",
                S::BAD_REQUEST,
                "This route requires an idempotency key.",
            ),
            Self::KeyInvalid => (
                "key-invalid",
                S::BAD_REQUEST,
                "The idempotency key is malformed.",
            ),
            Self::ScopeMissing => (
                "scope-missing",
                S::FORBIDDEN,
                "It cannot be told whose idempotency key this is.",
            ),
            Self::BodyTooLarge => (
                "body-too-large",
                S::PAYLOAD_TOO_LARGE,
                "The request's body is over the limit.",
            ),
            Self::BodyTimeout => (
                "body-timeout",
                S::REQUEST_TIMEOUT,
                "The request's body did not arrive in time.",
            ),
            Self::BodyUnreadable => (
                "body-unreadable",
                S::BAD_REQUEST,
                "The request's body broke off.",
            ),
            Self::KeyReused => (
                "key-reused",
                S::CONFLICT,
                "This idempotency key was used with another request.",
            ),
            Self::RequestInProgress => (
                "request-in-progress",
                S::CONFLICT,
                "A request with this idempotency key is running.",
            ),
            Self::OutcomeUnknown => (
                "outcome-unknown",
                S::CONFLICT,
                "It is not known what came of this request; it has to be resolved by a person.",
            ),
            Self::AnswerNotRecorded => (
                "answer-not-recorded",
                S::SERVICE_UNAVAILABLE,
                "The request ran, and its answer is not recorded yet.",
            ),
            Self::ResponseNotRetained => (
                "response-not-retained",
                S::GONE,
                "The request was answered, and its answer was not kept.",
            ),
            Self::StoreUnavailable => (
                "store-unavailable",
                S::SERVICE_UNAVAILABLE,
                "Idempotency cannot be guaranteed now, so the request was not run.",
            ),
            Self::Overloaded => (
                "overloaded",
                S::SERVICE_UNAVAILABLE,
                "Too many requests are running; this one was not run.",
            ),
            Self::ShuttingDown => (
                "shutting-down",
                S::SERVICE_UNAVAILABLE,
                "The service is shutting down; the request was not run.",
            ),
            Self::NestedLayers => (
                "nested-layers",
                S::INTERNAL_SERVER_ERROR,
                "Two idempotency policies cover this route.",
            ),
            Self::RecordUnreadable => (
                "record-unreadable",
                S::INTERNAL_SERVER_ERROR,
                "The record of this request cannot be read; it was not run.",
            ),
            Self::HandlerPanicked => (
                "handler-panicked",
                S::INTERNAL_SERVER_ERROR,
                "The request failed.",
            ),
            Self::ExecutionLimit => (
                "execution-limit",
                S::INTERNAL_SERVER_ERROR,
                "The request took too long.",
            ),
            Self::ResponseFailed => (
                "response-failed",
                S::INTERNAL_SERVER_ERROR,
                "The answer broke off.",
            ),
            Self::AttemptLost => (
                "attempt-lost",
                S::INTERNAL_SERVER_ERROR,
                "An earlier attempt was lost, and it is not known how far it came.",
            ),
            Self::TransactionConflict => (
                "transaction-conflict",
                S::SERVICE_UNAVAILABLE,
                "The transaction could not be committed; everything was rolled back.",
            ),
            Self::TransactionAborted => (
                "transaction-aborted",
                S::INTERNAL_SERVER_ERROR,
                "The request failed; everything was rolled back.",
            ),
            Self::TransactionEnded => (
                "transaction-ended",
                S::INTERNAL_SERVER_ERROR,
                "The request's transaction was ended out of turn.",
            ),
            Self::TransactionHeld => (
                "transaction-held",
                S::INTERNAL_SERVER_ERROR,
                "The request's transaction was not given back; nothing is committed.",
            ),
            Self::SignatureMissing => (
                "signature-missing",
                S::UNAUTHORIZED,
                "This route requires a signed webhook.",
            ),
            Self::SignatureInvalid => (
                "signature-invalid",
                S::UNAUTHORIZED,
                "The webhook's signature is not of a secret that is known here.",
            ),
            Self::TimestampMissing => (
                "timestamp-missing",
                S::BAD_REQUEST,
                "The webhook does not say when it was signed.",
            ),
            Self::TimestampTooOld => (
                "timestamp-too-old",
                S::BAD_REQUEST,
                "The webhook was signed too long ago.",
            ),
            Self::TimestampInFuture => (
                "timestamp-in-future",
                S::BAD_REQUEST,
                "The webhook was signed later than now.",
            ),
            Self::EventIdMissing => (
                "event-id-missing",
                S::BAD_REQUEST,
                "The webhook does not say which event it is about.",
            ),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_explained_with_its_status_and_whether_to_wait() {
        let problems = include_str!("../problems.rs");
        for code in Code::ALL {
            let row = format!("`{code}`</span> | {} | ", code.status().as_u16());
            let at = problems.find(&row).map(|at| at + row.len());
            let waits = at.map(|at| problems[at..].starts_with("after `Retry-After` |"));
            let rejection = crate::Rejection::new(code);
            assert_eq!(waits, Some(rejection.retry_after().is_some()), "{code}");
        }
    }
}
