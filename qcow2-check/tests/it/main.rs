//! The checker as a whole, seen from outside.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// The reference program, which the other modules ask.
mod oracle;

/// Images as QEMU makes them, sound or left behind by a crash: every number must be QEMU's.
mod matrix;

/// Images with one field damaged: no verdict milder than QEMU's, no difference without a reason.
mod mutants;

/// Images made to stall or exhaust a checker, each in a process of its own.
mod hostile;

/// What holds for any bytes, any number of threads and any failure of the storage.
mod properties;

/// Compressed images as QEMU makes them, sound and damaged: what is lost must be what QEMU can't read.
mod deep;

/// What QEMU takes for a LUKS header that it can use.
mod luks;

/// Crashed images: what a recount tells to put right is all there is to do.
mod recount;

/// Repairs: what they promise, what they keep, and the way back.
mod repair_qemu;
