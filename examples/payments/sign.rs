//! Plays the bank: `sign payout.settled ch_..` prints the request that would deliver this event.

use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;

use crate::error::BoxError;
use crate::hooks;

/// A `curl` to look at, or to pipe into `sh`. The same event has the same id each time, and a time and a
/// signature of its own: that is how a bank tries again.
pub(crate) fn command(kind: &str, charge: &str) -> Result<String, BoxError> {
    let is_plain = |text: &str| {
        let mut bytes = text.bytes();
        bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if !is_plain(kind) || !is_plain(charge) {
        return Err("letters, digits, dots and dashes alone".into());
    }
    let port = env::var("PORT").unwrap_or_else(|_| "3000".into());
    // Standard Webhooks has dots between id, time and body, and so none in an id.
    let id = format!("evt_{charge}_{kind}").replace('.', "_");
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let body = json!({ "type": kind, "data": { "charge": charge } }).to_string();
    let signature = sign(&hooks::secret(), &format!("{id}.{time}.{body}"))?;
    Ok(format!(
        "curl -i http://127.0.0.1:{port}/hooks/bank -H 'Content-Type: application/json' \\
    -H 'webhook-id: {id}' -H 'webhook-timestamp: {time}' \\
    -H 'webhook-signature: v1,{signature}' \\
    -d '{body}'"
    ))
}

/// HMAC-SHA256 in base64.
fn sign(secret: &str, signed: &str) -> Result<String, BoxError> {
    let key = secret
        .strip_prefix("whsec_")
        .ok_or("BANK_SECRET is `whsec_` and base64")?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&STANDARD.decode(key)?)?;
    mac.update(signed.as_bytes());
    Ok(STANDARD.encode(mac.finalize().into_bytes()))
}
