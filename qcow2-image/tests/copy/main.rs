//! Copies of disks: between all kinds of storages and images, beside `qemu-img convert`, and what can go wrong.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Bitmaps that go along.
mod bitmaps;
/// Disks side by side.
mod compared;
/// Disks side by side, with what they are stored as.
mod compared_strictly;
/// Copies that a crash or a fault cuts short.
mod cut_short;
/// Sources and targets of all kinds, judged by both checkers and by QEMU.
mod equal;
/// Sides that fail or panic, and copies that are cancelled.
mod failing;
/// Maps beside those of `qemu-img map`.
mod mapped;
/// How long files become, told before.
mod measured;
/// Copies of parts: windows, layers, changes; in order, at a rate, to reserved space.
mod parts;
/// What doesn't fit or makes no sense.
mod refusal;
/// Copies that were interrupted and taken up.
mod resumed;
/// What is copied, where to, and the tools.
mod rig;
/// Sources that can't be read everywhere.
mod salvaged;
/// What is read, held and stored, and in which order.
mod thrift;
