//! Writes to a disk that takes whole blocks only: what begins or ends within a block is read, changed and written, one request
//! after the other.
//!
//! The disk below takes any bytes, so nothing but the guest's is written; what shows is the order, and the steps.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

use qcow2_io::{Operation, Result, Storage as _, StorageError};

use super::Blkdebug;

/// The blocks that requests are at work on.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    busy: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

/// The blocks are this request's while it lives.
pub(super) struct Held<'a> {
    blocks: &'a Blocks,
    range: Range<u64>,
}

impl Blocks {
    /// Waits until no other request is at work on any of these blocks.
    fn hold(&self, range: Range<u64>) -> Held<'_> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        while busy
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            busy = self
                .freed
                .wait(busy)
                .unwrap_or_else(PoisonError::into_inner);
        }
        busy.push(range.clone());
        Held {
            blocks: self,
            range,
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut busy = self
            .blocks
            .busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = busy.iter().position(|range| *range == self.range) {
            busy.swap_remove(at);
        }
        self.blocks.freed.notify_all();
    }
}

impl Blkdebug {
    /// What comes before a write: the blocks that it has only parts of are read. `None` if any bytes can be written.
    pub(super) fn read_around(&self, offset: u64, len: u64) -> Result<Option<Held<'_>>> {
        let Some(align) = self.align.filter(|_| len > 0) else {
            return Ok(None);
        };
        let end = offset.saturating_add(len);
        let first = offset / align * align;
        let behind = end.checked_next_multiple_of(align).unwrap_or(u64::MAX);
        let held = self.blocks.hold(first..behind);
        let (head, tail) = (offset != first, end != behind);
        if head && tail && behind - first == align {
            self.event("pwritev_rmw_head")?;
            self.event("pwritev_rmw_tail")?;
            self.read_block(first, align)?;
            self.event("pwritev_rmw_after_head")?;
            self.event("pwritev_rmw_after_tail")?;
            return Ok(Some(held));
        }
        if head {
            self.event("pwritev_rmw_head")?;
            self.read_block(first, align)?;
            self.event("pwritev_rmw_after_head")?;
        }
        if tail {
            self.event("pwritev_rmw_tail")?;
            self.read_block(behind - align, align)?;
            self.event("pwritev_rmw_after_tail")?;
        }
        Ok(Some(held))
    }

    fn read_block(&self, offset: u64, align: u64) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(align).unwrap_or(0)];
        self.below.read_at(&mut bytes, offset)
    }

    /// A step of a write, at which it may stop or fail.
    pub(super) fn event(&self, name: &str) -> Result<()> {
        self.stop_at(name);
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        match rules.step(name) {
            Some(errno) => Err(StorageError::from_io(Operation::Write, errno)),
            None => Ok(()),
        }
    }
}
