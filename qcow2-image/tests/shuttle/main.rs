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

/// Bitmaps that record, while others write and flush.
mod bitmaps;
/// Whole images, with two or three requests that meet.
mod disk;
/// How the schedules are chosen.
mod explore;
/// Requests in flight: the crate's own module, which nobody outside can reach otherwise.
#[path = "../../src/gate.rs"]
mod gate;
/// What gates and stripes promise.
mod locks;
/// Locks of guest clusters, likewise.
#[path = "../../src/stripes.rs"]
mod stripes;
