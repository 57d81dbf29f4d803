//! What has to hold in every state, and what has to be reached.

use stateright::Property;

use super::record::{Row, State, Statement};
use super::{Class, Handler, Key, Lease};

/// `critical` and `high`, where handlers ask whether they are current; phases in any class.
pub const I1: &str = "I-1 at most one effect for a key";
/// Every class. `medium` promises no more of effects outside of the database: it runs a lost attempt
/// again, and what that had done is done again. But no two attempts hold the claim at once, and one
/// answer is recorded.
pub const CLAIM: &str = "at most one attempt holds the claim, and no other is current";
/// Every class.
pub const I4: &str = "I-4 a recorded answer is never lost, and is every later answer";
/// Every class.
pub const I5: &str = "I-5 no key is stuck";
/// Every class.
pub const I6: &str = "I-6 no write of an attempt is accepted after another has claimed";
/// Every class.
pub const ONCE: &str = "a recorded request never runs again";
/// Every class.
pub const C11: &str = "C11 no claim is in its own way";
/// To be reached: where it never happens, nothing was shown.
pub const TAKEOVER: &str = "sometimes a lost attempt is taken over";
/// To be reached: what is not promised.
pub const RERUN: &str = "sometimes an effect is made again";
/// To be reached.
pub const ZOMBIE: &str = "sometimes a write after the claim was lost is refused";
/// To be reached.
pub const LOST_CLAIM: &str = "sometimes a claim meets itself after a lost acknowledgement";
/// To be reached.
pub const LOST_COMPLETION: &str =
    "sometimes a completion meets itself after a lost acknowledgement";

pub(super) fn of(lease: &Lease) -> Vec<Property<Lease>> {
    let mut properties = vec![
        Property::always(CLAIM, |_, s: &Vec<Key>| {
            s.iter().all(Key::is_claim_exclusive)
        }),
        Property::always(I4, |_, s: &Vec<Key>| s.iter().all(Key::stands)),
        Property::always(I5, |m: &Lease, s: &Vec<Key>| {
            s.iter().all(|key| m.heals(key))
        }),
        Property::always(I6, |_, s: &Vec<Key>| !s.iter().any(|key| key.stale_write)),
        Property::always(ONCE, |_, s: &Vec<Key>| !s.iter().any(|key| key.ran_again)),
        Property::always(C11, |_, s: &Vec<Key>| !s.iter().any(|key| key.in_own_way)),
        Property::sometimes(ZOMBIE, |_, s: &Vec<Key>| {
            let is_anothers = |me, row: Row| row.token != me;
            s.iter()
                .any(|key| key.about_to(Statement::Complete, is_anothers))
        }),
        Property::sometimes(LOST_CLAIM, |_, s: &Vec<Key>| {
            let is_mine = |me, row: Row| row.token == me && row.state == State::Running;
            s.iter().any(|key| key.about_to(Statement::Select, is_mine))
        }),
        Property::sometimes(LOST_COMPLETION, |_, s: &Vec<Key>| {
            let is_mine = |me, row: Row| row.state == State::Completed(me);
            s.iter()
                .any(|key| key.about_to(Statement::CompleteLook, is_mine))
        }),
    ];
    if lease.class != Class::Medium || lease.handler == Handler::Phase {
        properties.push(Property::always(I1, |_, s: &Vec<Key>| {
            s.iter().all(|key| key.effects < 2)
        }));
    }
    if lease.class == Class::Medium && lease.handler != Handler::Phase {
        properties.push(Property::sometimes(RERUN, |_, s: &Vec<Key>| {
            s.iter().any(|key| key.effects > 1)
        }));
    }
    // What is held is not taken over, unless phases of it are finished.
    if lease.class != Class::Critical || lease.handler == Handler::Phase {
        properties.push(Property::sometimes(TAKEOVER, |_, s: &Vec<Key>| {
            s.iter().any(Key::is_taken_over)
        }));
    }
    properties
}
