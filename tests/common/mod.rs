//! What the tests share.
pub mod cut;
pub mod database;
pub mod fired;
