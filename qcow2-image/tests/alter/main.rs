//! What changes an image as a whole: options that are amended, and compaction.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Amended options, cut short.
mod amend_cut;
/// Amended options beside qemu-img.
mod amend_qemu;
/// What is refused, and that nothing has changed then.
mod amend_refusal;
/// Snapshots that an upgrade completes.
mod amend_snapshots;
/// Bitmaps in images that are amended or compacted.
mod bitmaps;
/// Compaction, cut short.
mod compact_cut;
/// Random images, compacted.
mod compact_random;
/// The reference program.
mod oracle;
/// Images before and after a deed, crashes and faults in between.
mod rig;
