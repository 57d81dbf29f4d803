use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::report;
use super::work::Worker;
use crate::backoff::Backoff;
use crate::outbox::error::OutboxError;
use crate::outbox::publisher::{PublishError, PublishErrorKind, Publisher};
use crate::outbox::queue::{Claimed, Marked};

/// How a turn of a partition ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing of the partition is left to do now.
    Over,
    /// Others get their turn, and there may be more.
    More,
    /// The receiver cannot be reached.
    Unavailable {
        /// For how long it wants to be left alone.
        asked_for: Duration,
        /// Whether the message was given back.
        given_back: bool,
    },
}

impl<P: Publisher> Worker<P> {
    /// Publishes a claimed message and those behind it, one after another.
    pub(super) async fn turn(&self, claimed: Claimed, mut since: Instant) -> Turn {
        let mut claimed = claimed;
        let mut left = self.settings.batch;
        loop {
            left -= 1;
            if let Err(error) = self.publish(&claimed, since).await {
                return self.failed(&claimed, error).await;
            }
            let go_on = left > 0 && !self.signals.stop.is_cancelled();
            since = Instant::now();
            match self.mark(&claimed, go_on).await {
                Some(Marked::Next(next)) => claimed = *next,
                Some(Marked::Done) if !go_on => return Turn::More,
                _ => return Turn::Over,
            }
        }
    }

    /// `since` is a moment before the claim was sent, so that this process never thinks a lease
    /// longer than the database does.
    async fn publish(&self, claimed: &Claimed, since: Instant) -> Result<(), PublishError> {
        let message = &claimed.message;
        if claimed.is_damaged {
            return Err(PublishError::permanent("its headers cannot be read"));
        }
        if message.attempt() > self.settings.max_attempts {
            // Nobody has seen the end of the last attempt.
            return Err(PublishError::permanent("every attempt was lost"));
        }
        let limit = (self.settings.lease / 2).saturating_sub(since.elapsed());
        if limit.is_zero() {
            // It would be begun and not finished, which is no fault of the message.
            return Err(PublishError::unavailable(
                "the claim took half of its lease",
            ));
        }
        match timeout(limit, self.publisher.publish(message)).await {
            Ok(result) => result,
            Err(elapsed) => Err(PublishError::retryable(elapsed)),
        }
    }

    /// Tries until the lease is over: a message whose mark is missing is published again.
    async fn mark(&self, claimed: &Claimed, go_on: bool) -> Option<Marked> {
        let id = claimed.message.id();
        let give_up = Instant::now() + self.settings.lease / 2;
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        let mut marked = self.queue.sent(claimed, go_on).await;
        while let Err(error) = &marked {
            report(error, "cannot mark a message as sent");
            if Instant::now() >= give_up {
                return None;
            }
            backoff.pause().await;
            // Whether the first try has claimed the next message is not known: its lease will tell.
            marked = self.queue.sent(claimed, false).await;
        }
        let marked = marked.ok()?;
        if let Marked::Lost = marked {
            self.refused(claimed);
        } else {
            self.signals.counters.sent.add(1);
            tracing::debug!(message = %id, topic = claimed.message.topic(), "sent");
        }
        Some(marked)
    }

    async fn failed(&self, claimed: &Claimed, error: PublishError) -> Turn {
        let is_last = claimed.message.attempt() >= self.settings.max_attempts;
        let written = match error.kind() {
            PublishErrorKind::Unavailable => self.pause(claimed, &error).await,
            PublishErrorKind::Retryable if !is_last => self.pause(claimed, &error).await,
            _ => self.die(claimed, &error).await,
        };
        match &written {
            Ok(true) => {}
            Ok(false) => self.refused(claimed),
            // The lease will run out.
            Err(error) => report(error, "cannot give a message back"),
        }
        match error.kind() {
            PublishErrorKind::Unavailable => Turn::Unavailable {
                asked_for: self.asked_for(&error),
                given_back: matches!(written, Ok(true)),
            },
            _ => Turn::Over,
        }
    }

    async fn pause(&self, claimed: &Claimed, error: &PublishError) -> Result<bool, OutboxError> {
        let (message, text) = (&claimed.message, error.chain());
        let attempt = message.attempt();
        tracing::warn!(message = %message.id(), topic = message.topic(), attempt, error = text, "message is not published");
        let counts = error.kind() == PublishErrorKind::Retryable;
        let pause = full_jitter(self.settings.backoff, attempt).max(self.asked_for(error));
        let given_back = self.queue.pause(claimed, &text, pause, counts).await?;
        if counts {
            self.signals.counters.failed.add(u64::from(given_back));
        }
        Ok(given_back)
    }

    /// What the receiver asks for, within reason.
    fn asked_for(&self, error: &PublishError) -> Duration {
        error.retry_after().min(self.settings.backoff.1)
    }

    async fn die(&self, claimed: &Claimed, error: &PublishError) -> Result<bool, OutboxError> {
        let (message, text) = (&claimed.message, error.chain());
        let attempt = message.attempt();
        tracing::error!(message = %message.id(), topic = message.topic(), attempt, error = text, "message is dead: see list_dead");
        let is_dead = self.queue.die(claimed, &text).await?;
        self.signals.counters.dead.add(u64::from(is_dead));
        Ok(is_dead)
    }

    fn refused(&self, claimed: &Claimed) {
        self.signals.counters.refused.add(1);
        tracing::warn!(message = %claimed.message.id(), "claim of a message was lost to another relay");
    }
}

/// Any time up to a bound that doubles: of all jitters, this one spreads those who failed together
/// most evenly (Brooker, "Exponential Backoff And Jitter", 2015).
fn full_jitter((first, max): (Duration, Duration), attempt: u32) -> Duration {
    let bound = bound(first, max, attempt);
    // Without random numbers the pause is merely not spread.
    let random = getrandom::u32().unwrap_or(u32::MAX);
    bound.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

fn bound(first: Duration, max: Duration, attempt: u32) -> Duration {
    let doublings = attempt.saturating_sub(1).min(31);
    first.saturating_mul(1 << doublings).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_of_a_pause_doubles_up_to_the_limit() {
        let (first, max) = (Duration::from_secs(1), Duration::from_secs(300));
        let bounds: Vec<u64> = [1, 2, 3, 9, 10, u32::MAX]
            .map(|attempt| bound(first, max, attempt).as_secs())
            .to_vec();
        assert_eq!(bounds, [1, 2, 4, 256, 300, 300]);
    }

    #[test]
    fn a_pause_is_anything_up_to_its_bound() {
        let limits = (Duration::from_secs(8), Duration::from_secs(8));
        let pauses: Vec<Duration> = (0..1000).map(|_| full_jitter(limits, 1)).collect();
        assert!(pauses.iter().all(|pause| *pause <= limits.0));
        assert!(pauses.iter().any(|pause| *pause < Duration::from_secs(1)));
        assert!(pauses.iter().any(|pause| *pause > Duration::from_secs(7)));
    }
}
