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
    name: String,
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
    query.bind(&profile.name).execute(&app.pool).await?;
    Ok(Json(profile))
}
