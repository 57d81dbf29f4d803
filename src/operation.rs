//! What is asked: the method and the route template, or the concrete path where no template is known.

use std::borrow::Cow;

use http::request::Parts;
use http::{Method, Uri};

use crate::digest::Fields;
use crate::error::ConfigError;

/// Longest operation that is stored as it is; a longer one, always a concrete path, by its digest.
const MAX_LEN: usize = 512;

/// Names of parameters do not matter: renaming `{id}` to `{order}` must not free the keys in use.
/// A literal brace is written twice, and stays so. `None` for what is no template of axum.
fn erase_parameters(template: &str) -> Option<String> {
    let mut erased = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        let (before, after) = rest.split_at(at);
        erased.push_str(before);
        if after.starts_with("{{") || after.starts_with("}}") {
            erased.push_str(&after[..2]);
            rest = &after[2..];
        } else {
            let (name, after) = after.strip_prefix('{')?.split_once('}')?;
            erased.push_str(if name.starts_with('*') { "{*}" } else { "{}" });
            rest = after;
        }
    }
    Some(erased + rest)
}

pub(crate) fn of_request(parts: &Parts) -> String {
    let erased = template(parts).map(|template| match template.contains(['{', '}']) {
        true => erase_parameters(template).map_or(Cow::Borrowed(template), Cow::Owned),
        false => Cow::Borrowed(template),
    });
    let path = erased.unwrap_or_else(|| Cow::Borrowed(original_uri(parts).path()));
    let method = parts.method.as_str();
    if method.len() + 1 + path.len() <= MAX_LEN {
        return [method, " ", &path].concat();
    }
    let digest = Fields::new("tower-idempotency operation 1")
        .push(path.as_bytes())
        .finish();
    format!("{} sha256:{}", parts.method, hex::encode(digest))
}

/// The method and the operation of `METHOD /template`, as written in a route table.
pub(crate) fn of_route(route: &str) -> Result<(Method, String), ConfigError> {
    let wrong = || {
        let reason = format!(
            "must be a method and a template of at most {MAX_LEN} bytes in all, like `POST /orders/{{id}}`, not `{route}`"
        );
        ConfigError::new("route", reason)
    };
    let (name, template) = route.split_once(' ').ok_or_else(wrong)?;
    let method = Method::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
    let is_known = name == name.to_ascii_uppercase() && route.len() <= MAX_LEN;
    if !is_known || !is_path(template) {
        return Err(wrong());
    }
    let erased = erase_parameters(template).ok_or_else(wrong)?;
    Ok((method, format!("{name} {erased}")))
}

/// As axum 0.8 writes it: `/orders/{id}`; `/orders/:id` would match nothing.
fn is_path(template: &str) -> bool {
    template.starts_with('/') && !template.contains("/:") && !template.contains("/*")
}

#[cfg(feature = "axum")]
fn template(parts: &Parts) -> Option<&str> {
    let path = parts.extensions.get::<axum::extract::MatchedPath>();
    path.map(axum::extract::MatchedPath::as_str)
}

#[cfg(not(feature = "axum"))]
fn template(_: &Parts) -> Option<&str> {
    None
}

/// The URI the client sent: a nested router strips its prefix from `uri()`.
#[cfg(feature = "axum")]
pub(crate) fn original_uri(parts: &Parts) -> &Uri {
    let original = parts.extensions.get::<axum::extract::OriginalUri>();
    original.map_or(&parts.uri, |uri| &uri.0)
}

#[cfg(not(feature = "axum"))]
pub(crate) fn original_uri(parts: &Parts) -> &Uri {
    &parts.uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_names_are_erased_and_everything_else_is_kept() {
        for (template, erased) in [
            ("/a/{id}/b/{other}", "/a/{}/b/{}"),
            ("/files/{*path}", "/files/{*}"),
            ("/plain", "/plain"),
        ] {
            assert_eq!(erase_parameters(template).as_deref(), Some(erased));
        }
    }

    #[test]
    fn a_literal_brace_is_no_parameter() {
        let templates = [
            "/{x}", "/{*x}", "/{{x}}", "/{{y}}", "/{{}}", "/{{*x}}", "/{{{x}",
        ];
        let mut operations = templates.map(erase_parameters).to_vec();
        operations.sort();
        operations.dedup();
        assert_eq!(operations.len(), templates.len(), "{operations:?}");
        assert_eq!(
            erase_parameters("/{{a}}/{b}"),
            erase_parameters("/{{a}}/{c}")
        );
        let route = of_route("POST /{{a/{b}");
        assert_eq!(route, Ok((Method::POST, "POST /{{a/{}".into())));
    }

    #[test]
    fn a_route_is_a_method_and_a_template() {
        let route = of_route("POST /a/{id}");
        assert_eq!(route, Ok((Method::POST, "POST /a/{}".into())));
        for wrong in [
            "/a",
            "POST",
            "POST a",
            "post /a",
            "P OST /a",
            "POST /a/:id",
            "POST /a/{id",
            "POST /a/id}",
            "POST /*",
        ] {
            assert!(of_route(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_very_long_path_is_stored_by_its_digest() {
        let (mut parts, ()) = http::Request::new(()).into_parts();
        let long = |last: char| format!("/{}{last}", "p".repeat(4000)).parse::<Uri>();
        let mut operations = Vec::new();
        for last in ['a', 'b'] {
            if let Ok(uri) = long(last) {
                parts.uri = uri;
                operations.push(of_request(&parts));
            }
        }
        assert!(operations[0].len() < 100);
        assert_ne!(operations[0], operations[1]);
    }
}
