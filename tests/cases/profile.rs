//! What a client of each profile is told: one test for each code, with the whole of its surface.

use tower_idempotency::{Policy, Profile};

use crate::backend::{Backend, Corruptible};
use crate::provoke;
use crate::site::{Answer, policy};

/// Whether a retry may help.
type Retry = bool;
const LATER: Retry = true;
const NEVER: Retry = false;

/// Cases of the profile around them: its `policy()` provokes a code, its `assert_told` looks.
macro_rules! told {
    ($stores:ident, $backend:ident; $($case:ident: $code:ident => ($($told:expr),+)),* $(,)?) => {
        $stores!($($case),*);
        $(
            async fn $case(backend: impl $backend) {
                let answer = provoke::$code(&backend, policy()).await;
                assert_told(&answer, $($told),+);
            }
        )*
    };
}

#[track_caller]
fn assert_retry(answer: &Answer, retry: Retry) {
    let expected = retry.then_some("1");
    let shown = answer.headers.get("retry-after");
    assert_eq!(shown.map(|wait| wait.to_str().unwrap()), expected);
}

mod ietf {
    use super::*;

    fn policy() -> Policy {
        let profile = Profile::ietf("https://docs.example.com/keys").unwrap();
        super::policy().with_profile(profile)
    }

    #[track_caller]
    fn assert_told(answer: &Answer, status: u16, code: &str, retry: Retry) {
        answer.assert_problem(status, code);
        let link = "<https://docs.example.com/keys>; rel=\"describedby\"";
        assert_eq!(answer.headers["link"], link);
        assert!(!answer.headers.contains_key("stripe-should-retry"));
        let problem = answer.json();
        assert!(problem["title"].as_str().unwrap().ends_with('.'));
        let kind = problem["type"].as_str().unwrap();
        assert!(kind.starts_with("https://") && kind.ends_with(&format!("#{code}")));
        assert_retry(answer, retry);
    }

    told!(
        on_every_store, Backend;
        a_missing_key_is_400: key_missing => (400, "key-missing", NEVER),
        a_malformed_key_is_400: key_invalid => (400, "key-invalid", NEVER),
        k4_a_bare_key_is_400: bare_key => (400, "key-invalid", NEVER),
        a_missing_scope_is_403: scope_missing => (403, "scope-missing", NEVER),
        a_body_over_the_limit_is_413: body_too_large => (413, "body-too-large", NEVER),
        a_body_that_is_late_is_408: body_timeout => (408, "body-timeout", LATER),
        a_body_that_breaks_off_is_400: body_unreadable => (400, "body-unreadable", LATER),
        a_reused_key_is_422: key_reused => (422, "key-reused", NEVER),
        a_running_request_is_409: request_in_progress => (409, "request-in-progress", LATER),
        an_unknown_outcome_is_409: outcome_unknown => (409, "outcome-unknown", NEVER),
        an_unrecorded_answer_is_503: answer_not_recorded => (503, "answer-not-recorded", LATER),
        an_answer_that_was_not_kept_is_410:
            response_not_retained => (410, "response-not-retained", NEVER),
        a_store_that_is_down_is_503: store_unavailable => (503, "store-unavailable", LATER),
        too_many_running_is_503: overloaded => (503, "overloaded", LATER),
        a_process_about_to_end_is_503: shutting_down => (503, "shutting-down", LATER),
        layers_that_disagree_are_500: nested_layers => (500, "nested-layers", NEVER),
        a_panic_is_500: handler_panicked => (500, "handler-panicked", NEVER),
        an_execution_limit_is_500: execution_limit => (500, "execution-limit", NEVER),
        an_answer_that_breaks_off_is_500: response_failed => (500, "response-failed", NEVER),
        a_lost_attempt_is_500: attempt_lost => (500, "attempt-lost", NEVER),
    );

    told!(
        on_every_database, Corruptible;
        a_record_that_cannot_be_read_is_500: record_unreadable => (500, "record-unreadable", NEVER),
    );
}

mod stripe {
    use super::*;

    const INVALID: &str = "invalid_request_error";
    const IDEMPOTENCY: &str = "idempotency_error";
    const API: &str = "api_error";

    fn policy() -> Policy {
        super::policy().with_profile(Profile::Stripe)
    }

    #[track_caller]
    fn assert_told(answer: &Answer, status: u16, kind: &str, code: &str, retry: Retry) {
        let shown = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.status, status, "{shown}");
        assert!(!answer.is_replay());
        assert_eq!(answer.headers["content-type"], "application/json");
        let body = answer.json();
        let error = &body["error"];
        assert_eq!(body.as_object().unwrap().len(), 1, "{shown}");
        assert_eq!(
            (&error["type"], &error["code"]),
            (&kind.into(), &code.into())
        );
        assert!(error["message"].as_str().unwrap().ends_with('.'), "{shown}");
        let should = if retry { "true" } else { "false" };
        assert_eq!(answer.headers["stripe-should-retry"], should);
        assert!(!answer.headers.contains_key("link"));
        assert_retry(answer, retry);
    }

    told!(
        on_every_store, Backend;
        a_missing_key_is_400: key_missing => (400, INVALID, "key-missing", NEVER),
        a_malformed_key_is_400: key_invalid => (400, INVALID, "key-invalid", NEVER),
        a_missing_scope_is_403: scope_missing => (403, INVALID, "scope-missing", NEVER),
        a_body_over_the_limit_is_413: body_too_large => (413, INVALID, "body-too-large", NEVER),
        a_body_that_is_late_is_408: body_timeout => (408, INVALID, "body-timeout", LATER),
        a_body_that_breaks_off_is_400: body_unreadable => (400, INVALID, "body-unreadable", LATER),
        a_reused_key_is_400: key_reused => (400, IDEMPOTENCY, "key-reused", NEVER),
        a_running_request_is_409:
            request_in_progress => (409, IDEMPOTENCY, "idempotency_key_in_use", LATER),
        an_unknown_outcome_is_409: outcome_unknown => (409, INVALID, "outcome-unknown", NEVER),
        an_unrecorded_answer_is_503: answer_not_recorded => (503, API, "answer-not-recorded", LATER),
        an_answer_that_was_not_kept_is_410:
            response_not_retained => (410, INVALID, "response-not-retained", NEVER),
        a_store_that_is_down_is_503: store_unavailable => (503, API, "store-unavailable", LATER),
        too_many_running_is_503: overloaded => (503, API, "overloaded", LATER),
        a_process_about_to_end_is_503: shutting_down => (503, API, "shutting-down", LATER),
        layers_that_disagree_are_500: nested_layers => (500, API, "nested-layers", NEVER),
        a_panic_is_500: handler_panicked => (500, API, "handler-panicked", NEVER),
        an_execution_limit_is_500: execution_limit => (500, API, "execution-limit", NEVER),
        an_answer_that_breaks_off_is_500: response_failed => (500, API, "response-failed", NEVER),
        a_lost_attempt_is_500: attempt_lost => (500, API, "attempt-lost", NEVER),
    );

    told!(
        on_every_database, Corruptible;
        a_record_that_cannot_be_read_is_500:
            record_unreadable => (500, API, "record-unreadable", NEVER),
    );
}

mod stripe_message {
    use super::*;

    on_every_store!(its_detail_is_a_sentence);

    async fn its_detail_is_a_sentence(backend: impl Backend) {
        let stripe = || policy().with_profile(Profile::Stripe);
        for (answer, detail) in [
            (
                provoke::key_invalid(&backend, stripe()).await,
                "malformed. It must be at most 255 bytes long, not 256.",
            ),
            (
                provoke::body_too_large(&backend, stripe()).await,
                "over the limit. It has more than 100 bytes.",
            ),
            (
                provoke::body_timeout(&backend, stripe()).await,
                "in time. It was not complete after 100ms.",
            ),
        ] {
            let message = answer.json()["error"]["message"].clone();
            let message = message.as_str().unwrap();
            assert!(message.ends_with(detail), "{message}");
        }
    }
}
