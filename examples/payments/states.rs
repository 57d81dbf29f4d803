//! Which state of a charge may follow on which. One statement decides: it moves the charge if, and only
//! if, the state it finds is a legal one. Looking first and writing then would let two requests look at
//! the same state, and both write.

use sqlx::PgConnection;

use crate::error::ApiError;
use crate::ledger::{self, Charge};

/// A charge goes through its states in this order. It may leave some out, and never goes back.
const STATES: [&str; 4] = ["authorized", "captured", "settled", "disputed"];

#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    from: &'static [&'static str],
    to: &'static str,
}

pub(crate) const CAPTURE: Step = Step {
    from: &["authorized"],
    to: "captured",
};
pub(crate) const SETTLE: Step = Step {
    from: &["captured"],
    to: "settled",
};
pub(crate) const DISPUTE: Step = Step {
    from: &["captured", "settled"],
    to: "disputed",
};

/// What became of a step.
pub(crate) enum Moved {
    /// Taken by this transaction, which has to do what goes with it.
    Now(Charge),
    /// Taken before, with all that went with it. The charge may be further by now.
    Before,
    /// Not legal from where the charge is.
    Not(Charge),
}

/// Takes a step, if the charge is where it may be taken from.
///
/// Of two transactions that take the same step, the second waits for the first; then PostgreSQL tests
/// its condition on the row as the first has left it, and it changes no row.
pub(crate) async fn advance(
    db: &mut PgConnection,
    charge: &str,
    step: Step,
) -> Result<Moved, ApiError> {
    let update = "update payments.charge set status = $2 where id = $1 and status = any($3)
        returning id, account, amount, currency, status, refunded";
    let query = sqlx::query_as(update).bind(charge).bind(step.to);
    let moved = query.bind(step.from).fetch_optional(&mut *db).await?;
    if let Some(charge) = moved {
        return Ok(Moved::Now(charge));
    }
    // It is decided that nothing is written. This look is for the answer alone.
    let charge = ledger::any(db, charge).await?;
    if has_reached(&charge.status, step.to) {
        Ok(Moved::Before)
    } else {
        Ok(Moved::Not(charge))
    }
}

pub(crate) fn has_reached(status: &str, state: &str) -> bool {
    let place = |name| STATES.iter().position(|state| *state == name);
    place(status) >= place(state)
}
