//! New images, judged by both checkers and compared with those of `qemu-img create`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// The reference program, and this crate's way of making the same image.
mod oracle;
/// Random options give an image that is sound, or a clear refusal.
mod properties;
/// Every byte is the one QEMU writes, where one refcount block is enough.
mod qemu_bytes;
/// What is laid out at once, as QEMU maps it.
mod qemu_preallocated;
/// What QEMU refuses is refused, and what it takes is taken.
mod qemu_refusal;
