//! Which ranges of the disk a bitmap has as changed.

use std::cell::Cell;
use std::ops::Range;

use super::directory::{Directory, Known, read_directory};
use super::walk::{Bits, Count, Runs, Sink};
use crate::{Image, ImageError};

/// Ranges that an iterator asks for at once.
const PAGE: usize = 1024;

impl Image {
    /// The ranges of the disk, within `range`, that a bitmap has as changed: bytes, in order, neighbours joined, none
    /// reaching beyond the end of the disk. At most `limit` of them: if there are as many, go on from the end of the last.
    ///
    /// Bits stand for more than a byte: a range is one that something in it may have changed in, rounded to the bitmap's
    /// granularity. Writes that are in flight may be in it or not.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoBitmap`]; [`ImageError::BitmapUnusable`] for a bitmap that is not
    /// [consistent](super::BitmapState::Consistent); and what the storage reports.
    pub fn bitmap_extents(
        &self,
        name: &[u8],
        range: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Range<u64>>, ImageError> {
        let _pass = self.gate.enter();
        self.with_directory(|directory| {
            let known = directory.usable(name)?;
            self.extents_of(known, range, limit)
        })
    }

    /// All ranges of the disk, within `range`, that a bitmap has as changed, as
    /// [`bitmap_extents`](Self::bitmap_extents) gives them.
    pub fn dirty_ranges(&self, name: &[u8], range: Range<u64>) -> DirtyRanges<'_> {
        DirtyRanges {
            image: self,
            name: name.to_vec(),
            left: range,
            found: Vec::new().into_iter(),
        }
    }

    pub(super) fn extents_of(
        &self,
        known: &Known,
        range: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Range<u64>>, ImageError> {
        let size = self.meta.header().virtual_size();
        let range = range.start..range.end.min(size);
        if range.is_empty() || limit == 0 {
            return Ok(Vec::new());
        }
        let granularity_bits = known.entry.granularity_bits;
        let mut runs = Runs::new(limit);
        let bits = range.start >> granularity_bits..((range.end - 1) >> granularity_bits) + 1;
        self.walk_bits(known, bits, &mut runs)?;
        let bytes = |bit: u64| bit << granularity_bits;
        Ok(runs
            .runs
            .into_iter()
            .map(|run| bytes(run.start).max(range.start)..bytes(run.end).min(range.end))
            .collect())
    }

    /// Bytes of the disk that a bitmap has as changed.
    pub(super) fn dirty_bytes(&self, known: &Known, budget: &Cell<u64>) -> Result<u64, ImageError> {
        let size = self.meta.header().virtual_size();
        let granularity_bits = known.entry.granularity_bits;
        let granularity = 1_u64 << granularity_bits;
        let bits = size.div_ceil(granularity);
        let mut count = Count::default();
        let counted = Bits {
            budget: Some(budget),
            ..self.bits_of(known)
        };
        counted.walk(0..bits, &mut count)?;
        let mut last = Count::default();
        if !size.is_multiple_of(granularity) {
            self.walk_bits(known, bits - 1..bits, &mut last)?;
        }
        let beyond = last.0 * (granularity - size % granularity);
        Ok((count.0 << granularity_bits) - beyond)
    }

    pub(super) fn walk_bits(
        &self,
        known: &Known,
        bits: Range<u64>,
        sink: &mut dyn Sink,
    ) -> Result<(), ImageError> {
        self.bits_of(known).walk(bits, sink)
    }

    pub(super) fn bits_of<'a>(&'a self, known: &'a Known) -> Bits<'a> {
        let tracker = known.tracker;
        Bits {
            storage: &**self.meta.storage(),
            geometry: self.geometry,
            entry: &known.entry,
            tracker: tracker.and_then(|number| self.bitmaps.trackers.get(number)),
            budget: None,
        }
    }

    /// Shows the directory: the one in memory or, before the first write, the one in the file.
    pub(super) fn with_directory<T>(
        &self,
        look: impl FnOnce(&Directory) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let state = self.bitmaps.lock();
        match &state.directory {
            Some(directory) => look(directory),
            None => look(&read_directory(&**self.meta.storage(), &self.header())?),
        }
    }
}

/// The ranges of the disk that a bitmap has as changed. It ends after the first error.
#[derive(Debug)]
pub struct DirtyRanges<'a> {
    image: &'a Image,
    name: Vec<u8>,
    /// Not asked for yet.
    left: Range<u64>,
    found: std::vec::IntoIter<Range<u64>>,
}

impl Iterator for DirtyRanges<'_> {
    type Item = Result<Range<u64>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(range) = self.found.next() {
            return Some(Ok(range));
        }
        if self.left.is_empty() {
            return None;
        }
        match self
            .image
            .bitmap_extents(&self.name, self.left.clone(), PAGE)
        {
            Ok(found) => {
                self.left.start = match found.last() {
                    Some(last) if found.len() == PAGE => last.end,
                    _ => self.left.end,
                };
                self.found = found.into_iter();
                self.found.next().map(Ok)
            }
            Err(error) => {
                self.left = 0..0;
                Some(Err(error))
            }
        }
    }
}
