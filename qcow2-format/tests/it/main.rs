//! What the crate promises, from outside.

/// Bytes that qemu-img wrote, kept in the repository, come out of an encoder as they went into the decoder.
#[cfg(test)]
mod archived;
/// Any value of a structure is read back as it was written, byte for byte.
#[cfg(test)]
mod properties;
/// The qemu-img on this machine and this crate agree on headers; skipped where there is none.
#[cfg(test)]
mod qemu;
