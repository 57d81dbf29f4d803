//! What is done to which messages.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::exchange::{Exchange, normal};
use crate::fired::fired;
use crate::wait::PATIENCE;

/// Which messages a rule is about.
#[derive(Debug, Clone)]
pub struct Match {
    words: String,
    is_reply: bool,
}

/// What executes a statement that contains these words, before it reaches the server. `startup` is
/// a new connection.
#[must_use]
pub fn request(words: &str) -> Match {
    Match {
        words: normal(words),
        is_reply: false,
    }
}

/// All that is answered to such a statement, when the server is ready for another, so that what is
/// not in a transaction is committed; before any of it reaches the client.
#[must_use]
pub fn reply(words: &str) -> Match {
    Match {
        is_reply: true,
        ..request(words)
    }
}

/// How connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// In order.
    Fin,
    /// With a reset.
    Reset,
}

/// What is done to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Passed on later.
    Delay(Duration),
    /// Passed on when the test [releases](Fault::release) it.
    Hold,
    /// Not passed on; both sides are closed.
    Cut(Close),
    /// Passed on, and the client's side reset. The server works on what it has got, and only then
    /// reads its end of file.
    CutClient,
    /// Not passed on, and nothing after it; the client's side stays open. So does the server's, or
    /// it is closed.
    Blackhole {
        /// Whether the server's side stays open, too.
        server_open: bool,
    },
    /// The server fails with this SQLSTATE in place of executing it. For requests.
    Fail(&'static str),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Delay(_) => "proxy delay",
            Self::Hold => "proxy hold",
            Self::Cut(_) => "proxy cut",
            Self::CutClient => "proxy cut client",
            Self::Blackhole { .. } => "proxy blackhole",
            Self::Fail(_) => "proxy fail",
        }
    }
}

/// A rule that is being made.
#[derive(Debug)]
#[must_use]
pub struct Rule<'a> {
    rules: &'a Rules,
    matching: Match,
    skipped: usize,
    times: usize,
}

impl<'a> Rule<'a> {
    pub(super) fn new(rules: &'a Rules, matching: Match) -> Self {
        Self {
            rules,
            matching,
            skipped: 0,
            times: 1,
        }
    }

    /// Begins with the nth match, counted from 1.
    pub fn nth(mut self, nth: usize) -> Self {
        self.skipped = nth.saturating_sub(1);
        self
    }

    /// For so many matches. Default: 1.
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// From now on.
    ///
    /// # Panics
    ///
    /// When it makes no sense.
    #[must_use = "a fault that is not asked whether it fired proves nothing"]
    pub fn does(self, action: Action) -> Fault {
        let fails = matches!(action, Action::Fail(_));
        assert!(!(fails && self.matching.is_reply), "it is executed already");
        let (released, _) = watch::channel(false);
        let (fired, _) = watch::channel(0);
        let fault = Fault(Arc::new(Inner {
            matching: self.matching,
            action,
            skipped: self.skipped,
            times: self.times,
            met: AtomicUsize::new(0),
            fired,
            released,
        }));
        self.rules
            .0
            .lock()
            .expect("no panic holds it")
            .push(fault.clone());
        fault
    }
}

/// A rule that is in force, until it has been for all its times.
#[derive(Debug, Clone)]
pub struct Fault(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    matching: Match,
    action: Action,
    skipped: usize,
    times: usize,
    met: AtomicUsize,
    fired: watch::Sender<usize>,
    released: watch::Sender<bool>,
}

impl Fault {
    /// How often it was done.
    #[must_use]
    pub fn fired(&self) -> usize {
        *self.0.fired.borrow()
    }

    /// Waits until it was done this often.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub async fn has_fired(&self, times: usize) {
        let mut fired = self.0.fired.subscribe();
        let enough = fired.wait_for(|fired| *fired >= times);
        let waited = tokio::time::timeout(PATIENCE, enough).await;
        assert!(
            waited.is_ok(),
            "fired {} times, not {times}: {self:?}",
            self.fired()
        );
    }

    /// Passes on what is held, now and later.
    pub fn release(&self) {
        self.0.released.send_replace(true);
    }

    pub(super) async fn released(&self) {
        let mut released = self.0.released.subscribe();
        // The sender lives as long as this does.
        let _ = released.wait_for(|released| *released).await;
    }

    pub(super) fn fire(&self) -> &Action {
        self.0.fired.send_modify(|fired| *fired += 1);
        fired(self.0.action.name());
        &self.0.action
    }

    fn meets(&self, exchange: &Exchange, is_reply: bool) -> bool {
        let Match {
            words,
            is_reply: for_replies,
        } = &self.0.matching;
        if *for_replies != is_reply || !exchange.executed.iter().any(|text| text.contains(words)) {
            return false;
        }
        let met = self.0.met.fetch_add(1, Ordering::SeqCst);
        (self.0.skipped..self.0.skipped.saturating_add(self.0.times)).contains(&met)
    }
}

/// All rules of a proxy.
#[derive(Debug, Default)]
pub(super) struct Rules(Mutex<Vec<Fault>>);

impl Rules {
    /// The first rule that is about this one. It has met it then.
    pub(super) fn find(&self, exchange: &Exchange, is_reply: bool) -> Option<Fault> {
        let rules = self.0.lock().expect("no panic holds it");
        let mut rules = rules.iter();
        rules.find(|rule| rule.meets(exchange, is_reply)).cloned()
    }

    pub(super) fn clear(&self) {
        self.0.lock().expect("no panic holds it").clear();
    }
}
