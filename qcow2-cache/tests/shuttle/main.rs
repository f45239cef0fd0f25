//! Small programs of a few threads under a scheduler that tries many orders. A failure prints what replays it.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --test shuttle`; with `QCOW2_SHUTTLE=n`, n times as many orders.
#![cfg(shuttle)]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Callers that share a flush.
mod commit;
/// How the schedules are chosen.
mod explore;
/// The map of metadata, while it grows or is tidied up.
mod overlap;
/// Slices that are loaded, changed, evicted, written and forgotten.
mod table;
