use std::ops::Range;

use qcow2_image::Image;

/// What a bitmap must have: a flag for each granule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) granularity: u64,
    size: u64,
    bits: Vec<bool>,
}

impl Model {
    pub(super) fn new(granularity: u64, size: u64) -> Self {
        let count = size.div_ceil(granularity);
        Self {
            granularity,
            size,
            bits: vec![false; usize::try_from(count).unwrap()],
        }
    }

    pub(super) fn set(&mut self, range: Range<u64>) {
        let range = range.start.min(self.size)..range.end.min(self.size);
        if range.is_empty() {
            return;
        }
        let first = usize::try_from(range.start / self.granularity).unwrap();
        let last = usize::try_from((range.end - 1) / self.granularity).unwrap();
        self.bits[first..=last].fill(true);
    }

    pub(super) fn clear(&mut self) {
        self.bits.fill(false);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for range in other.ranges() {
            self.set(range);
        }
    }

    pub(super) fn resize(&mut self, size: u64) {
        let count = size.div_ceil(self.granularity);
        self.bits.resize(usize::try_from(count).unwrap(), false);
        self.size = size;
    }

    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (number, _) in (0..).zip(&self.bits).filter(|(_, bit)| **bit) {
            let start = number * self.granularity;
            let end = (start + self.granularity).min(self.size);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Whether `ranges` have all that this has.
    pub(super) fn is_within(&self, ranges: &[Range<u64>]) -> bool {
        let mut other = Self::new(self.granularity, self.size);
        for range in ranges {
            other.set(range.clone());
        }
        self.bits
            .iter()
            .zip(&other.bits)
            .all(|(mine, other)| !mine || *other)
    }
}

/// All ranges of a bitmap.
pub(super) fn extents(image: &Image, name: &str) -> Vec<Range<u64>> {
    let all = image.bitmap_extents(name.as_bytes(), 0..u64::MAX, usize::MAX);
    all.unwrap_or_else(|error| panic!("{name}: {error}"))
}
