//! Which faults there are, in which order, for how long: all of it told by a seed.

use std::fmt;
use std::time::Duration;

use super::counts::Class;
use crate::random::Random;

/// One fault, and the quiet before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The quiet.
    pub gap: Duration,
    /// What is done.
    pub class: Class,
    /// For how long, where it lasts.
    pub window: Duration,
    /// A number to choose by: how many statements, which process of the server.
    pub choice: u64,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gap, window) = (self.gap.as_millis(), self.window.as_millis());
        let (name, choice) = (self.class.name(), self.choice);
        write!(f, "after {gap} ms {name} for {window} ms choice {choice}")
    }
}

/// What the faults of a lane are done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// A subject, and the way between it and the server.
    Subject(usize),
    /// The server.
    Server,
}

/// The steps of one lane, without an end. Every class of the lane comes once before any comes again.
#[derive(Debug)]
pub struct Steps {
    random: Random,
    lane: Lane,
    /// The mean of the gaps, in milliseconds.
    mean: u64,
    deck: Vec<Class>,
}

/// In front of a subject. A kill is what most often leaves something unknown.
const SUBJECT: [Class; 14] = [
    Class::Kill,
    Class::Kill,
    Class::Terminate,
    Class::Stop,
    Class::Cut,
    Class::Delay,
    Class::Blackhole,
    Class::Strand,
    Class::Refuse,
    Class::LostClaim,
    Class::LostCompletion,
    Class::LostCommit,
    Class::CommitLost,
    Class::Conflict,
];

const SERVER: [Class; 3] = [Class::BackendKill, Class::BackendKill, Class::Restart];

impl Steps {
    /// Of a lane, under a seed. The rate is drawn, too: it is the same for all subjects.
    #[must_use]
    pub fn new(seed: u64, lane: Lane) -> Self {
        let mut shared = Random::from_seed(seed ^ 0x7261_7465);
        let (between, crashes) = (600 + shared.below(900), 4000 + shared.below(4000));
        let (number, mean) = match lane {
            Lane::Subject(number) => (number as u64 + 1, between),
            Lane::Server => (0, crashes),
        };
        Self {
            random: Random::from_seed(seed.rotate_left(17) ^ (number << 32)),
            lane,
            mean,
            deck: Vec::new(),
        }
    }

    fn draw(&mut self) -> Class {
        if self.deck.is_empty() {
            self.deck = match self.lane {
                Lane::Subject(_) => SUBJECT.to_vec(),
                Lane::Server => SERVER.to_vec(),
            };
            for last in (1..self.deck.len()).rev() {
                let other = self.random.below(last as u64 + 1);
                self.deck.swap(last, usize::try_from(other).unwrap_or(0));
            }
        }
        self.deck.pop().unwrap_or(Class::Kill)
    }
}

impl Iterator for Steps {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let class = self.draw();
        let window = match class {
            // Past the lease, and the heartbeats with it.
            Class::Stop => 1200 + self.random.below(1000),
            Class::Blackhole => 150 + self.random.below(1200),
            Class::Strand | Class::Refuse => 100 + self.random.below(400),
            Class::Delay
            | Class::LostClaim
            | Class::LostCompletion
            | Class::LostCommit
            | Class::CommitLost
            | Class::Conflict => 200 + self.random.below(600),
            _ => 0,
        };
        let gap = self.mean / 2 + self.random.below(self.mean);
        Some(Step {
            gap: Duration::from_millis(gap),
            class,
            window: Duration::from_millis(window),
            choice: self.random.below(1000),
        })
    }
}

/// The lanes of a run.
pub fn lanes(subjects: usize) -> impl Iterator<Item = Lane> {
    (0..subjects).map(Lane::Subject).chain([Lane::Server])
}

/// What a run with this seed does, as text. What a fault takes beyond its window is not foreseen.
#[must_use]
pub fn describe(seed: u64, subjects: usize, time: Duration) -> String {
    let mut text = String::new();
    for lane in lanes(subjects) {
        let mut at = Duration::ZERO;
        for step in Steps::new(seed, lane) {
            at += step.gap;
            if at >= time {
                break;
            }
            text += &format!("{} ms {lane:?} {step}\n", at.as_millis());
            at += step.window;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_MINUTES: Duration = Duration::from_secs(120);

    #[test]
    fn the_same_seed_gives_the_same_schedule_and_another_one_another() {
        assert_eq!(describe(7, 3, TWO_MINUTES), describe(7, 3, TWO_MINUTES));
        assert_ne!(describe(7, 3, TWO_MINUTES), describe(8, 3, TWO_MINUTES));
    }

    #[test]
    fn every_class_comes_within_two_minutes_under_any_seed() {
        for seed in 0..200 {
            for (lane, classes) in [(Lane::Subject(1), &SUBJECT[..]), (Lane::Server, &SERVER)] {
                let steps = Steps::new(seed, lane).take(classes.len());
                let steps: Vec<_> = steps.collect();
                let time: Duration = steps.iter().map(|step| step.gap + step.window).sum();
                assert!(time < TWO_MINUTES / 2, "{time:?}");
                for class in classes {
                    assert!(steps.iter().any(|step| step.class == *class));
                }
            }
        }
    }
}
