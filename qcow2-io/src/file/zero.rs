//! Zeros and holes without buffers, as far as the file system can.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use super::direct::Direct;
use crate::storage::check_end;
use crate::{File, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags};

/// What this file was found to do and not to do, so that it is asked only once.
#[derive(Debug, Default)]
pub(super) struct Abilities {
    punch: Ability,
    zero: Ability,
}

#[derive(Debug, Default)]
struct Ability {
    proven: AtomicBool,
    missing: AtomicBool,
}

/// How many zeros are written at once.
const CHUNK: u64 = 1 << 20;

enum Outcome {
    Done,
    Unsupported,
}

impl File {
    /// Gives back the part of a range that lies within the file.
    pub(super) fn punch(&self, range: &Range<u64>) -> Result<()> {
        let end = range.end.min(self.len()?);
        if range.start >= end {
            return Ok(());
        }
        let range = range.start..end;
        let units = self.whole_units(&range);
        match self.punch_within(Operation::Discard, &units)? {
            Outcome::Done => self.write_edges(&range, &units),
            Outcome::Unsupported => Err(self.cannot(Operation::Discard, "punch holes")),
        }
    }

    /// Makes a range read as zeros, growing the file when it ends past it.
    pub(super) fn zero(&self, range: &Range<u64>, flags: ZeroFlags) -> Result<()> {
        let operation = Operation::WriteZeroes;
        let len = self.len()?;
        if self.fixed_len.is_some() && range.end > len {
            return Err(self
                .fail(operation, StorageErrorKind::NoSpace)
                .with_detail(format!("the block device ends at {len:#x}")));
        }
        let units = self.whole_units(range);
        if flags.contains(ZeroFlags::MAY_UNMAP) {
            let inside = units.start.min(len)..units.end.min(len);
            if let Outcome::Done = self.punch_within(operation, &inside)? {
                if range.end > len {
                    self.grow(range.end)?;
                }
                return self.write_edges(range, &units);
            }
        }
        if let Outcome::Done = self.zero_within(operation, &units)? {
            return self.write_edges(range, &units);
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(self.cannot(operation, "zero a range"));
        }
        self.write_zero_bytes(range)
    }

    /// The whole units of a range: all that a block device zeroes or punches. In a regular file that is all of it.
    fn whole_units(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(self.unit).min(range.end);
        let end = range.end.saturating_sub(range.end % self.unit).max(start);
        start..end
    }

    /// Writes zeros to what a range has beyond its whole units.
    fn write_edges(&self, range: &Range<u64>, units: &Range<u64>) -> Result<()> {
        self.write_zero_bytes(&(range.start..units.start))?;
        self.write_zero_bytes(&(units.end..range.end))
    }

    /// Makes the file at least `end` long. The last byte is written rather than the length set: another thread may have grown
    /// the file further since it was looked at, and setting the length would cut that off.
    fn grow(&self, end: u64) -> Result<()> {
        self.write_at(&[0], end.saturating_sub(1))
    }

    fn punch_within(&self, operation: Operation, range: &Range<u64>) -> Result<Outcome> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(operation, flags, &self.abilities.punch, range)
    }

    fn zero_within(&self, operation: Operation, range: &Range<u64>) -> Result<Outcome> {
        self.allocate(
            operation,
            FallocateFlags::ZERO_RANGE,
            &self.abilities.zero,
            range,
        )
    }

    fn allocate(
        &self,
        operation: Operation,
        flags: FallocateFlags,
        ability: &Ability,
        range: &Range<u64>,
    ) -> Result<Outcome> {
        if range.is_empty() {
            return Ok(Outcome::Done);
        }
        if ability.missing.load(Ordering::Relaxed) {
            return Ok(Outcome::Unsupported);
        }
        if self.fixed_len.is_some() && !ability.proven.load(Ordering::Relaxed) {
            // The system drops the cached pages of a block device before it finds that the device can't: what was written to them
            // must have arrived by then.
            self.sync()?;
        }
        let len = check_end(operation, 0, range.end.saturating_sub(range.start))?;
        let gate = self.direct.as_ref().map(Direct::together);
        let result = retry_on_intr(|| fallocate(&self.inner, flags, range.start, len));
        drop(gate);
        match result {
            Ok(()) => {
                ability.proven.store(true, Ordering::Relaxed);
                Ok(Outcome::Done)
            }
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                ability.missing.store(true, Ordering::Relaxed);
                Ok(Outcome::Unsupported)
            }
            Err(errno) => Err(self.fail_io(operation, errno)),
        }
    }

    fn cannot(&self, operation: Operation, what: &str) -> StorageError {
        self.fail(operation, StorageErrorKind::Unsupported)
            .with_detail(format!("the file system can't {what}"))
    }

    fn write_zero_bytes(&self, range: &Range<u64>) -> Result<()> {
        let longest = range.end.saturating_sub(range.start).min(CHUNK);
        let zeros = vec![0; usize::try_from(longest).unwrap_or(0)];
        let mut position = range.start;
        while position < range.end {
            let len = range.end.saturating_sub(position).min(CHUNK);
            let part = zeros
                .get(..usize::try_from(len).unwrap_or(0))
                .unwrap_or_default();
            self.write_at(part, position)?;
            position = position.saturating_add(len);
        }
        Ok(())
    }
}
