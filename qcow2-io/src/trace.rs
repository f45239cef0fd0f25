//! A record of all that changed a storage, for replaying it up to any moment.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Extent, Limits, Result, Storage, ZeroFlags};

/// Something that changed a storage, or made changes durable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// A range was zeroed.
    WriteZeroes {
        /// The bytes meant.
        range: Range<u64>,
        /// How it could be done.
        flags: ZeroFlags,
    },
    /// A range was given back.
    Discard {
        /// The bytes meant.
        range: Range<u64>,
    },
    /// All events before are durable.
    Flush,
    /// The length was changed.
    SetLen {
        /// The new length in bytes.
        len: u64,
    },
}

impl Event {
    /// Does it again, to `storage`.
    ///
    /// # Errors
    ///
    /// What `storage` reports.
    pub fn apply(&self, storage: &(impl Storage + ?Sized)) -> Result<()> {
        match self {
            Self::Write { offset, bytes } => storage.write_at(bytes, *offset),
            Self::WriteZeroes { range, flags } => storage.write_zeroes(range.clone(), *flags),
            Self::Discard { range } => storage.discard(range.clone()),
            Self::Flush => storage.flush(),
            Self::SetLen { len } => storage.set_len(*len),
        }
    }

    /// Whether it makes the events before it durable.
    pub fn is_flush(&self) -> bool {
        matches!(self, Self::Flush)
    }

    /// The pieces that a crash may tear a write into: cut at multiples of `unit` bytes. Other events, and all when `unit`
    /// is 0, stay whole.
    pub fn torn(&self, unit: u64) -> Vec<Self> {
        let Self::Write { offset, bytes } = self else {
            return vec![self.clone()];
        };
        if unit == 0 {
            return vec![self.clone()];
        }
        let mut pieces = Vec::new();
        let mut position = *offset;
        let mut rest: &[u8] = bytes;
        while !rest.is_empty() {
            let room = unit.saturating_sub(position % unit);
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            let (piece, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            pieces.push(Self::Write {
                offset: position,
                bytes: piece.to_vec(),
            });
            position = position.saturating_add(len as u64);
            rest = tail;
        }
        pieces
    }
}

/// Does a sequence of events again, to `storage`: any prefix or subset of a trace.
///
/// # Errors
///
/// What `storage` reports; the events after the failed one are not applied.
pub fn replay<'a>(
    events: impl IntoIterator<Item = &'a Event>,
    storage: &(impl Storage + ?Sized),
) -> Result<()> {
    events
        .into_iter()
        .try_for_each(|event| event.apply(storage))
}

/// A storage that records what changes it, in the order in which it happened.
///
/// Changes go through one at a time, so that the record's order is the true one. A request that failed is not recorded.
/// Reads aren't either, and don't wait. Put it into an `Arc` to read the record while something else uses it.
#[derive(Debug)]
pub struct Trace<S> {
    storage: S,
    events: Mutex<Vec<Event>>,
}

impl<S: Storage> Trace<S> {
    /// Wraps a storage, with an empty record.
    pub fn new(storage: S) -> Self {
        Self {
            storage,
            events: Mutex::default(),
        }
    }

    /// A copy of the record.
    pub fn events(&self) -> Vec<Event> {
        self.record().clone()
    }

    /// Takes the record out and starts a new one.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.record())
    }

    /// How many events there are so far: a mark to cut the record at later.
    pub fn position(&self) -> usize {
        self.record().len()
    }

    /// The storage below.
    pub fn get_ref(&self) -> &S {
        &self.storage
    }

    /// Gives the storage below back.
    pub fn into_inner(self) -> S {
        self.storage
    }

    fn record(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        action: impl FnOnce(&S) -> Result<()>,
        event: impl FnOnce() -> Event,
    ) -> Result<()> {
        let mut record = self.record();
        action(&self.storage)?;
        record.push(event());
        Ok(())
    }
}

impl<S: Storage> Storage for Trace<S> {
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
        self.change(
            |storage| storage.write_zeroes(range.clone(), flags),
            || Event::WriteZeroes {
                range: range.clone(),
                flags,
            },
        )
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.change(
            |storage| storage.discard(range.clone()),
            || Event::Discard {
                range: range.clone(),
            },
        )
    }

    fn flush(&self) -> Result<()> {
        self.change(Storage::flush, || Event::Flush)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|storage| storage.set_len(len), || Event::SetLen { len })
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.storage.extents(range, max)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.storage.allocated()
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fault, Faulty, Memory, Operation};

    #[test]
    fn a_replayed_prefix_gives_the_state_of_that_moment() {
        let trace = Trace::new(Memory::new());
        trace.write_at(&[1; 1000], 0).unwrap();
        trace.flush().unwrap();
        let mark = trace.position();
        let then = trace.get_ref().to_vec().unwrap();
        trace.write_zeroes(10..20, ZeroFlags::MAY_UNMAP).unwrap();
        trace.discard(30..40).unwrap();
        trace
            .write_vectored_at(&[IoSlice::new(&[2; 3]), IoSlice::new(&[3; 3])], 998)
            .unwrap();
        trace.set_len(1002).unwrap();

        let events = trace.events();
        assert_eq!(events.len(), 6);
        assert_eq!(
            events[4],
            Event::Write {
                offset: 998,
                bytes: vec![2, 2, 2, 3, 3, 3]
            }
        );
        let (before, after) = events.split_at(mark);
        assert!(before[1].is_flush());
        let copy = Memory::new();
        replay(before, &copy).unwrap();
        assert_eq!(copy.to_vec().unwrap(), then);
        replay(after, &copy).unwrap();
        assert_eq!(copy.to_vec().unwrap(), trace.get_ref().to_vec().unwrap());
    }

    #[test]
    fn what_failed_is_not_recorded() {
        let trace = Trace::new(Faulty::new(Memory::new()));
        trace.get_ref().add(Fault::on(Operation::Write));
        trace.write_at(&[1], 0).unwrap_err();
        trace.write_at(&[2], 0).unwrap();
        assert_eq!(
            trace.take_events(),
            [Event::Write {
                offset: 0,
                bytes: vec![2]
            }]
        );
        assert_eq!(trace.position(), 0);
    }

    #[test]
    fn a_write_tears_at_multiples_of_the_unit() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1200).collect();
        let write = Event::Write { offset: 500, bytes };
        let pieces = write.torn(512);
        let places: Vec<(u64, usize)> = pieces
            .iter()
            .map(|piece| match piece {
                Event::Write { offset, bytes } => (*offset, bytes.len()),
                other => panic!("not a write: {other:?}"),
            })
            .collect();
        assert_eq!(places, [(500, 12), (512, 512), (1024, 512), (1536, 164)]);
        let (whole, torn) = (Memory::new(), Memory::new());
        write.apply(&whole).unwrap();
        replay(pieces.iter().rev(), &torn).unwrap();
        assert_eq!(whole.to_vec().unwrap(), torn.to_vec().unwrap());
        assert_eq!(Event::Flush.torn(512), [Event::Flush]);
    }
}
