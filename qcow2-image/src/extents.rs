//! What a stretch of the disk is, through the whole chain.

use std::ops::Range;

use qcow2_io::{Extent, ExtentKind, Storage as _};

use crate::chain::Local;
use crate::scan::Scan;
use crate::{Image, ImageError};

/// Entries that are looked at in one call, so that nobody waits long for it: 64 GiB of the disk with clusters of 64 KiB.
pub(crate) const ENTRIES_MAX: u64 = 1 << 20;

impl Image {
    /// The extents of a range; depth 0 is this image, 1 its backing file, and so on.
    pub(crate) fn map_extents(
        &self,
        range: Range<u64>,
        max: usize,
    ) -> Result<Vec<Extent>, ImageError> {
        let mut list = List {
            extents: Vec::new(),
            max,
        };
        if max == 0 || range.is_empty() {
            return Ok(list.extents);
        }
        let _pass = self.gate.enter();
        let end = range.end.min(self.virtual_size()).max(range.start);
        let mut scan = Scan::new(self, range.start.min(end)..end).limited(ENTRIES_MAX);
        let mut at = range.start;
        while let Some(stretch) = scan.next()? {
            let len = stretch.len();
            let full = match stretch.local {
                Local::Zero(_) => list.push(at, len, ExtentKind::Zero, 0),
                Local::Data(host) if self.maps_holes() => {
                    self.map_data(&mut list, stretch.range.clone(), host)?
                }
                Local::Data(_) | Local::Packed(_) => list.push(at, len, ExtentKind::Data, 0),
                Local::Nothing(_) => self.map_below(&mut list, stretch.range.clone())?,
            };
            if full {
                return Ok(list.extents);
            }
            at = stretch.range.end;
        }
        if at >= end {
            list.push(at, range.end - at, ExtentKind::Hole, 0);
        }
        Ok(list.extents)
    }

    /// The extents of what lies in the data file from `host` on: where that has a hole, there are zeros. Tells whether the list is
    /// full.
    fn map_data(&self, list: &mut List, range: Range<u64>, host: u64) -> Result<bool, ImageError> {
        let storage = self.meta.data();
        let to_guest = |at: u64| at - host + range.start;
        let end = host + (range.end - range.start);
        let mut at = host;
        while at < end {
            let found = storage.extents(at..end, list.room())?;
            for extent in &found {
                let kind = if extent.kind.reads_as_zeros() {
                    ExtentKind::Zero
                } else {
                    ExtentKind::Data
                };
                if list.push(to_guest(extent.offset), extent.len, kind, 0) {
                    return Ok(true);
                }
            }
            match found.last() {
                Some(last) if last.end() > at => at = last.end(),
                _ => return Ok(list.push(to_guest(at), end - at, ExtentKind::Data, 0)),
            }
        }
        Ok(false)
    }

    /// The extents of the backing file; what is behind its end is a hole of this layer. Tells whether the list is full.
    fn map_below(&self, list: &mut List, range: Range<u64>) -> Result<bool, ImageError> {
        let Some(backing) = &self.backing else {
            return Ok(list.push(range.start, range.end - range.start, ExtentKind::Hole, 0));
        };
        let len = backing.len()?;
        let end = range.end.min(len).max(range.start);
        let mut at = range.start;
        while at < end {
            let found = backing.extents(at..end, list.room())?;
            for extent in &found {
                if list.push(extent.offset, extent.len, extent.kind, extent.depth + 1) {
                    return Ok(true);
                }
            }
            match found.last() {
                Some(last) if last.end() > at => at = last.end(),
                // A backend that gives nothing would be asked for ever.
                _ => return Ok(true),
            }
        }
        Ok(list.push(end, range.end - end, ExtentKind::Hole, 0))
    }
}

/// Extents in order, neighbours of one kind and depth joined.
struct List {
    extents: Vec<Extent>,
    max: usize,
}

impl List {
    fn room(&self) -> usize {
        // One more may be joined to the last.
        (self.max - self.extents.len()).saturating_add(1)
    }

    /// Tells whether the list is full, and the stretch not in it.
    fn push(&mut self, offset: u64, len: u64, kind: ExtentKind, depth: u32) -> bool {
        if len == 0 {
            return false;
        }
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if last.kind == kind && last.depth == depth => last.len += len,
            _ if count >= self.max => return true,
            _ => {
                let mut extent = Extent::new(offset, len, kind);
                extent.depth = depth;
                self.extents.push(extent);
            }
        }
        false
    }
}
