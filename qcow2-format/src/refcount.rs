//! Refcount table entries and refcount blocks of all seven widths.

use core::fmt;

use crate::{Geometry, HostOffset};

const RESERVED_MASK: u64 = 0x1ff;

/// One entry of the refcount table: where a refcount block lies.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct RefcountTableEntry(u64);

impl RefcountTableEntry {
    /// The entry with these 64 bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The entry as it lies in the file.
    pub const fn from_be_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }

    /// All 64 bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The entry's bytes for the file.
    pub const fn to_be_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// Where the block lies; 0 means there is none, and all its refcounts are 0.
    pub const fn block(self) -> HostOffset {
        HostOffset::new(self.0 & !RESERVED_MASK)
    }

    /// The bits that must be clear and are not.
    pub const fn reserved_bits(self) -> u64 {
        self.0 & RESERVED_MASK
    }
}

impl fmt::Debug for RefcountTableEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefcountTableEntry({:#x})", self.0)
    }
}

/// The bytes of a refcount block, typed as refcounts.
///
/// Widths below 8 bits keep the lowest index in the least significant bits of a byte; wider ones are big-endian.
#[derive(Clone, Copy, Debug)]
pub struct RefcountBlock<'a> {
    bytes: &'a [u8],
    order: u32,
}

impl<'a> RefcountBlock<'a> {
    /// The block in `bytes`.
    pub const fn new(bytes: &'a [u8], geometry: Geometry) -> Self {
        Self {
            bytes,
            order: geometry.refcount_order(),
        }
    }

    /// Refcounts in the block.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "a length in memory times 8 fits"
    )]
    pub const fn len(self) -> usize {
        (self.bytes.len() * 8) >> self.order
    }

    /// Whether there is no refcount.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The refcount numbered `index`, or `None` past the end.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "shifts below the width, an index below the length"
    )]
    pub fn get(self, index: usize) -> Option<u64> {
        let bytes = self.bytes;
        match self.order {
            0..=2 => {
                let per_byte_bits = 3 - self.order;
                let byte = *bytes.get(index >> per_byte_bits)?;
                let shift = (index & ((1 << per_byte_bits) - 1)) << self.order;
                Some(u64::from(byte >> shift) & ((1 << (1_u32 << self.order)) - 1))
            }
            3 => bytes.get(index).map(|b| u64::from(*b)),
            4 => bytes
                .as_chunks::<2>()
                .0
                .get(index)
                .map(|b| u64::from(u16::from_be_bytes(*b))),
            5 => bytes
                .as_chunks::<4>()
                .0
                .get(index)
                .map(|b| u64::from(u32::from_be_bytes(*b))),
            _ => bytes
                .as_chunks::<8>()
                .0
                .get(index)
                .map(|b| u64::from_be_bytes(*b)),
        }
    }

    /// All refcounts in order.
    pub fn iter(self) -> impl Iterator<Item = u64> + 'a {
        (0..self.len()).map_while(move |index| self.get(index))
    }

    /// How many of the 64 refcounts from `start` on (a multiple of 64) are exactly 1 or 0, told as two masks: bit i of the
    /// first is set where refcount `start + i` is 1, of the second where it is neither 0 nor 1. Refcounts past the end are 0.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "bit numbers below 64, indices below the length"
    )]
    pub fn ones_and_others(self, start: usize) -> (u64, u64) {
        match self.order {
            4 => {
                let Some(words) = self.bytes.as_chunks::<2>().0.get(start..start + 64) else {
                    return self.ones_and_others_slowly(start);
                };
                let mut ones = 0;
                let mut others = 0;
                for (bit, word) in words.iter().enumerate() {
                    let value = u16::from_be_bytes(*word);
                    ones |= u64::from(value == 1) << bit;
                    others |= u64::from(value > 1) << bit;
                }
                (ones, others)
            }
            0 => {
                let Some(eight) = self
                    .bytes
                    .get(start / 8..)
                    .and_then(<[u8]>::first_chunk::<8>)
                else {
                    return self.ones_and_others_slowly(start);
                };
                // Least significant bit first is little-endian order over the bytes.
                let ones = eight.iter().rev().fold(0, |a, b| a << 8 | u64::from(*b));
                (ones, 0)
            }
            _ => self.ones_and_others_slowly(start),
        }
    }

    #[expect(
        clippy::arithmetic_side_effects,
        reason = "bit numbers below 64, indices below the length"
    )]
    fn ones_and_others_slowly(self, start: usize) -> (u64, u64) {
        let mut ones = 0;
        let mut others = 0;
        for bit in 0..64 {
            match self.get(start + bit) {
                Some(1) => ones |= 1 << bit,
                Some(value) if value > 1 => others |= 1 << bit,
                _ => {}
            }
        }
        (ones, others)
    }

    /// Whether all `count` refcounts from `start` on equal `value`, where that can be told by comparing bytes; `start` and
    /// `count` are multiples of 64. `false` where a refcount differs or the block ends before.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "checked by the slice access"
    )]
    pub fn all_equal(self, start: usize, count: usize, value: u64) -> bool {
        let from = (start << self.order) / 8;
        let len = (count << self.order) / 8;
        let Some(bytes) = self.bytes.get(from..from.saturating_add(len)) else {
            return false;
        };
        let mut pattern = [0_u8; 8];
        match self.order {
            0..=2 => {
                let width = 1_u32 << self.order;
                if value >> width != 0 {
                    return false;
                }
                let mut byte = 0_u64;
                let mut shift = 0;
                while shift < 8 {
                    byte |= value << shift;
                    shift += width;
                }
                pattern = [byte.to_be_bytes()[7]; 8];
            }
            order => {
                let size = 1_usize << (order - 3);
                let be = value.to_be_bytes();
                if be.iter().take(8 - size).any(|b| *b != 0) {
                    return false;
                }
                for (slot, byte) in pattern.iter_mut().zip(be.iter().skip(8 - size).cycle()) {
                    *slot = *byte;
                }
            }
        }
        // A comparison with a long pattern is what the platform's memory comparison is best at.
        let block = [pattern; 32];
        let block = block.as_flattened();
        bytes
            .chunks(block.len())
            .all(|chunk| block.get(..chunk.len()) == Some(chunk))
    }

    /// The block's bytes.
    pub const fn bytes(self) -> &'a [u8] {
        self.bytes
    }
}

/// Stores a refcount in a block.
///
/// # Errors
///
/// `None` where `index` is past the end or `value` does not fit the width; the block is unchanged then.
#[expect(
    clippy::arithmetic_side_effects,
    reason = "shifts below the width, an index below the length"
)]
pub fn set_refcount(block: &mut [u8], geometry: Geometry, index: usize, value: u64) -> Option<()> {
    if value > geometry.refcount_max() {
        return None;
    }
    match geometry.refcount_order() {
        order @ 0..=2 => {
            let per_byte_bits = 3 - order;
            let byte = block.get_mut(index >> per_byte_bits)?;
            let shift = (index & ((1 << per_byte_bits) - 1)) << order;
            let mask = geometry.refcount_max() << shift;
            *byte = (u64::from(*byte) & !mask | value << shift).to_be_bytes()[7];
        }
        order => {
            let size = 1_usize << (order - 3);
            let at = index.checked_mul(size)?;
            let target = block.get_mut(at..at.checked_add(size)?)?;
            target.copy_from_slice(value.to_be_bytes().get(8 - size..)?);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn low_bits_hold_the_lowest_index() {
        let geometry = Geometry::new(16, 2, false).unwrap();
        let mut block = vec![0; 65536];
        set_refcount(&mut block, geometry, 0, 1).unwrap();
        set_refcount(&mut block, geometry, 1, 2).unwrap();
        assert_eq!(block[0], 0x21);
        assert!(set_refcount(&mut block, geometry, 0, 16).is_none());
        assert!(set_refcount(&mut block, geometry, 131072, 1).is_none());
    }

    #[test]
    fn every_way_of_reading_agrees_for_every_width() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, order, false).unwrap();
            let mut bytes = vec![0; 512];
            let n = RefcountBlock::new(&bytes, geometry).len();
            for index in 0..n {
                let value = [0, 1, 1, 1, 3, 0, 255, 70000][index * 7 % 8] & geometry.refcount_max();
                set_refcount(&mut bytes, geometry, index, value).unwrap();
                assert_eq!(RefcountBlock::new(&bytes, geometry).get(index), Some(value));
            }
            let block = RefcountBlock::new(&bytes, geometry);
            for start in (0..n).step_by(64) {
                let (ones, others) = block.ones_and_others(start);
                assert_eq!((ones, others), block.ones_and_others_slowly(start));
            }
            for value in [0, 1, 2, 300] {
                let mut same = vec![0; 512];
                let fits = (0..n).all(|i| set_refcount(&mut same, geometry, i, value).is_some());
                assert_eq!(
                    RefcountBlock::new(&same, geometry).all_equal(0, n, value),
                    fits
                );
                assert!(!RefcountBlock::new(&bytes, geometry).all_equal(0, n, value));
            }
        }
    }
}
