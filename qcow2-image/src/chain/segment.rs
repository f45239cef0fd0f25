//! What the disk is made of, for those who want to know.

use std::ops::Range;

use super::{Chain, Found, Local, Walker};
use crate::ImageError;

/// What a stretch of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SegmentKind {
    /// Stored bytes, which may be anything.
    Data,
    /// Stored bytes, compressed.
    Compressed,
    /// Zeros, since the layer says so: a zero cluster, or a hole of a raw disk.
    Zero,
    /// Zeros, since no layer says anything. The depth is that of the last layer that is so long.
    Unallocated,
}

impl SegmentKind {
    /// Whether every byte is known to read as zero.
    pub fn reads_as_zeros(self) -> bool {
        matches!(self, Self::Zero | Self::Unallocated)
    }
}

/// A stretch of the disk that is of one kind and in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Segment {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Which layer it is in: an index of [`Chain::layers`].
    pub depth: usize,
    /// What it is.
    pub kind: SegmentKind,
    /// Where it begins in the [data file](super::Layer::data) of its layer, if it has a place of its own there. Zeros may have one, compressed
    /// clusters have none. What is encrypted lies there encrypted.
    pub host: Option<u64>,
}

impl Segment {
    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    fn new(offset: u64, len: u64, found: Found) -> Self {
        let (kind, host) = match found.local {
            Local::Data(host) => (SegmentKind::Data, Some(host)),
            Local::Packed(_) => (SegmentKind::Compressed, None),
            Local::Zero(host) => (SegmentKind::Zero, host),
            Local::Nothing(host) => (SegmentKind::Unallocated, host),
        };
        Self {
            offset,
            len,
            depth: found.depth,
            kind,
            host,
        }
    }

    fn joins(&self, next: &Self) -> bool {
        let host = self.host.map(|host| host.wrapping_add(self.len));
        (self.depth, self.kind, host) == (next.depth, next.kind, next.host)
    }
}

/// The segments of a range of the disk, in order and without gaps; neighbours that belong together are one. The first error
/// is the last item.
#[derive(Debug)]
pub struct Segments<'a> {
    walker: Walker<'a>,
    at: u64,
    end: u64,
    /// The first one that has not been given yet.
    next: Option<Segment>,
}

impl<'a> Segments<'a> {
    pub(super) fn new(chain: &Chain<'a>, range: Range<u64>) -> Result<Self, ImageError> {
        let walker = Walker::new(chain, range.end)?;
        Ok(Self {
            at: range.start,
            end: range.end.min(walker.len()),
            walker,
            next: None,
        })
    }

    fn advance(&mut self) -> Result<Option<Segment>, ImageError> {
        while self.at < self.end {
            let (found, len) = self.walker.look(self.at, self.end)?;
            let segment = Segment::new(self.at, len, found);
            self.at += len;
            match &mut self.next {
                Some(last) if last.joins(&segment) => last.len += len,
                last => {
                    if let Some(whole) = last.replace(segment) {
                        return Ok(Some(whole));
                    }
                }
            }
        }
        Ok(self.next.take())
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<Segment, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.advance();
        if result.is_err() {
            (self.at, self.next) = (self.end, None);
        }
        result.transpose()
    }
}
