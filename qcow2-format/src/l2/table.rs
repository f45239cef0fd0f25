//! A whole L2 table, and the fast ways through it.

use super::L2Entry;
use crate::Geometry;
use crate::l1::{COPIED, OFFSET_MASK};

/// The bytes of an L2 table, typed as entries.
#[derive(Clone, Copy, Debug)]
pub struct L2Table<'a> {
    bytes: &'a [u8],
    extended: bool,
}

impl<'a> L2Table<'a> {
    /// The table in `bytes`; a trailing part of an entry is left out.
    pub const fn new(bytes: &'a [u8], geometry: Geometry) -> Self {
        Self {
            bytes,
            extended: geometry.extended_l2(),
        }
    }

    /// Entries in the table.
    pub const fn len(self) -> usize {
        self.bytes.len() >> if self.extended { 4 } else { 3 }
    }

    /// Whether there is no entry.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The entry numbered `index`, or `None` past the end.
    #[inline]
    pub fn get(self, index: usize) -> Option<L2Entry> {
        if self.extended {
            let (pairs, _) = self.bytes.as_chunks::<16>();
            let (word, bitmap) = pairs.get(index)?.split_at(8);
            Some(L2Entry::from_bits(be(word), be(bitmap)))
        } else {
            let (words, _) = self.bytes.as_chunks::<8>();
            Some(L2Entry::from_bits(
                u64::from_be_bytes(*words.get(index)?),
                0,
            ))
        }
    }

    /// All entries in order.
    pub fn iter(self) -> impl Iterator<Item = L2Entry> + 'a {
        (0..self.len()).map_while(move |index| self.get(index))
    }

    /// How many entries from `start` on are plain data clusters that lie one behind the other, `step` bytes apart, all
    /// with the COPIED flag of the first and nothing else set (and, with extended entries, the same bitmap).
    ///
    /// 0 if the first entry is of any other kind. This is the one loop that most entries of most images go through.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "wrapping is ruled out: the sum is compared with entries below 2^63, and a wrapped one differs"
    )]
    pub fn sequential_run(self, start: usize, step: u64) -> usize {
        let Some(first) = self.get(start) else {
            return 0;
        };
        let plain = first.word() & !COPIED;
        if plain & !OFFSET_MASK != 0 || plain == 0 {
            return 0;
        }
        let mut expected = first.word();
        if self.extended {
            let (pairs, _) = self.bytes.as_chunks::<16>();
            let rest = pairs.get(start..).unwrap_or_default();
            let mut run = 0;
            for pair in rest {
                let (word, bitmap) = pair.split_at(8);
                if be(word) != expected || be(bitmap) != first.bitmap() {
                    break;
                }
                expected = expected.wrapping_add(step);
                run += 1;
            }
            run
        } else {
            let (words, _) = self.bytes.as_chunks::<8>();
            let rest = words.get(start..).unwrap_or_default();
            let run = swapped_run(rest, expected, step);
            expected = expected.wrapping_add(step.wrapping_mul(run as u64));
            let tail = rest.get(run..).unwrap_or_default().iter();
            let tail = tail.take_while(|word| {
                let same = u64::from_be_bytes(**word) == expected;
                expected = expected.wrapping_add(step);
                same
            });
            run + tail.count()
        }
    }

    /// How many entries from `start` on are empty.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "an index below the table's length"
    )]
    pub fn empty_run(self, start: usize) -> usize {
        let size = if self.extended { 16 } else { 8 };
        let Some(rest) = self.bytes.get(start.saturating_mul(size)..) else {
            return 0;
        };
        let blocks = rest
            .chunks_exact(128)
            .take_while(|block| block.iter().all(|b| *b == 0))
            .count();
        let skipped = blocks * 128;
        let tail = rest
            .get(skipped..)
            .unwrap_or_default()
            .chunks_exact(size)
            .take_while(|entry| entry.iter().all(|b| *b == 0))
            .count();
        skipped / size + tail
    }
}

/// How many words, in eights, from the start on are `first`, `first + step`, and so on; `step` is a power of two.
///
/// Between two carries out of the byte that changes, adding `step` to big-endian words is adding a constant to the same words
/// read in the other byte order. So the words are compared as they lie there, without swapping each.
#[expect(
    clippy::arithmetic_side_effects,
    clippy::little_endian_bytes,
    reason = "shifts below 64 as step is a power of two; wrapped sums differ from entries; the byte order is the point"
)]
fn swapped_run(words: &[[u8; 8]], first: u64, step: u64) -> usize {
    let bit = step.trailing_zeros();
    if !step.is_power_of_two() {
        return 0;
    }
    let swapped_step = 1_u64 << (56 - bit / 8 * 8 + bit % 8);
    let mut expected = first;
    let mut run = 0;
    while let Some(rest) = words.get(run..).filter(|rest| rest.len() >= 8) {
        let byte = (expected >> (bit / 8 * 8)) & 0xff;
        let until_carry = usize::try_from((255 - byte) >> (bit % 8)).unwrap_or(0) + 1;
        let part = rest.get(..until_carry.min(rest.len())).unwrap_or_default();
        let mut swapped = expected.swap_bytes();
        let mut same = 0;
        for eight in part.chunks_exact(8) {
            let mut differs = 0;
            for (index, word) in (0_u64..).zip(eight) {
                differs |= u64::from_le_bytes(*word)
                    ^ swapped.wrapping_add(swapped_step.wrapping_mul(index));
            }
            if differs != 0 {
                return run + same;
            }
            swapped = swapped.wrapping_add(swapped_step.wrapping_mul(8));
            same += 8;
        }
        // What is left up to the carry, one by one, so that the next part begins behind it.
        expected = expected.wrapping_add(step.wrapping_mul(same as u64));
        for word in part.get(same..).unwrap_or_default() {
            if u64::from_be_bytes(*word) != expected {
                return run + same;
            }
            expected = expected.wrapping_add(step);
            same += 1;
        }
        run += same;
    }
    run
}

#[inline]
fn be(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn table(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_be_bytes()).collect()
    }

    #[test]
    fn a_run_ends_where_the_distance_or_a_flag_changes() {
        let geometry = Geometry::new(16, 4, false).unwrap();
        let mut words: Vec<u64> = (0..100).map(|i| COPIED | (0x50000 + i * 0x10000)).collect();
        assert_eq!(
            L2Table::new(&table(&words), geometry).sequential_run(0, 0x10000),
            100
        );
        assert_eq!(
            L2Table::new(&table(&words), geometry).sequential_run(37, 0x10000),
            63
        );
        for at in 1..100 {
            let kept = words[at];
            words[at] &= !COPIED;
            assert_eq!(
                L2Table::new(&table(&words), geometry).sequential_run(0, 0x10000),
                at
            );
            words[at] = kept | 1;
            assert_eq!(
                L2Table::new(&table(&words), geometry).sequential_run(0, 0x10000),
                at
            );
            words[at] = kept;
        }
        words[0] |= 1;
        assert_eq!(
            L2Table::new(&table(&words), geometry).sequential_run(0, 0x10000),
            0
        );
    }

    #[test]
    fn a_run_is_found_for_every_cluster_size_and_across_carries() {
        for bits in 9..=21 {
            let geometry = Geometry::new(bits, 4, false).unwrap();
            let step = geometry.cluster_size();
            for start in [step, step * 250, step * 65530, (1 << 40) - step * 3] {
                for len in [1, 2, 7, 8, 9, 63, 300, 513] {
                    let mut words: Vec<u64> = (0..len).map(|i| start + i * step).collect();
                    words.extend([start, start + step * 2]);
                    let bytes = table(&words);
                    let found = L2Table::new(&bytes, geometry).sequential_run(0, step);
                    assert_eq!(found as u64, len, "{bits} {start:#x}");
                }
            }
        }
    }

    #[test]
    fn an_empty_run_counts_entries_not_bytes() {
        let geometry = Geometry::new(14, 4, true).unwrap();
        let mut words = [0_u64; 80];
        words[61] = 1;
        assert_eq!(L2Table::new(&table(&words), geometry).empty_run(0), 30);
        assert_eq!(L2Table::new(&table(&words), geometry).empty_run(31), 9);
    }
}
