//! Copies of disks: between all kinds of storages and images, beside `qemu-img convert`, and what can go wrong.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Sources and targets of all kinds, judged by both checkers and by QEMU.
mod equal;
/// Sides that fail or panic, and copies that are cancelled.
mod failing;
/// What doesn't fit or makes no sense.
mod refusal;
/// What is copied, where to, and the tools.
mod rig;
/// What is read, held and stored, and in which order.
mod thrift;
