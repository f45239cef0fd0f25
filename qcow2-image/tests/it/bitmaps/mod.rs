#![expect(
    clippy::indexing_slicing,
    clippy::single_range_in_vec_init,
    reason = "what goes wrong in a test may end it, and lists of ranges may have one"
)]

/// Deeds that are cut short, by crashes and by faults.
mod cut_short;
/// Both work on the same bitmaps in turn.
mod exchange;
/// Guests that are cut short.
mod guests;
/// What a bitmap must have.
mod model;
/// QEMU's tools on bitmaps.
mod oracle;
/// Bitmaps that lie where QEMU would put them.
mod places;
/// Bitmaps that QEMU made and filled.
mod reading;
/// What is refused, what is broken, and each way to write.
mod rules;
