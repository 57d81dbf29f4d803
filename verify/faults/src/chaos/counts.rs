//! How often each fault was there, counted where it is injected.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A class of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// SIGKILL of a subject.
    Kill,
    /// SIGTERM of a subject.
    Terminate,
    /// SIGSTOP of a subject for longer than a lease.
    Stop,
    /// SIGKILL of one process of the server, which ends all its sessions.
    BackendKill,
    /// A crash of the whole server.
    Restart,
    /// All connections of a subject to the server are reset.
    Cut,
    /// Statements are delayed.
    Delay,
    /// Nothing passes for a while.
    Blackhole,
    /// The connections that are there fall silent.
    Strand,
    /// New connections are refused.
    Refuse,
    /// A claim is made, and its acknowledgement lost.
    LostClaim,
    /// An answer is recorded, and the acknowledgement lost.
    LostCompletion,
    /// A transaction is committed, and the acknowledgement lost.
    LostCommit,
    /// A commit does not reach the server.
    CommitLost,
    /// A commit fails with a serialization failure.
    Conflict,
    /// A client closes before it is answered.
    Fin,
    /// A client resets before it is answered.
    Reset,
    /// An answer is thrown away unread.
    Drop,
    /// A handler reaches its execution limit.
    Hang,
    /// A handler panics.
    Panic,
    /// A handler answers 500.
    ServerError,
    /// A handler takes its time.
    Slow,
    /// A record is swept at the end of its retention.
    Sweep,
}

impl Class {
    /// All of them, in the order in which they are printed.
    pub const ALL: [(Self, &'static str); 23] = [
        (Self::Kill, "kill"),
        (Self::Terminate, "terminate"),
        (Self::Stop, "stop"),
        (Self::BackendKill, "backend-kill"),
        (Self::Restart, "restart"),
        (Self::Cut, "cut"),
        (Self::Delay, "delay"),
        (Self::Blackhole, "blackhole"),
        (Self::Strand, "strand"),
        (Self::Refuse, "refuse"),
        (Self::LostClaim, "lost-claim"),
        (Self::LostCompletion, "lost-completion"),
        (Self::LostCommit, "lost-commit"),
        (Self::CommitLost, "commit-lost"),
        (Self::Conflict, "conflict"),
        (Self::Fin, "fin"),
        (Self::Reset, "reset"),
        (Self::Drop, "drop"),
        (Self::Hang, "hang"),
        (Self::Panic, "panic"),
        (Self::ServerError, "server-error"),
        (Self::Slow, "slow"),
        (Self::Sweep, "sweep"),
    ];

    /// As it is printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// A count of each class.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Class::ALL.len()]);

impl Counts {
    /// So many more.
    pub fn add(&self, class: Class, count: u64) {
        self.0[class as usize].fetch_add(count, Ordering::Relaxed);
    }

    /// How many there were.
    #[must_use]
    pub fn get(&self, class: Class) -> u64 {
        self.0[class as usize].load(Ordering::Relaxed)
    }

    /// Those that never were.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let classes = Class::ALL.iter();
        let missing = classes.filter(|(class, _)| self.get(*class) == 0);
        missing.map(|(_, name)| *name).collect()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faults")?;
        for (class, name) in Class::ALL {
            write!(f, " {name} {}", self.get(class))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_has_its_own_name_and_count() {
        for (n, (class, name)) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, n);
            assert_eq!(class.name(), name);
        }
        let counts = Counts::default();
        counts.add(Class::Sweep, 2);
        assert!(counts.to_string().ends_with(" slow 0 sweep 2"));
        assert_eq!(counts.missing().len(), Class::ALL.len() - 1);
    }
}
