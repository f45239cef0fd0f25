//! The program from outside, under each of its names.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// One scene for both programs, and what they say in it.
mod beside;
/// The program under its own name.
mod face;
/// Command lines of `qemu-img`, beside the real one.
mod img_qemu;
/// Command lines of `qemu-io`, beside the real one.
mod io_qemu;
/// What `qemu-img` leaves in a folder.
mod made;
/// A morning's work under the other tools' names.
mod own;
