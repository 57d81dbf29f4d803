use std::time::Duration;

use http::Method;

use super::{Duplicates, EXECUTION_LIMIT, Policy, Risk};
use crate::error::ConfigError;

/// Longest retention: ten years. Longer is a mistake, and further on, timestamps overflow.
const MAX_TTL: Duration = Duration::from_secs(3650 * 24 * 3600);
const MIN_LEASE: Duration = Duration::from_millis(100);
const MAX_KEY: usize = 4096;
const MAX_NAME: usize = 255;
const MAX_RERUNS: u32 = 10;
/// SQLite stores at most 10^9 bytes in a field, PostgreSQL 2^30 in a message; an answer that is too
/// large for its store would be tried for ever.
const MAX_BODY: usize = 1 << 29;

impl Policy {
    /// Checks the settings together.
    pub(crate) fn validate(&self, store_is_durable: bool) -> Result<(), ConfigError> {
        self.validate_times()?;
        self.validate_key()?;
        self.validate_methods()?;
        for (field, limit) in [
            ("request_limit", self.request_limit),
            ("response_limit", self.response_limit),
        ] {
            at_most(field, limit, MAX_BODY)?;
        }
        check(self.reruns <= MAX_RERUNS, "reruns", || {
            format!("must be at most {MAX_RERUNS}, not {}", self.reruns)
        })?;
        if let Some(name) = &self.operation {
            let fits = (1..=MAX_NAME).contains(&name.len()) && !name.contains('\0');
            check(fits, "operation", || {
                format!(
                    "must be 1 to {MAX_NAME} bytes without NUL, not {} bytes",
                    name.len()
                )
            })?;
        }
        let may_forget = self.risk == Risk::Critical && !store_is_durable && !self.volatile_store;
        check(!may_forget, "store", || {
            "can forget, and the policy is critical: use a durable store, or allow it with with_volatile_store(true)".into()
        })
    }

    fn validate_times(&self) -> Result<(), ConfigError> {
        let execution_limit = self.execution_limit.unwrap_or(EXECUTION_LIMIT);
        for (field, time) in [
            ("ttl", self.ttl),
            ("lease", self.lease),
            ("execution_limit", execution_limit),
            ("body_deadline", self.body_deadline),
            ("settle_timeout", self.settle_timeout),
        ] {
            check(!time.is_zero(), field, || "must be longer than zero".into())?;
            check(time <= MAX_TTL, field, || {
                format!("must be at most ten years, not {} s", time.as_secs())
            })?;
        }
        check(self.lease >= MIN_LEASE, "lease", || {
            format!(
                "must be at least {} ms, not {} ms: it is renewed three times in its length",
                MIN_LEASE.as_millis(),
                self.lease.as_millis()
            )
        })?;
        if let Duplicates::Wait(limit) = self.duplicates {
            check(!limit.is_zero(), "duplicates", || {
                "must wait longer than zero: use Duplicates::Reject".into()
            })?;
            check(limit <= MAX_TTL, "duplicates", || {
                format!("must wait at most ten years, not {} s", limit.as_secs())
            })?;
        }
        let needed = execution_limit + self.lease;
        check(needed <= self.ttl, "ttl", || {
            format!(
                "must be at least execution_limit + lease, or a running record could expire: {} s is less than {} s",
                self.ttl.as_secs_f64(),
                needed.as_secs_f64()
            )
        })
    }

    fn validate_key(&self) -> Result<(), ConfigError> {
        let (min, max) = (self.key.min, self.key.max);
        check(min >= 1 && min <= max, "key_length", || {
            format!("must have 1 <= min <= max, not {min} and {max}")
        })?;
        at_most("key_length", max, MAX_KEY)
    }

    fn validate_methods(&self) -> Result<(), ConfigError> {
        let safe = |method: &&Method| method.is_safe() || method.as_str() == "QUERY";
        match self.methods.iter().find(safe) {
            None => Ok(()),
            Some(method) => Err(ConfigError::new(
                "methods",
                format!("must not have {method}, which changes nothing"),
            )),
        }
    }
}

fn at_most(field: &'static str, value: usize, max: usize) -> Result<(), ConfigError> {
    check(value <= max, field, || {
        format!("must be at most {max} bytes, not {value}")
    })
}

fn check(
    holds: bool,
    field: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError::new(field, reason()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn refused(policy: Policy) -> &'static str {
        policy.validate(true).unwrap_err().field()
    }

    #[test]
    fn every_preset_is_valid_on_a_durable_store() {
        for risk in [Risk::Critical, Risk::High, Risk::Medium, Risk::Low] {
            assert_eq!(Policy::of(risk).validate(true), Ok(()));
        }
    }

    #[test]
    fn a_time_of_zero_is_refused_by_name() {
        let zero = Duration::ZERO;
        assert_eq!(refused(Policy::high().with_ttl(zero)), "ttl");
        assert_eq!(refused(Policy::high().with_lease(zero)), "lease");
        assert_eq!(
            refused(Policy::high().with_execution_limit(zero)),
            "execution_limit"
        );
        assert_eq!(
            refused(Policy::high().with_body_deadline(zero)),
            "body_deadline"
        );
        assert_eq!(
            refused(Policy::high().with_settle_timeout(zero)),
            "settle_timeout"
        );
        let wait = Policy::high().with_duplicates(Duplicates::Wait(zero));
        assert_eq!(refused(wait), "duplicates");
    }

    #[test]
    fn a_lease_too_short_to_be_kept_is_refused() {
        let millis = |lease| Policy::high().with_lease(Duration::from_millis(lease));
        assert_eq!(refused(millis(99)), "lease");
        assert_eq!(millis(100).validate(true), Ok(()));
    }

    #[test]
    fn more_than_ten_reruns_are_refused() {
        assert_eq!(refused(Policy::high().with_reruns(11)), "reruns");
        assert_eq!(Policy::high().with_reruns(10).validate(true), Ok(()));
    }

    #[test]
    fn a_time_beyond_ten_years_is_refused() {
        assert_eq!(refused(Policy::high().with_ttl(Duration::MAX)), "ttl");
    }

    #[test]
    fn a_running_record_must_not_be_able_to_expire() {
        let policy = Policy::high()
            .with_lease(Duration::from_secs(10))
            .with_execution_limit(Duration::from_secs(50));
        assert_eq!(
            refused(policy.clone().with_ttl(Duration::from_secs(59))),
            "ttl"
        );
        let exact = policy.with_ttl(Duration::from_secs(60));
        assert_eq!(exact.validate(true), Ok(()));
    }

    #[test]
    fn critical_on_a_store_that_forgets_has_to_be_allowed() {
        let error = Policy::critical().validate(false).unwrap_err();
        assert_eq!(error.field(), "store");
        let allowed = Policy::critical().with_volatile_store(true);
        assert_eq!(allowed.validate(false), Ok(()));
        assert_eq!(Policy::high().validate(false), Ok(()));
    }

    #[test]
    fn safe_methods_cannot_be_covered() {
        let query = Method::from_bytes(b"QUERY").unwrap();
        for method in [
            Method::GET,
            Method::HEAD,
            Method::OPTIONS,
            Method::TRACE,
            query,
        ] {
            assert_eq!(refused(Policy::high().with_methods([method])), "methods");
        }
    }

    #[test]
    fn key_lengths_that_no_key_fits_are_refused() {
        for (min, max) in [(0, 255), (10, 9), (1, 4097)] {
            assert_eq!(
                refused(Policy::high().with_key_length(min, max)),
                "key_length"
            );
        }
    }

    #[test]
    fn names_that_are_no_header_names_are_refused() {
        assert_eq!(
            Policy::high().with_key_header("a b").unwrap_err().field(),
            "key_header"
        );
        let hidden = Policy::high().with_hidden_headers(["ok", "a b"]);
        assert_eq!(hidden.unwrap_err().field(), "hidden_headers");
    }
}
