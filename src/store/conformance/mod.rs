//! The rules every store has to keep, as tests that any store can run.
//!
//! [`conformance_tests!`](crate::conformance_tests) makes one test of each rule, named as the rule,
//! so that a store that breaks one is told which. The rules are also plain functions, in the modules
//! below: each panics when it is broken.
//!
//! ```no_run
//! # // `no_run`: tests are only made where there is a test harness.
//! use std::time::Duration;
//! use tower_idempotency::MemoryStore;
//! use tower_idempotency::store::conformance::Subject;
//!
//! struct Memory(MemoryStore);
//!
//! impl Subject for Memory {
//!     type Store = MemoryStore;
//!
//!     fn store(&self) -> &MemoryStore {
//!         &self.0
//!     }
//!
//!     async fn age(&self, by: Duration) {
//!         self.0.advance(by);
//!     }
//! }
//!
//! tower_idempotency::conformance_tests!(Memory(MemoryStore::new()));
//! # fn main() {}
//! ```

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "rules are tests: the name of one is its documentation, and it fails by panicking"
)]

pub mod claiming;
pub mod completing;
pub mod expiring;
pub mod extending;
pub mod finding;
pub mod holding;
pub mod isolation;
pub mod losing;
pub mod races;
pub mod releasing;
pub mod resolving;
pub mod sweeping;

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::Response;

use super::{
    Claim, ClaimRequest, Claimed, Completed, Completion, Existing, HeldRecord, LeaseRenewal, Store,
    StoreError, StoreErrorKind, Token,
};
use crate::envelope::Envelope;
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};
use crate::policy::Lost;

/// A store to be tested, and a way to let time pass.
///
/// Each test gets a subject of its own, whose store is empty.
pub trait Subject: Send + Sync + 'static {
    /// What is tested.
    type Store: Store;

    /// The store.
    fn store(&self) -> &Self::Store;

    /// Makes the store believe that this much time has passed since its records were written: by
    /// setting its clock forward, or by setting every time in its records back.
    fn age(&self, by: Duration) -> impl Future<Output = ()> + Send;
}

/// One `#[tokio::test]` for each rule of a [`Store`](crate::Store), for a
/// [`Subject`](crate::store::conformance::Subject).
///
/// The argument is an expression that makes a subject; it is evaluated in each test, and may
/// `.await`. The crate that calls it needs tokio, with the features `macros` and `rt-multi-thread`.
///
/// ```no_run
/// # use std::time::Duration;
/// # use tower_idempotency::{MemoryStore, store::conformance::Subject};
/// # struct Memory(MemoryStore);
/// # impl Subject for Memory {
/// #     type Store = MemoryStore;
/// #     fn store(&self) -> &MemoryStore { &self.0 }
/// #     async fn age(&self, by: Duration) { self.0.advance(by) }
/// # }
/// async fn subject() -> Memory {
///     Memory(MemoryStore::new())
/// }
///
/// mod memory {
///     use super::subject;
///
///     tower_idempotency::conformance_tests!(subject().await);
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($subject:expr $(,)?) => {
        $crate::conformance_tests! { @rules $subject;
            claiming {
                a_claim_of_an_absent_record_is_acquired_as_attempt_1
                a_duplicate_of_a_running_request_is_told_the_lease_that_is_left
                the_lease_that_is_left_shrinks_as_time_passes
                a_claim_sent_again_with_its_token_is_acquired_again
                another_request_under_the_key_of_a_running_one_is_a_mismatch
                another_request_under_the_key_of_a_completed_one_is_a_mismatch
                another_request_under_the_key_of_a_held_one_is_a_mismatch
                a_claim_of_a_completed_record_gets_its_answer
                a_claim_sent_again_after_its_completion_gets_the_answer
                a_lookup_of_an_absent_record_finds_nothing
                a_lookup_claims_nothing
                the_end_of_retention_is_the_same_on_claim_and_replay
                leases_and_retention_keep_fractions_of_a_second
            }
            completing {
                a_completed_record_shows_the_answer_it_was_given
                a_binary_body_comes_back_byte_for_byte
                status_and_headers_come_back_unsplit_and_in_order
                an_empty_body_is_no_tombstone
                a_tombstone_comes_back_with_its_status_and_location
                a_body_of_1_mib_comes_back_byte_for_byte
                references_come_back_with_the_answer
                a_completion_sent_again_succeeds
                a_completion_with_a_foreign_token_is_refused_and_changes_nothing
                a_completed_record_is_not_overwritten_by_a_foreign_token
                a_completion_of_an_absent_record_is_refused_and_makes_none
                a_completion_after_the_lease_is_over_wins_if_nobody_took_over
            }
            releasing {
                a_released_key_can_be_claimed_by_another_request
                a_release_sent_again_succeeds
                a_release_of_a_claim_that_was_never_made_succeeds
                a_release_with_a_foreign_token_is_refused_and_changes_nothing
                a_release_of_a_completed_record_is_refused_and_changes_nothing
                a_release_sent_again_does_not_free_the_next_claim
                a_release_after_a_hold_frees_the_key
            }
            holding {
                a_held_record_is_listed_with_what_a_person_needs
                a_duplicate_of_a_held_record_is_told_so
                a_hold_sent_again_succeeds
                a_lost_attempt_that_is_held_can_still_show_its_references
                a_hold_with_a_foreign_token_is_refused_and_changes_nothing
                a_hold_of_a_completed_record_is_refused_and_changes_nothing
                a_hold_of_an_absent_record_is_refused
                a_late_completion_wins_over_the_hold
                a_held_record_is_not_kept_alive
                a_held_record_never_expires
                running_and_completed_records_are_not_listed_as_held
                held_records_are_listed_page_by_page_in_the_order_of_their_ids
            }
            resolving {
                an_answer_given_by_a_person_is_replayed
                an_answer_given_by_a_person_fences_the_attempt
                an_answer_given_by_a_person_is_kept_as_long_as_any
                a_release_by_a_person_lets_the_next_request_run
                a_resolution_with_a_foreign_token_is_refused_and_changes_nothing
                a_hold_is_resolved_once
                a_running_record_cannot_be_resolved
                a_completed_record_cannot_be_resolved
                an_absent_record_cannot_be_resolved
            }
            losing {
                a_lost_attempt_to_be_rerun_is_taken_over
                each_takeover_is_the_next_attempt
                a_takeover_sent_again_with_its_token_is_acquired_again
                a_record_is_not_taken_over_before_its_lease_is_over
                after_a_takeover_the_old_attempt_is_fenced
                a_lost_attempt_to_be_answered_is_abandoned
                an_abandoned_claim_sent_again_is_abandoned_again
                an_abandoned_claim_that_is_lost_leaves_the_operation_abandoned
                an_abandoned_claim_that_is_released_leaves_the_operation_abandoned
                a_lost_attempt_to_be_held_is_held
                a_late_completion_wins_over_the_hold_of_a_lost_attempt
                the_policy_of_the_lost_attempt_decides_not_that_of_the_next_request
                a_takeover_is_lost_by_its_own_policy
                another_request_does_not_take_over_a_lost_attempt
            }
            extending {
                a_renewed_lease_counts_from_its_renewal
                a_lease_that_is_over_can_be_renewed_until_somebody_takes_over
                renewals_of_several_are_told_apart_in_the_order_given
                each_renewal_has_its_own_length
                a_foreign_renewal_does_not_lengthen_a_lease
                no_renewals_are_no_work
                a_thousand_leases_are_renewed_at_once
            }
            expiring {
                an_answer_is_shown_until_its_retention_is_over
                the_retention_that_is_left_shrinks_as_time_passes
                retention_counts_from_the_claim
                an_answer_that_comes_after_the_retention_is_kept_as_long_as_any
                an_expired_record_is_claimed_as_if_absent
                an_expired_record_is_free_for_another_request
                nothing_of_an_expired_answer_is_shown_again
                a_lost_attempt_past_its_retention_is_as_good_as_absent
                a_live_lease_outlasts_the_retention
                a_takeover_begins_its_own_retention
            }
            sweeping {
                a_sweep_deletes_answers_whose_retention_is_over
                a_sweep_deletes_lost_attempts_whose_retention_is_over
                a_sweep_leaves_a_lost_attempt_within_its_retention
                a_sweep_never_touches_a_live_lease
                a_sweep_never_deletes_a_held_record
                a_sweep_holds_lost_attempts_whose_policy_says_so
                a_lost_attempt_to_be_held_is_held_even_past_its_retention
                a_sweep_deletes_no_more_than_its_limit
                a_sweep_holds_no_more_than_its_limit
                an_answer_given_after_a_hold_is_swept_like_any
            }
            finding {
                a_record_is_found_by_its_reference
                each_reference_of_a_record_finds_it
                a_reference_is_a_kind_and_an_id_and_never_a_part_of_them
                any_text_can_be_the_kind_and_the_id_of_a_reference
                what_cannot_be_a_reference_is_found_nowhere
                a_lookup_within_a_scope_never_shows_another_scope
                a_lookup_over_all_scopes_shows_every_one
                two_records_may_carry_one_reference
                records_are_found_page_by_page_in_the_order_of_their_ids
                a_held_record_is_found_by_its_reference
                a_held_record_is_found_however_old_it_is
                an_answer_given_by_a_person_keeps_the_references
                a_late_completion_replaces_the_references_of_the_hold
                the_last_word_of_a_held_attempt_replaces_its_references
                a_hold_or_completion_without_references_keeps_those_of_the_hold_before
                a_takeover_clears_the_references_of_the_record
                a_refused_completion_leaves_no_reference
                a_released_record_is_not_found
                a_record_that_a_person_released_is_not_found
                a_reference_is_over_with_the_retention_of_its_record
                a_record_that_is_claimed_anew_has_none_of_the_old_references
                a_swept_record_is_not_found
                an_inspection_shows_what_a_running_record_is_like
                an_inspection_shows_the_status_of_the_answer
                an_inspection_shows_the_status_of_a_tombstone
                an_inspection_shows_that_a_record_is_held
                an_inspection_counts_attempts
                an_inspection_finds_what_a_lookup_finds
                an_inspection_that_meets_another_identity_under_its_id_is_corrupt
            }
            isolation {
                two_scopes_never_share_a_record
                two_operations_never_share_a_record
                two_keys_never_share_a_record
                any_text_can_be_scope_operation_and_key
                a_claim_that_meets_another_identity_under_its_id_is_corrupt
                a_lookup_that_meets_another_identity_under_its_id_is_corrupt
                a_lost_attempt_of_another_identity_under_the_id_is_not_taken_over
            }
            races {
                of_fifty_claims_at_once_exactly_one_is_acquired
                of_many_takeovers_at_once_exactly_one_is_acquired
                of_many_claims_of_an_expired_record_exactly_one_is_acquired
                of_many_claims_of_an_abandoned_operation_exactly_one_answers_it
                a_claim_sent_twice_at_once_is_acquired_both_times
                of_a_completion_and_a_takeover_at_once_one_wins
                of_a_late_completion_and_a_resolution_at_once_one_wins
                sweeps_at_once_delete_each_record_once
                a_sweep_never_deletes_a_record_that_is_claimed_anew_at_once
            }
        }
    };
    (@rules $subject:expr; $($module:ident { $($rule:ident)* })*) => {
        $($(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                $crate::store::conformance::$module::$rule($subject).await;
            }
        )*)*
    };
}

const LEASE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(24 * 3600);
/// What two readings of one clock may differ by: stores keep times in milliseconds or better.
const TICK: Duration = Duration::from_millis(1);

/// Fails unless the value has this form.
macro_rules! must_be {
    ($value:expr, $form:pat $(if $guard:expr)?) => {{
        let value = $value;
        assert!(
            matches!(&value, $form $(if $guard)?),
            "expected {}, not {value:?}",
            stringify!($form $(if $guard)?)
        );
    }};
}
use must_be;

fn identity(key: &str) -> Identity {
    Identity::new("acme", "POST /charges", key)
}

fn token() -> Token {
    Token::random().expect("the operating system has random numbers")
}

/// A first attempt under `key`, to be run again if it is lost.
fn request(key: &str) -> ClaimRequest {
    ClaimRequest {
        identity: identity(key),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: token(),
        lost: Lost::Rerun,
        lease: LEASE,
        ttl: TTL,
    }
}

fn request_with(key: &str, lost: Lost) -> ClaimRequest {
    ClaimRequest {
        lost,
        ..request(key)
    }
}

/// The same request from another client or process: its token differs.
fn again(request: &ClaimRequest) -> ClaimRequest {
    ClaimRequest {
        token: token(),
        ..request.clone()
    }
}

/// Another request under the same key.
fn other(request: &ClaimRequest) -> ClaimRequest {
    ClaimRequest {
        token: token(),
        fingerprint: Fingerprint::of_bytes(b"another request"),
        ..request.clone()
    }
}

/// A claim of the same record by somebody who does not hold it.
fn foreign(claim: &Claim) -> Claim {
    Claim {
        token: token(),
        ..claim.clone()
    }
}

async fn claim(store: &impl Store, request: &ClaimRequest) -> Claimed {
    store.claim(request).await.expect("a claim is answered")
}

async fn acquire(store: &impl Store, request: &ClaimRequest) -> Claim {
    match claim(store, request).await {
        Claimed::Acquired(claim) => claim,
        other => panic!("expected the claim to be acquired, not {other:?}"),
    }
}

async fn abandoned(store: &impl Store, request: &ClaimRequest) -> Claim {
    match claim(store, request).await {
        Claimed::Abandoned(claim) => claim,
        other => panic!("expected the operation to be abandoned, not {other:?}"),
    }
}

/// A record that was claimed and completed, and its answer.
async fn answered(store: &impl Store, request: &ClaimRequest) -> (Claim, Completion) {
    let claim = acquire(store, request).await;
    let completion = completion("the answer");
    let completed = store.complete(&claim, &completion).await;
    completed.expect("the completion is written");
    (claim, completion)
}

/// A record that was claimed and is held.
async fn held(store: &impl Store, request: &ClaimRequest) -> Claim {
    let claim = acquire(store, request).await;
    let result = store.hold(&claim, &references("charge", "ch_1")).await;
    result.expect("the record is held");
    claim
}

async fn lookup(store: &impl Store, request: &ClaimRequest) -> Option<Existing> {
    let found = store.lookup(&request.identity, &request.fingerprint).await;
    found.expect("a lookup is answered")
}

async fn completed(store: &impl Store, request: &ClaimRequest) -> Completed {
    match lookup(store, request).await {
        Some(Existing::Completed(completed)) => *completed,
        other => panic!("expected a completed record, not {other:?}"),
    }
}

async fn list(store: &impl Store, after: Option<RecordId>, limit: u32) -> Vec<HeldRecord> {
    let page = store.list_held(after, limit).await;
    page.expect("held records can be listed")
}

fn envelope(body: &str) -> Envelope {
    Envelope::new(Response::new(Bytes::copy_from_slice(body.as_bytes())))
}

fn completion(body: &str) -> Completion {
    Completion {
        answer: envelope(body),
        references: References::default(),
    }
}

fn references(kind: &str, id: &str) -> References {
    let mut references = References::default();
    references.push(kind, id).expect("the pair is valid");
    references
}

fn renewal(claim: &Claim) -> LeaseRenewal {
    LeaseRenewal {
        claim: claim.clone(),
        lease: LEASE,
    }
}

fn kind<T: Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.expect_err("the step is refused").kind()
}

fn must_be_refused<T: Debug>(result: Result<T, StoreError>) {
    assert_eq!(kind(result), StoreErrorKind::ClaimLost);
}

/// Checks that `claim` is still the one that holds its record.
async fn must_be_held_by(store: &impl Store, claim: &Claim, request: &ClaimRequest) {
    must_be!(
        lookup(store, request).await,
        Some(Existing::InProgress { .. })
    );
    let completion = completion("by the owner");
    let result = store.complete(claim, &completion).await;
    result.expect("the owner completes its record");
    assert_eq!(completed(store, request).await.answer, completion.answer);
}

#[cfg(test)]
mod tests {
    /// A rule that is written and not listed would never run.
    #[test]
    fn every_rule_is_listed() {
        let list = include_str!("mod.rs");
        let list = list.split("@rules $subject;").nth(1).unwrap_or_default();
        let list = list.split("};").next().unwrap_or_default();
        let listed: Vec<_> = list.split_whitespace().collect();
        let sources = [
            include_str!("claiming.rs"),
            include_str!("completing.rs"),
            include_str!("expiring.rs"),
            include_str!("extending.rs"),
            include_str!("finding.rs"),
            include_str!("holding.rs"),
            include_str!("isolation.rs"),
            include_str!("losing.rs"),
            include_str!("races.rs"),
            include_str!("releasing.rs"),
            include_str!("resolving.rs"),
            include_str!("sweeping.rs"),
        ];
        for source in sources {
            for rule in source.split("pub async fn ").skip(1) {
                let name = rule.split('<').next().unwrap_or_default();
                assert!(listed.contains(&name), "{name} is not listed");
            }
        }
    }
}
