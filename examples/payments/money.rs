//! Amounts and currencies that are valid because they exist.

use serde::{Deserialize, Serialize};

/// 999,999.99 of a currency with cents.
const MAX_AMOUNT: i64 = 99_999_999;
const CURRENCIES: [&str; 4] = ["EUR", "GBP", "JPY", "USD"];

/// An amount in minor units: 1250 are 12.50 euros, or 1,250 yen. Never a fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64")]
pub(crate) struct Amount(i64);

impl Amount {
    pub(crate) fn minor_units(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Amount {
    type Error = String;

    fn try_from(amount: i64) -> Result<Self, String> {
        if (1..=MAX_AMOUNT).contains(&amount) {
            Ok(Self(amount))
        } else {
            Err(format!(
                "an amount is 1 to {MAX_AMOUNT} minor units, not {amount}"
            ))
        }
    }
}

/// A currency this service deals in.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String")]
pub(crate) struct Currency(String);

impl Currency {
    pub(crate) fn code(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Currency {
    type Error = String;

    fn try_from(code: String) -> Result<Self, String> {
        if CURRENCIES.contains(&code.as_str()) {
            Ok(Self(code))
        } else {
            Err(format!(
                "a currency is one of {}, not `{code}`",
                CURRENCIES.join(", ")
            ))
        }
    }
}
