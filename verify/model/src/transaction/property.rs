//! What has to hold in every state, and what has to be reached.

use stateright::Property;

use super::{Attempt, Key, Step, Transaction};

/// At most one effect.
pub const I1: &str = "I-1 at most one effect for a key";
/// Both, or none.
pub const I2: &str = "I-2 an effect if and only if a record says so";
/// The half of it that a handler cannot break which ends its transaction by itself.
pub const I2_RECORD: &str = "I-2 no record says so without the effect";
/// What was recorded.
pub const I4: &str = "I-4 every answer said to be recorded is the recorded one";
/// See `heals`.
pub const I5: &str = "I-5 no key is stuck";
/// Also for what it does outside of the database.
pub const ONCE: &str = "a recorded request never runs again";
/// A duplicate that comes meanwhile does not run.
pub const OVERLAP: &str = "no answer is recorded while another attempt is at it";
/// 503 `transaction-conflict` and every rerun rely on it.
pub const ROLLED_BACK: &str = "what was said to be rolled back is never committed";
/// To be reached.
pub const LOST_COMMIT: &str = "sometimes a commit lands whose acknowledgement is missing";
/// To be reached.
pub const WAITING: &str = "sometimes a probe has to wait for an open transaction";
/// To be reached.
pub const LOCKED: &str = "sometimes a transaction of a dead process keeps the lock";

pub(super) fn of(model: &Transaction) -> Vec<Property<Transaction>> {
    let mut properties = vec![
        Property::always(I2_RECORD, |_, s: &Vec<Key>| {
            s.iter()
                .all(|key| key.effects > 0 || key.is_effect_recorded())
        }),
        Property::always(I4, |_, s: &Vec<Key>| !s.iter().any(|key| key.contradicted)),
        Property::always(I5, |m: &Transaction, s: &Vec<Key>| {
            s.iter().all(|key| m.heals(key))
        }),
        Property::always(ONCE, |_, s: &Vec<Key>| !s.iter().any(|key| key.ran_again)),
        Property::always(OVERLAP, |_, s: &Vec<Key>| {
            !s.iter().any(|key| key.overlapped)
        }),
        Property::always(ROLLED_BACK, |_, s: &Vec<Key>| !s.iter().any(|key| key.lied)),
        Property::sometimes(LOST_COMMIT, |_, s: &Vec<Key>| {
            let found = |attempt: &Attempt| attempt.step == Step::Verdict;
            s.iter().any(|key| key.attempts.iter().any(found))
        }),
        Property::sometimes(WAITING, |m, s: &Vec<Key>| {
            s.iter().any(|key| {
                let mut attempts = key.attempts.iter().zip(0..);
                attempts.any(|(a, me)| a.step == Step::Probe && m.is_blocked(key, me))
            })
        }),
        Property::sometimes(LOCKED, |_, s: &Vec<Key>| {
            let is_left = |attempt: &Attempt| {
                attempt.step == Step::Over && attempt.tx.is_some_and(|tx| tx.locked)
            };
            s.iter().any(|key| key.attempts.iter().any(is_left))
        }),
    ];
    // What a handler commits by itself stays, and it may do so on each attempt.
    if !model.handler_commits {
        properties.push(Property::always(I1, |_, s: &Vec<Key>| {
            s.iter().all(|key| key.effects < 2)
        }));
        properties.push(Property::always(I2, |_, s: &Vec<Key>| {
            s.iter().all(Key::is_effect_recorded)
        }));
    }
    properties
}
