//! Single refcounts in the cache.

use qcow2_cache::{Metadata, MetadataError, Step};
use qcow2_format::{Geometry, HostOffset};

/// Where a refcount lies: the word of the block, and the bits of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) word: HostOffset,
    shift: u32,
    mask: u64,
}

impl Place {
    /// The place of the refcount numbered `index` in the block at `block`.
    pub(crate) fn new(geometry: Geometry, block: HostOffset, index: u64) -> Self {
        let order = geometry.refcount_order();
        let bit = index << order;
        let byte = bit / 8;
        let in_word = u32::try_from(byte % 8).unwrap_or(0);
        let shift = if order < 3 {
            // Within a byte the lowest index has the lowest bits.
            56 - 8 * in_word + u32::try_from(bit % 8).unwrap_or(0)
        } else {
            64 - 8 * in_word - geometry.refcount_bits()
        };
        Self {
            word: HostOffset::new(block.get() + byte / 8 * 8),
            shift,
            mask: geometry.refcount_max(),
        }
    }

    pub(crate) fn get(self, word: u64) -> u64 {
        word >> self.shift & self.mask
    }

    pub(crate) fn set(self, word: u64, value: u64) -> u64 {
        word & !(self.mask << self.shift) | (value & self.mask) << self.shift
    }
}

/// The word of a refcount block at `at`, loaded if need be.
pub(crate) fn word(meta: &Metadata, at: HostOffset) -> Result<u64, MetadataError> {
    loop {
        if let Some(word) = meta.refcounts().get(at) {
            return Ok(word);
        }
        meta.load_refcounts(at)?;
    }
}

/// Changes the refcount at `place`. It is not checked whether the new value fits.
pub(crate) fn store(meta: &Metadata, place: Place, value: u64) -> Result<(), MetadataError> {
    let cache = meta.refcounts();
    let in_slice = place.word.get() & (cache.slice_bytes() as u64 - 1);
    let index = usize::try_from(in_slice / 8).unwrap_or(0);
    meta.before(Step::ChangeRefcount)?;
    loop {
        let done = cache.update(place.word, |slice| {
            let word = slice.get(index);
            slice.set(index, place.set(word, value));
        });
        if done.is_some() {
            return Ok(());
        }
        meta.load_refcounts(place.word)?;
    }
}

/// Whether one of the refcounts in a word is 0.
pub(crate) fn has_zero(geometry: Geometry, word: u64) -> bool {
    let max = geometry.refcount_max();
    // One in each field, and the top bit of each field.
    let low = u64::MAX / max;
    let high = low << (geometry.refcount_bits() - 1);
    word.wrapping_sub(low) & !word & high != 0
}

#[cfg(test)]
mod tests {
    use qcow2_format::{RefcountBlock, set_refcount};

    use super::*;

    #[test]
    fn words_and_blocks_mean_the_same_for_every_width() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, order, false).unwrap();
            let mut bytes = vec![0; 512];
            for index in 0..geometry.refcounts_per_block() {
                let value = (index * 7 + 1) & geometry.refcount_max();
                let place = Place::new(geometry, HostOffset::new(0), index);
                let at = usize::try_from(place.word.get()).unwrap();
                let chunk: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
                let word = place.set(u64::from_be_bytes(chunk), value);
                bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
                assert_eq!(place.get(word), value);
                let read = RefcountBlock::new(&bytes, geometry);
                assert_eq!(read.get(usize::try_from(index).unwrap()), Some(value));
            }
        }
    }

    #[test]
    fn a_zero_among_the_refcounts_of_a_word_is_seen() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, order, false).unwrap();
            let per_word = 64 >> order;
            let mut bytes = vec![0; 512];
            for index in 0..per_word {
                set_refcount(&mut bytes, geometry, index, geometry.refcount_max()).unwrap();
            }
            let word = |bytes: &[u8]| u64::from_be_bytes(bytes[..8].try_into().unwrap());
            assert!(!has_zero(geometry, word(&bytes)));
            for index in 0..per_word {
                let mut bytes = bytes.clone();
                set_refcount(&mut bytes, geometry, index, 0).unwrap();
                assert!(has_zero(geometry, word(&bytes)));
            }
        }
    }
}
