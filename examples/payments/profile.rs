//! A write that says what is to be true. Twice is as good as once, so its key is optional.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use serde::{Deserialize, Serialize};

use crate::App;
use crate::auth::Principal;
use crate::error::ApiError;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    name: Name,
}

#[derive(Deserialize, Serialize)]
#[serde(try_from = "String")]
struct Name(String);

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, &'static str> {
        let fits = (1..=100).contains(&name.chars().count()) && !name.contains(char::is_control);
        fits.then_some(Self(name))
            .ok_or("a name has 1 to 100 characters, and none that controls a terminal")
    }
}

pub(crate) async fn update(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    profile: Result<Json<Profile>, JsonRejection>,
) -> Result<Json<Profile>, ApiError> {
    let Json(profile) = profile?;
    let upsert = "insert into payments.profile (member, name) values ($1, $2)
        on conflict (member) do update set name = excluded.name";
    let query = sqlx::query(upsert).bind(principal.member);
    query.bind(&profile.name.0).execute(&app.pool).await?;
    Ok(Json(profile))
}
