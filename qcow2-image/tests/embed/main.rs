//! The engine as its users meet it: opened by path or on a storage of one's own, with files made by others.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Options for the caches, and combinations that make no sense.
mod cache;
/// Backing files by name: which are opened, and what is said of the others.
mod chain;
/// Compressed clusters that qemu-img wrote.
mod compressed;
/// What every storage promises, an image promises.
mod contract;
/// External data files, raw ones byte for byte.
mod data_file;
/// Encrypted images.
#[cfg(feature = "encryption")]
mod encrypted;
/// The example programs, run.
mod examples;
/// Feature bits, unknown ones too, and headers that are rewritten.
mod header;
/// Refcounts that are written at the end, and what is done when there was no end.
mod lazy;
/// Two programs, one image.
mod locks;
mod machine;
/// An image in an image.
mod nested;
/// The reference program, and what the tests share.
mod oracle;
/// Compressed entries that claim too much.
mod overlong;
/// Compressed clusters that are written here.
mod packed;
/// Growing a disk with preallocation.
mod preallocated;
/// Internal snapshots.
mod snapshots;
/// How much comes along with this crate.
mod tree;
