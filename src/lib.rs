//! Makes retries of mutating requests safe.
