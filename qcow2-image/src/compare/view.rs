//! Where one disk has data.

use std::collections::VecDeque;

use qcow2_io::{Extent, ExtentKind, Storage};

use super::{CompareError, Side};

/// Extents that a disk is asked for at a time.
const BATCH: usize = 256;

/// The extents of a disk, from front to back.
pub(super) struct View<'a> {
    storage: &'a dyn Storage,
    side: Side,
    pub(super) len: u64,
    known: VecDeque<Extent>,
}

impl<'a> View<'a> {
    pub(super) fn new(storage: &'a dyn Storage, side: Side, len: u64) -> Self {
        Self {
            storage,
            side,
            len,
            known: VecDeque::new(),
        }
    }

    /// What is at `at`, and where that ends. Behind the end of the disk is a hole without end. Must not be asked of places
    /// before the last.
    pub(super) fn at(&mut self, at: u64) -> Result<(ExtentKind, u64), CompareError> {
        while self.known.front().is_some_and(|extent| extent.end() <= at) {
            self.known.pop_front();
        }
        if at >= self.len {
            return Ok((ExtentKind::Hole, u64::MAX));
        }
        if self.known.is_empty() {
            let found = self.storage.extents(at..self.len, BATCH);
            self.known = found
                .map_err(|source| CompareError::Storage {
                    side: self.side,
                    offset: at,
                    len: self.len - at,
                    source,
                })?
                .into();
        }
        Ok(match self.known.front() {
            Some(extent) if extent.end() > at => (extent.kind, extent.end().min(self.len)),
            // One that says nothing has data.
            _ => (ExtentKind::Data, self.len),
        })
    }
}
