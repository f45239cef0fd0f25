/// QEMU's tools on bitmaps.
mod oracle;
/// Bitmaps that QEMU made and filled.
mod reading;
