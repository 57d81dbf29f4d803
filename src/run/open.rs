//! How an operation gets its transaction.

use std::time::SystemTime;

use super::Exchange;
use super::claim::Grant;
use super::follow::{Ask, Asked};
use crate::moment::Moment;
use crate::policy::Lost;
use crate::running::IN_PROGRESS;
use crate::store::{
    Begun, ClaimRequest, Claimed, Existing, StoreError, StoreErrorKind, Token, TransactionalStore,
};

/// How an operation enters.
pub(super) enum Way<T> {
    /// Run the handler in this transaction.
    Open(T),
    /// A leased attempt of the same operation was lost; answer that.
    Abandoned(Grant),
}

/// Asks for a transaction.
pub(super) struct Opening<'a, S> {
    exchange: &'a Exchange<S>,
    pub(super) attempt: ClaimRequest,
    /// The record is no older.
    pub(super) sent: Moment,
}

impl<'a, S: TransactionalStore> Opening<'a, S> {
    pub(super) fn new(exchange: &'a Exchange<S>, token: Token) -> Self {
        Self {
            exchange,
            attempt: exchange.claim_request(token),
            sent: Moment::now(),
        }
    }
}

/// Rounds of entering, each of which means that a record came or went between two statements.
const ROUNDS: u32 = 4;

impl<S: TransactionalStore> Ask for Opening<'_, S> {
    type Right = Way<S::Transaction>;

    /// A replay opens no transaction, and waiting holds none.
    async fn ask(&mut self) -> Result<Asked<Self::Right>, StoreError> {
        for _ in 0..=ROUNDS {
            if let Some(asked) = self.open().await? {
                return Ok(asked);
            }
        }
        Err(StoreError::unavailable("record changed in every round"))
    }
}

impl<S: TransactionalStore> Opening<'_, S> {
    /// `None`: look again.
    async fn open(&mut self) -> Result<Option<Asked<Way<S::Transaction>>>, StoreError> {
        let exchange = self.exchange;
        self.sent = Moment::now();
        let store = &exchange.shared.core.store;
        let lookup = || store.lookup(&exchange.identity, &exchange.fingerprint);
        if let Some(existing) = exchange.guarded(lookup).await? {
            let is_lost =
                matches!(&existing, Existing::InProgress { lease_left } if lease_left.is_zero());
            if !is_lost {
                return Ok(Some(Asked::Existing(existing)));
            }
        }
        let limit = exchange.policy.execution_limit;
        let limit = limit.unwrap_or(S::EXECUTION_LIMIT);
        // The store has just answered. That no transaction is free says nothing of it, and must not
        // keep others from their replays.
        let begun = exchange.until_timeout(|| store.begin(&self.attempt, limit));
        match begun.await? {
            Begun::Open(transaction) => Ok(Some(Asked::Granted(Way::Open(transaction)))),
            Begun::Locked => Ok(Some(Asked::Existing(IN_PROGRESS))),
            Begun::Recorded => self.clear().await,
        }
    }

    /// A record is in the way. It is what a leased attempt may have left behind, or an answer that is
    /// over: a claim knows what to do with either, and is given up again.
    async fn clear(&self) -> Result<Option<Asked<Way<S::Transaction>>>, StoreError> {
        let exchange = self.exchange;
        let store = &exchange.shared.core.store;
        let sent = Moment::now();
        let mut unheard = false;
        // Nothing runs under it, so nothing is unknown where it is lost. What takes it back must never
        // take the record of the transaction for it.
        let claim = ClaimRequest {
            token: Token::random()?,
            lost: Lost::Rerun,
            ..self.attempt.clone()
        };
        let claimed = exchange.try_claim(&claim, &mut unheard).await;
        if unheard && matches!(claimed, Ok(Claimed::Existing(_)) | Err(_)) {
            exchange.withdraw(claim.claim(0, SystemTime::UNIX_EPOCH));
        }
        match claimed? {
            Claimed::Acquired(claim) => {
                let released = exchange.until_timeout(|| store.release(&claim)).await;
                // Or its lease ended meanwhile, and somebody else has the record.
                let is_over = |error: &StoreError| error.kind() == StoreErrorKind::ClaimLost;
                let failed = released.err().filter(|error| !is_over(error));
                if unheard || failed.is_some() {
                    exchange.withdraw(claim);
                }
                failed.map_or(Ok(None), Err)
            }
            Claimed::Abandoned(claim) => {
                let grant = Grant {
                    claim,
                    sent,
                    leased: sent,
                    unheard,
                };
                Ok(Some(Asked::Granted(Way::Abandoned(grant))))
            }
            Claimed::Existing(existing) => Ok(Some(Asked::Existing(existing))),
        }
    }
}
