//! The rules of a store, as tests.
