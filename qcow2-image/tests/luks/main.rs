//! LUKS areas: made, opened and changed here and by QEMU, damaged, and cut off by crashes.
#![cfg(feature = "encryption")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// All algorithms, made by either and opened by the other.
mod algorithms;
/// Areas in memory.
mod area;
/// A machine that fails while key slots change.
mod crash;
/// Damaged and malicious areas.
mod hostile;
/// The reference program.
mod oracle;
/// No secret where it could be seen.
mod secrecy;
/// Key slots, added and erased by either.
mod slots;
