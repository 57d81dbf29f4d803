//! What is compared, and how each of it is set up.

use std::error::Error;
use std::fmt;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, post};
use serde::{Deserialize, Serialize};
use tower_idempotency::{IdempotencyLayer, PgStore, Policy, Scope};

use crate::load::Sessions;
use crate::naive;
use crate::peer;
use crate::serve::{App, charge, charge_alone, charge_within, list};

/// One way to make retries safe, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Variant {
    /// The handler alone.
    Bare,
    /// The handler in a transaction of its own.
    BareTransaction,
    /// The same with a lock and a record, written into the handler by hand.
    OneTransaction,
    /// Looks the key up, inserts it, runs, updates it: what people write.
    Naive,
    /// The same with a pool of 64, whose connections are not tested.
    Naive64,
    /// Inserts the key, and looks it up where it is taken.
    InsertFirst,
    InsertFirst64,
    Leased,
    LeasedCache,
    /// Each statement goes alone.
    LeasedSingle,
    Transactional,
    TransactionalCache,
    /// What is found in the memory of one process, without a claim.
    AxumIdempotent,
    /// The same with a session for each connection: with each answer that it keeps, it passes over all
    /// that it has kept of the session.
    AxumIdempotentSessions,
}

impl Variant {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::BareTransaction => "bare-transaction",
            Self::OneTransaction => "one-transaction",
            Self::Naive => "naive",
            Self::Naive64 => "naive-64",
            Self::InsertFirst => "insert-first",
            Self::InsertFirst64 => "insert-first-64",
            Self::Leased => "leased",
            Self::LeasedCache => "leased-cache",
            Self::LeasedSingle => "leased-single",
            Self::Transactional => "transactional",
            Self::TransactionalCache => "transactional-cache",
            Self::AxumIdempotent => "axum-idempotent",
            Self::AxumIdempotentSessions => "axum-idempotent-sessions",
        }
    }

    /// How many connections the pool of its handler has, none of which is tested before it is used;
    /// `None` is what sqlx does where nothing is said: ten, which are.
    pub(crate) fn pool(self) -> Option<u32> {
        match self {
            Self::Naive => None,
            Self::Naive64 | Self::InsertFirst64 => Some(64),
            _ => Some(10),
        }
    }

    pub(crate) fn sessions(self) -> Sessions {
        match self {
            Self::AxumIdempotent => Sessions::One,
            Self::AxumIdempotentSessions => Sessions::Each,
            _ => Sessions::None,
        }
    }

    /// Whether its records are found by this crate's own tables.
    pub(crate) fn is_own(self) -> bool {
        matches!(
            self,
            Self::Leased
                | Self::LeasedCache
                | Self::LeasedSingle
                | Self::Transactional
                | Self::TransactionalCache
        )
    }

    /// Whether its handler runs for each request, also for one that was answered before.
    pub(crate) fn runs_always(self) -> bool {
        matches!(self, Self::Bare | Self::BareTransaction)
    }

    fn has_cache(self) -> bool {
        matches!(self, Self::LeasedCache | Self::TransactionalCache)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

pub(crate) async fn router(variant: Variant, app: &App) -> Result<Router, Box<dyn Error>> {
    let charges = match variant {
        Variant::Bare => post(charge).get(list),
        Variant::BareTransaction => post(charge_alone),
        Variant::OneTransaction => post(naive::one_transaction),
        Variant::Naive | Variant::Naive64 => {
            post(charge).layer(from_fn_with_state(app.pool.clone(), naive::select_first))
        }
        Variant::InsertFirst | Variant::InsertFirst64 => {
            post(charge).layer(from_fn_with_state(app.pool.clone(), naive::insert_first))
        }
        Variant::AxumIdempotent | Variant::AxumIdempotentSessions => {
            let router = Router::new().route("/charges", post(charge));
            return Ok(peer::layered(router).with_state(app.clone()));
        }
        _ => own(variant, app).await?,
    };
    let router = Router::new().route("/charges", charges);
    Ok(router.with_state(app.clone()))
}

async fn own(variant: Variant, app: &App) -> Result<MethodRouter<App>, Box<dyn Error>> {
    let store = store(variant, app);
    let layer = IdempotencyLayer::new(store, Scope::global()).with_policy(policy(variant))?;
    Ok(match variant {
        Variant::Transactional | Variant::TransactionalCache => {
            post(charge_within).layer(layer.transactional())
        }
        _ => post(charge).get(list).layer(layer),
    })
}

fn store(variant: Variant, app: &App) -> PgStore {
    PgStore::builder(app.pool.clone())
        .with_group_commit(variant != Variant::LeasedSingle)
        .build()
}

fn policy(variant: Variant) -> Policy {
    Policy::high().with_replay_cache(variant.has_cache())
}
