//! Waiting for something to be so, with a deadline.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::random::fresh_key;

/// Long enough for a busy machine; nothing that works takes as long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks until there is an answer.
///
/// # Panics
///
/// When there is none in time.
pub async fn until<T, F>(what: &str, mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Keeps handlers from ending until it is opened: a file that they wait for.
#[derive(Debug)]
pub struct Gate(PathBuf);

impl Gate {
    /// A closed one.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "each is another file")]
    pub fn new() -> Self {
        Self(std::env::temp_dir().join(format!("faults-gate-{}", fresh_key())))
    }

    /// What a handler has to be asked for.
    #[must_use]
    pub fn behave(&self) -> String {
        format!("gate={}", self.0.display())
    }

    /// Lets the handlers go on, in whatever process.
    ///
    /// # Panics
    ///
    /// When the temporary directory cannot be written.
    pub fn open(&self) {
        std::fs::write(&self.0, "").expect("the temporary directory is writable");
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
