//! Futures that are dropped half-way.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "a helper of tests, not all of which cut futures"
)]

use std::pin::Pin;
use std::task::{Context, Poll};

use super::fired::fired;

/// Polls a future so many times, and then drops it.
#[derive(Debug)]
pub struct Cut<F> {
    future: Option<F>,
    polls: usize,
    late: bool,
}

impl<F> Cut<F> {
    /// Cuts it after so many polls: `late`, at the next wake, when what it waits for is there, or at
    /// once, while that is under way.
    pub fn new(future: F, polls: usize, late: bool) -> Self {
        Self {
            future: Some(future),
            polls,
            late,
        }
    }
}

impl<F: Future + Unpin> Future for Cut<F> {
    /// `None`: it was dropped.
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let is_over = self.polls == 0;
        self.polls = self.polls.saturating_sub(1);
        let future = self.future.as_mut().filter(|_| !is_over);
        let polled = future.map(|future| Pin::new(future).poll(context));
        match polled {
            Some(Poll::Ready(output)) => Poll::Ready(Some(output)),
            Some(Poll::Pending) if self.late || self.polls > 0 => Poll::Pending,
            _ => {
                if self.future.take().is_some() {
                    fired("cancelled");
                }
                Poll::Ready(None)
            }
        }
    }
}
