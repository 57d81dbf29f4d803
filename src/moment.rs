use std::time::{Duration, Instant, SystemTime};

/// How much the wall clock may fall behind the monotonic one without having been set back.
const SLEW: Duration = Duration::from_millis(50);

/// One point in time by both clocks: the monotonic one stands still while the machine is suspended, and the
/// other one can be set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) monotonic: Instant,
    pub(crate) wall: SystemTime,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// How long ago this was, by the clock that says more. `None` if the wall clock was set back.
    pub(crate) fn age(self, now: Self) -> Option<Duration> {
        let monotonic = now.monotonic.saturating_duration_since(self.monotonic);
        let wall = now.wall.duration_since(self.wall).ok();
        let wall = wall.or_else(|| monotonic.is_zero().then_some(Duration::ZERO))?;
        (wall + SLEW >= monotonic).then(|| monotonic.max(wall))
    }
}
