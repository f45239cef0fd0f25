//! Progress that counts data only, as scripts know it of `convert`.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use qcow2_image::Monitor;
use qcow2_io::Storage;

use crate::img::progress::Progress;

/// A step is at most so much data, and ends where data ends; bytes.
const STEP: u64 = 2 << 20;
/// Extents that are asked for at a time.
const LOOK: usize = 1024;

/// Tells of the data that is through.
pub(super) struct Weight<'a> {
    source: &'a dyn Storage,
    progress: &'a Progress<'a>,
    come_to: Mutex<Place>,
}

/// How far the copy is; bytes.
#[derive(Default)]
struct Place {
    /// Data that is through.
    data: u64,
    /// Of that, what has been told.
    told: u64,
}

impl<'a> Weight<'a> {
    pub(super) fn new(source: &'a dyn Storage, progress: &'a Progress<'a>) -> Self {
        Self {
            source,
            progress,
            come_to: Mutex::default(),
        }
    }
}

impl Monitor for Weight<'_> {
    fn progress(&self, _done: u64, _total: u64) {}

    fn data(&self, range: Range<u64>, bytes: u64) {
        let mut come_to = self.come_to.lock().unwrap_or_else(PoisonError::into_inner);
        come_to.data += bytes;
        let untold = come_to.data - come_to.told;
        let ends = || data(self.source, range.end, range.end + 1) == 0;
        if untold >= STEP || (untold > 0 && ends()) {
            come_to.told = come_to.data;
            self.progress.at(come_to.data);
        }
    }
}

/// Bytes from `start` to `end` that are data; all that can't be told is.
pub(super) fn data(source: &dyn Storage, start: u64, end: u64) -> u64 {
    let end = end.min(source.len().unwrap_or(end));
    let (mut at, mut sum) = (start, 0);
    while at < end {
        let found = match source.extents(at..end, LOOK) {
            Ok(found) if !found.is_empty() => found,
            _ => return sum + (end - at),
        };
        for extent in found {
            let stop = extent.end().min(end);
            if !extent.kind.reads_as_zeros() {
                sum += stop.saturating_sub(at);
            }
            at = at.max(stop);
        }
    }
    sum
}
