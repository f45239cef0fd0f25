//! The checker as a whole, seen from outside.

/// The reference program, which the other modules ask.
mod oracle;

/// Images as QEMU makes them, sound or left behind by a crash: every number must be QEMU's.
mod matrix;
