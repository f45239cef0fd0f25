//! Progress that counts data only, as scripts know it of `convert`.

use std::sync::{Mutex, PoisonError};

use qcow2_image::Monitor;
use qcow2_io::Storage;

use crate::img::progress::Progress;

/// A step is at most so much data, and ends where data ends; bytes.
const STEP: u64 = 2 << 20;
/// Extents that are asked for at a time.
const LOOK: usize = 1024;

/// Tells of the data below the place that a copy has come to.
pub(super) struct Weight<'a> {
    source: &'a dyn Storage,
    progress: &'a Progress<'a>,
    come_to: Mutex<Place>,
}

/// How far the copy is; bytes.
#[derive(Default)]
struct Place {
    /// In the source.
    at: u64,
    /// Data below.
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
    fn progress(&self, done: u64, total: u64) {
        let mut come_to = self.come_to.lock().unwrap_or_else(PoisonError::into_inner);
        if done <= come_to.at {
            return;
        }
        come_to.data += data(self.source, come_to.at, done);
        come_to.at = done;
        let untold = come_to.data - come_to.told;
        let ends = || done >= total || data(self.source, done, done + 1) == 0;
        if untold >= STEP || (untold > 0 && ends()) {
            come_to.told = come_to.data;
            self.progress.at(come_to.data);
        }
    }
}

/// Bytes from `start` to `end` that are data; all that can't be told is.
pub(super) fn data(source: &dyn Storage, start: u64, end: u64) -> u64 {
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
