//! PostgreSQL's `uuid` for ids and tokens, without sqlx's `uuid` feature: a library that turned it
//! on would turn it on for the application, too.

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Encode, Postgres, Type};

use crate::identity::RecordId;
use crate::store::Token;

/// `pg_catalog.uuid` and its array, fixed since PostgreSQL 8.3 (`pg_type.dat`).
const UUID: Oid = Oid(2950);
const UUID_ARRAY: Oid = Oid(2951);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PgUuid(pub(crate) [u8; 16]);

impl From<RecordId> for PgUuid {
    fn from(id: RecordId) -> Self {
        Self(*id.as_bytes())
    }
}

impl From<Token> for PgUuid {
    fn from(token: Token) -> Self {
        Self(*token.as_bytes())
    }
}

impl Type<Postgres> for PgUuid {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(UUID)
    }
}

impl PgHasArrayType for PgUuid {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(UUID_ARRAY)
    }
}

impl Encode<'_, Postgres> for PgUuid {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buffer.extend_from_slice(&self.0);
        Ok(IsNull::No)
    }
}

impl Decode<'_, Postgres> for PgUuid {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
        match value.format() {
            PgValueFormat::Binary => Ok(Self(value.as_bytes()?.try_into()?)),
            PgValueFormat::Text => Ok(Self(*uuid::Uuid::try_parse(value.as_str()?)?.as_bytes())),
        }
    }
}
