//! What the clients do, told by the seed and the number of an operation.

use tower_idempotency::Identity;

use crate::random::Random;

/// What begins every key and stands in every body, to look for in logs.
pub const MARK: &str = "raw-";

/// A route of the subjects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Leased, `critical`.
    Critical,
    /// Leased, `high`.
    High,
    /// Leased, `medium`.
    Medium,
    /// Transactional.
    Transactional,
}

impl Route {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Critical,
        Self::High,
        Self::Medium,
        Self::Transactional,
    ];

    /// Where it is.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Critical => "/critical",
            Self::High => "/high",
            Self::Medium => "/medium",
            Self::Transactional => "/transactional",
        }
    }

    /// The operation of its records.
    #[must_use]
    pub fn operation(self) -> String {
        format!("POST {}", self.path())
    }

    /// Whether one run is all there may be, whatever becomes of it.
    #[must_use]
    pub fn runs_once(self) -> bool {
        self != Self::Medium
    }
}

/// Which of the two payloads of an operation: a key stands for one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// The one that is meant.
    Own,
    /// Another one, under the same key.
    Rival,
}

impl Variant {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Own => Self::Rival,
            Self::Rival => Self::Own,
        }
    }
}

/// One logical operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Its number.
    pub number: u64,
    /// Where it is sent.
    pub route: Route,
    /// Who sends it.
    pub scope: &'static str,
    /// Under which key.
    pub key: String,
    /// Of its own payload; the rival's is one more.
    pub amount: u64,
    /// How many requests are sent at once at first.
    pub at_once: usize,
    /// Whether one of them is the rival's.
    pub is_contested: bool,
    /// How often it is sent at least.
    pub sends: u32,
    /// Whether a mismatching request follows its answer.
    pub is_mismatched: bool,
    /// Whether it is sent once more, much later.
    pub comes_back: bool,
}

/// Every eighth operation has the key of the one before it, in another scope; and another eighth, on
/// another route.
const OTHER_SCOPE: u64 = 7;
const OTHER_ROUTE: u64 = 3;

impl Operation {
    /// The operation of a number.
    #[must_use]
    pub fn new(seed: u64, number: u64) -> Self {
        let mut random = random(seed, number, 0);
        let twin = number % 8;
        let first = if matches!(twin, OTHER_SCOPE | OTHER_ROUTE) {
            number - 1
        } else {
            number
        };
        let mut route = self::random(seed, first, 1).below(4);
        if twin == OTHER_ROUTE {
            route = (route + 1) % 4;
        }
        let at_once = match random.below(10) {
            0..7 => 1,
            7..9 => 2,
            _ => 3,
        };
        let is_contested = at_once > 1 && random.below(6) == 0;
        Self {
            number,
            route: Route::ALL[usize::try_from(route).unwrap_or(0)],
            scope: if twin == OTHER_SCOPE {
                "globex"
            } else {
                "acme"
            },
            key: format!("{MARK}{seed:016x}-{first}"),
            amount: 2 * random.below(1_000_000),
            at_once,
            is_contested,
            sends: 3 + u32::try_from(random.below(2)).unwrap_or(0),
            is_mismatched: random.below(10) == 0,
            comes_back: random.below(8) == 0,
        }
    }

    /// The operation of a record, by what stands in it.
    #[must_use]
    pub fn find(seed: u64, scope: &str, operation: &str, key: &str) -> Option<Self> {
        let (_, number) = key.rsplit_once('-')?;
        let number: u64 = number.parse().ok()?;
        let candidates = [number, number + 1];
        let mut candidates = candidates.map(|number| Self::new(seed, number)).into_iter();
        candidates.find(|found| {
            found.scope == scope && found.key == key && found.route.operation() == operation
        })
    }

    /// The amount in a payload.
    #[must_use]
    pub fn amount_of(&self, variant: Variant) -> u64 {
        match variant {
            Variant::Own => self.amount,
            Variant::Rival => self.amount + 1,
        }
    }

    /// Which payload an amount is of.
    #[must_use]
    pub fn variant_of(&self, amount: u64) -> Option<Variant> {
        let mut variants = [Variant::Own, Variant::Rival].into_iter();
        variants.find(|variant| self.amount_of(*variant) == amount)
    }

    /// The payload.
    #[must_use]
    pub fn body(&self, variant: Variant) -> String {
        let (number, amount) = (self.number, self.amount_of(variant));
        format!(r#"{{"operation":{number},"amount":{amount},"note":"{MARK}payload"}}"#)
    }

    /// The identity that the layer makes of it.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity::new(self.scope, self.route.operation(), self.key.as_str())
    }
}

/// What a client does to its own request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rudeness {
    /// Waits for the answer.
    None,
    /// Closes after so many milliseconds.
    Fin(u64),
    /// Resets after so many milliseconds.
    Reset(u64),
    /// Resets when the answer has begun to come.
    Drop,
}

/// How one request is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manner {
    /// How the handler is to behave: see [`service`](super::service).
    pub behave: String,
    /// How the client does.
    pub rudeness: Rudeness,
}

impl Manner {
    /// Of the nth request of an operation. None but the first few are out of the ordinary: it is to
    /// come to an end.
    #[must_use]
    pub fn new(seed: u64, operation: &Operation, nth: u32) -> Self {
        let mut random = random(seed, operation.number, 2 + u64::from(nth));
        let size = random.below(600);
        let pause = random.below(30);
        if nth >= 4 {
            return Self {
                behave: format!("size={size}"),
                rudeness: Rudeness::None,
            };
        }
        let behave = match random.below(1000) {
            0..10 => "hang".to_owned(),
            10..24 => "panic".to_owned(),
            24..40 => "status=500".to_owned(),
            40..50 => "status=404".to_owned(),
            50..60 => "status=429".to_owned(),
            60..110 => format!("delay={}", 20 + random.below(230)),
            _ => String::new(),
        };
        let rudeness = match random.below(1000) {
            0..15 => Rudeness::Fin(pause),
            15..30 => Rudeness::Reset(pause),
            30..70 => Rudeness::Drop,
            _ => Rudeness::None,
        };
        Self {
            behave: format!("{behave} size={size}"),
            rudeness,
        }
    }
}

fn random(seed: u64, number: u64, what: u64) -> Random {
    let mixed =
        number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ what.wrapping_mul(0xd6e8_feb8_6659_fd93);
    Random::from_seed(seed.rotate_left(32) ^ mixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_found_by_its_identity_also_where_two_share_a_key() {
        for number in 0..64 {
            let operation = Operation::new(5, number);
            let (scope, key) = (operation.scope, operation.key.as_str());
            let found = Operation::find(5, scope, &operation.route.operation(), key);
            assert_eq!(found, Some(operation));
        }
        assert_eq!(Operation::new(5, 6).key, Operation::new(5, 7).key);
        assert_eq!(Operation::new(5, 2).key, Operation::new(5, 3).key);
    }
}
