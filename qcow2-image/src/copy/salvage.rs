//! Reading what can be read.

use std::ops::Range;

use qcow2_io::Storage;

/// The smallest piece that is read on its own; bytes.
pub(super) const SECTOR: u64 = 512;
/// Places that are told one by one.
const TOLD_MAX: usize = 1 << 16;

/// Parts of the source that could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    ranges: Vec<Range<u64>>,
    bytes: u64,
}

impl Lost {
    /// Where, in order, in bytes of the source. At most 65536 places; of more, those are left out that were found last.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// How many bytes in all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing was lost.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(super) fn add(&mut self, range: Range<u64>) {
        self.bytes += range.end - range.start;
        let at = self.ranges.partition_point(|known| known.end < range.start);
        let joined = self.ranges.get(at..).unwrap_or_default();
        let count = joined
            .iter()
            .take_while(|known| known.start <= range.end)
            .count();
        let mut whole = range;
        for known in joined.iter().take(count) {
            whole = whole.start.min(known.start)..whole.end.max(known.end);
        }
        if count > 0 || self.ranges.len() < TOLD_MAX {
            self.ranges.splice(at..at + count, [whole]);
        }
    }

    /// The same, `by` bytes further on.
    pub(super) fn moved(&mut self, by: u64) {
        for range in &mut self.ranges {
            *range = range.start + by..range.end + by;
        }
    }
}

/// Fills a buffer from a source that fails in it: what can't be read becomes zeros, sector by sector, and is told. The source's
/// first byte is number `phase` of a sector.
pub(super) fn read(
    source: &dyn Storage,
    bytes: &mut [u8],
    offset: u64,
    phase: u64,
    lose: &mut dyn FnMut(Range<u64>),
) {
    if source.read_at(bytes, offset).is_ok() {
        return;
    }
    let end = offset + bytes.len() as u64;
    // The border between sectors that is nearest to the middle.
    let from_border = |at: u64| at / SECTOR * SECTOR;
    let after = from_border(offset + phase + (end - offset) / 2) + SECTOR - phase;
    let middle = if after < end {
        after
    } else {
        from_border(end - 1 + phase).saturating_sub(phase)
    };
    if middle <= offset {
        bytes.fill(0);
        lose(offset..end);
        return;
    }
    let at = usize::try_from(middle - offset).unwrap_or(usize::MAX);
    let (head, tail) = bytes.split_at_mut_checked(at).unwrap_or_default();
    read(source, head, offset, phase, lose);
    read(source, tail, middle, phase, lose);
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use qcow2_io::{Fault, Faulty, Memory, Operation};

    use super::*;

    #[test]
    fn lost_places_are_joined_and_in_order() {
        let mut lost = Lost::default();
        for range in [500..600, 100..200, 700..800, 200..300, 600..700, 0..1] {
            lost.add(range);
        }
        assert_eq!(lost.ranges(), [0..1, 100..300, 500..800]);
        assert_eq!(lost.bytes(), 501);
        lost.moved(7);
        assert_eq!(lost.ranges()[0], 7..8);
    }

    #[test]
    fn no_more_is_lost_than_the_sectors_that_fail() {
        for (offset, len, bad) in [
            (0_u64, 1_usize << 16, 7_000_u64..7_001),
            (100, 5000, 512..1024),
            (100, 5000, 5099..5100),
            (100, 5000, 100..101),
            (511, 2, 511..512),
            (513, 100, 0..1000),
        ] {
            let faulty = Faulty::new(Memory::from(vec![7; 1 << 16]));
            faulty.add(Fault::on(Operation::Read).within(bad.clone()).forever());
            let mut bytes = vec![9; len];
            let mut lost = Lost::default();
            read(&faulty, &mut bytes, offset, 0, &mut |range| lost.add(range));
            let end = offset + len as u64;
            let from = (bad.start / 512 * 512).max(offset);
            let to = bad.end.next_multiple_of(512).min(end);
            assert_eq!(lost.ranges(), vec![from..to; 1], "{offset} {len} {bad:?}");
            for (at, byte) in (offset..).zip(bytes) {
                assert_eq!(byte == 0, (from..to).contains(&at), "{at}");
            }
        }
    }
}
