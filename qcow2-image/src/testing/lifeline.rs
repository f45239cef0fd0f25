//! A way to end a program's use of a storage from one moment to the next.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_io::{
    Extent, Limits, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags,
};

/// Cuts all storages that hang on it, as when a process is killed: what was done stays, and nothing comes after it.
#[derive(Clone, Debug, Default)]
pub(super) struct Lifeline {
    cut: Arc<AtomicBool>,
}

impl Lifeline {
    /// Lets a storage hang on it.
    pub(super) fn hold(&self, storage: &Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Held {
            storage: Arc::clone(storage),
            cut: Arc::clone(&self.cut),
        })
    }

    /// From now on every operation fails.
    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }
}

#[derive(Debug)]
struct Held {
    storage: Arc<dyn Storage>,
    cut: Arc<AtomicBool>,
}

impl Held {
    fn alive(&self, operation: Operation) -> Result<&dyn Storage> {
        if self.cut.load(Ordering::Acquire) {
            return Err(StorageError::new(operation, StorageErrorKind::Io));
        }
        Ok(&*self.storage)
    }
}

impl Storage for Held {
    fn len(&self) -> Result<u64> {
        self.alive(Operation::Len)?.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.alive(Operation::Read)?.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.alive(Operation::Write)?
            .write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.alive(Operation::WriteZeroes)?
            .write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.alive(Operation::Discard)?.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.alive(Operation::Flush)?.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.alive(Operation::SetLen)?.set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.alive(Operation::Extents)?.extents(range, max)
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }
}
