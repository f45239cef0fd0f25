//! What `qemu-img map` tells: for each stretch of the disk, where it comes from.
//!
//! It stands on [`Chain::segments`](crate::chain::Chain::segments) and says the same in QEMU's terms, row for row. It differs in one
//! thing: of an image that maps much more than its file has space for, as after preallocation, the holes in the file are looked
//! at, too, and their stretches are data that is zero.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_image::Image;
//! use qcow2_image::create::CreateOptions;
//! use qcow2_image::map::map;
//! use qcow2_io::{Memory, Storage};
//!
//! let file = Arc::new(Memory::new());
//! Image::create(&file, &CreateOptions::new(1 << 20))?;
//! let image = Image::options().open(file)?;
//! image.write_at(&[1; 65536], 65_536)?;
//! let rows: Vec<_> = map(image.chain(), 0..1 << 20)?.collect::<Result<_, _>>()?;
//! let found: Vec<_> = rows.iter().map(|row| (row.start, row.len, row.data)).collect();
//! assert_eq!(found, [(0, 65_536, false), (65_536, 65_536, true), (131_072, 917_504, false)]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;

use qcow2_io::Extent;

use crate::ImageError;
use crate::chain::{Chain, Layer, Segment, SegmentKind, Segments};

/// Extents that a file is asked for at a time.
const BATCH: usize = 256;

/// A row of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapEntry<'a> {
    /// First byte of the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Which layer it comes from; 0 is the top one.
    pub depth: usize,
    /// Whether some layer says something of it.
    pub present: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether bytes are stored for it.
    pub data: bool,
    /// Whether they are compressed.
    pub compressed: bool,
    /// Where it begins in its layer's file, if it lies there as it is: neither compressed nor encrypted. Bytes.
    pub offset: Option<u64>,
    /// That file, if it was opened by name; told together with an offset.
    pub path: Option<&'a Path>,
}

impl MapEntry<'_> {
    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether `next`, which begins where this ends, belongs to the same row.
    fn joins(&self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset.wrapping_add(self.len));
        (self.depth, self.present, self.zero, self.data)
            == (next.depth, next.present, next.zero, next.data)
            && (self.compressed, offset) == (next.compressed, next.offset)
    }
}

/// The map of a range of the disk, front to back. The rows are in order, without gaps, and as long as they can be.
///
/// A snapshot: whatever writes to the disk meanwhile makes it old.
///
/// # Errors
///
/// When a layer can't tell its length. Each row may be an error, which is the last one.
pub fn map(chain: Chain<'_>, range: Range<u64>) -> Result<Map<'_>, ImageError> {
    let segments = chain.segments(range)?;
    Ok(Map {
        chain,
        segments,
        parts: VecDeque::new(),
        whole: None,
        next: None,
        is_over: false,
    })
}

/// The rows of a [`map`].
#[derive(Debug)]
pub struct Map<'a> {
    chain: Chain<'a>,
    segments: Segments<'a>,
    /// Rows that are not joined yet, of the segment that is looked at.
    parts: VecDeque<MapEntry<'a>>,
    /// What of that segment its file has still to be asked about.
    whole: Option<MapEntry<'a>>,
    /// The row that the next part may belong to.
    next: Option<MapEntry<'a>>,
    is_over: bool,
}

impl<'a> Map<'a> {
    fn advance(&mut self) -> Result<Option<MapEntry<'a>>, ImageError> {
        while let Some(part) = self.part()? {
            match &mut self.next {
                Some(last) if last.joins(&part) => last.len += part.len,
                last => {
                    if let Some(row) = last.replace(part) {
                        return Ok(Some(row));
                    }
                }
            }
        }
        Ok(self.next.take())
    }

    /// The next stretch, perhaps shorter than it could be.
    fn part(&mut self) -> Result<Option<MapEntry<'a>>, ImageError> {
        loop {
            if let Some(part) = self.parts.pop_front() {
                return Ok(Some(part));
            }
            if let Some(whole) = self.whole.take() {
                self.divide(whole)?;
                continue;
            }
            let Some(segment) = self.segments.next().transpose()? else {
                return Ok(None);
            };
            let entry = self.entry(&segment);
            if segment.kind == SegmentKind::Data && self.maps_holes(entry.depth) {
                self.whole = Some(entry);
            } else {
                return Ok(Some(entry));
            }
        }
    }

    fn entry(&self, segment: &Segment) -> MapEntry<'a> {
        let layer = self.chain.layers().get(segment.depth);
        let is_encrypted = layer
            .and_then(Layer::image)
            .is_some_and(|image| image.crypt.is_some());
        let offset = segment.host.filter(|_| !is_encrypted);
        MapEntry {
            start: segment.offset,
            len: segment.len,
            depth: segment.depth,
            present: segment.kind != SegmentKind::Unallocated,
            zero: segment.kind.reads_as_zeros(),
            data: !segment.kind.reads_as_zeros(),
            compressed: segment.kind == SegmentKind::Compressed,
            offset,
            path: offset.and(layer.and_then(Layer::data_path)),
        }
    }

    fn maps_holes(&self, depth: usize) -> bool {
        let layer = self.chain.layers().get(depth);
        let image = layer.and_then(Layer::image);
        image.is_some_and(crate::Image::maps_holes)
    }

    /// Asks the file where a stretch of it has holes.
    fn divide(&mut self, whole: MapEntry<'a>) -> Result<(), ImageError> {
        let (Some(layer), Some(host)) = (self.chain.layers().get(whole.depth), whole.offset) else {
            self.parts.push_back(whole);
            return Ok(());
        };
        let end = host.saturating_add(whole.len);
        let found = layer.data().extents(host..end, BATCH)?;
        let mut done = 0;
        for extent in &found {
            let len = extent.end().min(end) - extent.offset;
            self.parts.push_back(MapEntry {
                start: whole.start + done,
                len,
                zero: extent.kind.reads_as_zeros(),
                offset: Some(host + done),
                ..whole
            });
            done += len;
        }
        let rest = MapEntry {
            start: whole.start + done,
            len: whole.len - done,
            offset: Some(host + done),
            ..whole
        };
        match found.last().map(Extent::end) {
            _ if rest.len == 0 => {}
            // A file that tells nothing has data.
            None => self.parts.push_back(rest),
            Some(_) => self.whole = Some(rest),
        }
        Ok(())
    }
}

impl<'a> Iterator for Map<'a> {
    type Item = Result<MapEntry<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let row = self.advance();
        self.is_over = !matches!(row, Ok(Some(_)));
        row.transpose()
    }
}
