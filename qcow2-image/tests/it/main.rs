//! The virtual disk as a whole, by programs that a seed decides.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Programs beside plain bytes, in memory.
mod alone;

/// Persistent bitmaps.
mod bitmaps;
/// Programs beside QEMU: what one writes the other reads.
mod qemu;
mod requests;
/// Snapshot operations that are cut short.
mod snapshots;

/// Snapshot tables with damage.
mod snapshot_tables;

/// Crashes at any moment, with all rules of crash safety kept, and with each one left out.
mod crashes;

/// Each storage operation fails in turn.
mod faults;
