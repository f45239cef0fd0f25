//! A record of what changed several storages, in one order.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qcow2_io::{Event, Extent, Limits, Result, Storage, ZeroFlags};

/// One event, and the storage it happened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the storage.
    pub storage: usize,
    /// What happened.
    pub event: Event,
}

/// What happened to all storages of a recording, in the order in which it did.
#[derive(Debug, Default)]
pub struct Tape {
    entries: Mutex<Vec<Entry>>,
}

impl Tape {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Wraps a storage, so that what changes it is recorded under `number`.
    pub fn record(self: &Arc<Self>, number: usize, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Recorded {
            storage,
            number,
            tape: Arc::clone(self),
        })
    }

    /// Events so far.
    pub fn position(&self) -> usize {
        self.entries().len()
    }

    /// Takes the record.
    pub fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut *self.entries())
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A storage whose changes are recorded. They go through one at a time, over all storages of the tape, so that the
/// record's order is the true one.
#[derive(Debug)]
struct Recorded {
    storage: Arc<dyn Storage>,
    number: usize,
    tape: Arc<Tape>,
}

impl Recorded {
    fn change(
        &self,
        action: impl FnOnce(&dyn Storage) -> Result<()>,
        event: impl FnOnce() -> Event,
    ) -> Result<()> {
        let mut entries = self.tape.entries();
        action(&*self.storage)?;
        entries.push(Entry {
            storage: self.number,
            event: event(),
        });
        Ok(())
    }
}

impl Storage for Recorded {
    fn len(&self) -> Result<u64> {
        self.storage.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.storage.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.change(
            |storage| storage.write_vectored_at(bufs, offset),
            || Event::Write {
                offset,
                bytes: bufs.iter().flat_map(|buf| buf.iter().copied()).collect(),
            },
        )
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let event = Event::WriteZeroes {
            range: range.clone(),
            flags,
        };
        self.change(|storage| storage.write_zeroes(range, flags), || event)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let event = Event::Discard {
            range: range.clone(),
        };
        self.change(|storage| storage.discard(range), || event)
    }

    fn flush(&self) -> Result<()> {
        self.change(|storage| storage.flush(), || Event::Flush)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|storage| storage.set_len(len), || Event::SetLen { len })
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.storage.extents(range, max)
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }
}
