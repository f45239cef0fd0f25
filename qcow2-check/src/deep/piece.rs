//! Pieces of compressed data, ordered as they lie in the file.

use qcow2_format::l2::CompressedExtent;

use crate::image::Image;

/// Where a piece of compressed data lies, in eight bytes: its offset, then the sectors of its window but one. L2 entries have
/// 62 bits for the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece(u64);

impl Piece {
    /// The largest number there may be, and more than any piece's.
    pub(super) const BEHIND_ALL: u64 = u64::MAX;

    pub(super) fn new(image: &Image<'_>, extent: CompressedExtent) -> Self {
        let offset = extent.offset.get();
        let sectors = ((offset & 511) + extent.len_bytes).div_ceil(512);
        Self(offset << sector_bits(image) | sectors.saturating_sub(1))
    }

    pub(super) fn number(self) -> u64 {
        self.0
    }

    /// First byte.
    pub(super) fn offset(self, image: &Image<'_>) -> u64 {
        self.0 >> sector_bits(image)
    }

    /// Bytes of the window, at most two clusters.
    pub(super) fn len(self, image: &Image<'_>) -> u64 {
        let sectors = self.0 & ((1 << sector_bits(image)) - 1);
        ((sectors + 1) << 9) - (self.offset(image) & 511)
    }

    /// The byte behind the window.
    pub(super) fn end(self, image: &Image<'_>) -> u64 {
        self.offset(image).saturating_add(self.len(image))
    }
}

/// Bits for the number of sectors.
fn sector_bits(image: &Image<'_>) -> u32 {
    62_u32.saturating_sub(image.geometry.compressed_offset_bits())
}
