//! What the crate promises, from outside.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

/// Every backend and wrapper passes the contract's suite.
mod conformance;
/// Random programs on every backend, judged by a vector of bytes.
mod model;
