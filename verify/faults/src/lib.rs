//! Fault harness.
