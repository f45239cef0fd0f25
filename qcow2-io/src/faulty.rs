//! Errors by script.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::selection::{Selection, place};
use crate::storage::total_len;
use crate::{
    Extent, Limits, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags,
};

/// One rule of a [`Faulty`] storage: which requests fail, and how.
///
/// Starts as "the next request of this operation fails with an I/O error, before it did anything"; the methods narrow or
/// change that.
#[derive(Clone, Debug)]
pub struct Fault {
    selection: Selection,
    /// Failures left; `None` for no end.
    left: Option<u64>,
    kind: StorageErrorKind,
    after_effect: bool,
}

impl Fault {
    /// Lets the next `operation` fail.
    pub fn on(operation: Operation) -> Self {
        Self {
            selection: Selection::of(operation),
            left: Some(1),
            kind: StorageErrorKind::Io,
            after_effect: false,
        }
    }

    /// Only requests that touch a byte of `range`. Operations without a place ([`Flush`](Operation::Flush),
    /// [`Len`](Operation::Len), [`SetLen`](Operation::SetLen)) then never match.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.selection.within(range);
        self
    }

    /// Only the `nth` matching request, counted from 1, and those after it as far as [`times`](Self::times) allows.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        self.selection.nth(nth);
        self
    }

    /// `times` failures instead of one.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.left = Some(times);
        self
    }

    /// Failures without end.
    #[must_use]
    pub fn forever(mut self) -> Self {
        self.left = None;
        self
    }

    /// The kind of the error.
    #[must_use]
    pub fn kind(mut self, kind: StorageErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The request is carried out and reported as failed nevertheless, as when an answer is lost.
    #[must_use]
    pub fn after_effect(mut self) -> Self {
        self.after_effect = true;
        self
    }

    /// Whether this request, which is meant, is to fail; counts it.
    fn strikes(&mut self) -> bool {
        match &mut self.left {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left = left.saturating_sub(1);
                true
            }
        }
    }
}

/// A storage whose requests fail by script, and that counts them.
///
/// Put it into an `Arc` to add faults while something else uses it. Batches go through it one operation at a time, so
/// that each is counted.
#[derive(Debug)]
pub struct Faulty<S> {
    storage: S,
    script: Mutex<Script>,
}

#[derive(Debug, Default)]
struct Script {
    faults: Vec<Fault>,
    counts: BTreeMap<Operation, u64>,
    struck: u64,
}

impl<S: Storage> Faulty<S> {
    /// Wraps a storage, without faults yet.
    pub fn new(storage: S) -> Self {
        Self {
            storage,
            script: Mutex::default(),
        }
    }

    /// Adds a rule. Of several that match, the first added decides; each counts the requests that it saw.
    pub fn add(&self, fault: Fault) {
        self.script().faults.push(fault);
    }

    /// Drops all rules.
    pub fn clear(&self) {
        self.script().faults.clear();
    }

    /// How many requests of `operation` came so far, failed ones included.
    pub fn count(&self, operation: Operation) -> u64 {
        self.script().counts.get(&operation).copied().unwrap_or(0)
    }

    /// How many requests were made to fail so far: a test's proof that it hit its case.
    pub fn struck(&self) -> u64 {
        self.script().struck
    }

    /// The storage below, past all faults.
    pub fn get_ref(&self) -> &S {
        &self.storage
    }

    /// Gives the storage below back.
    pub fn into_inner(self) -> S {
        self.storage
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(
        &self,
        operation: Operation,
        place: Option<Range<u64>>,
        action: impl FnOnce(&S) -> Result<T>,
    ) -> Result<T> {
        match self.script().decide(operation, place.as_ref()) {
            None => action(&self.storage),
            Some(fault) => {
                if fault.after_effect {
                    action(&self.storage)?;
                }
                let error = StorageError::new(operation, fault.kind).with_detail("fault by script");
                Err(match place {
                    Some(place) => error.at(place.start, place.end.saturating_sub(place.start)),
                    None => error,
                })
            }
        }
    }
}

impl Script {
    fn decide(&mut self, operation: Operation, place: Option<&Range<u64>>) -> Option<Fault> {
        let count = self.counts.entry(operation).or_default();
        *count = count.saturating_add(1);
        for fault in &mut self.faults {
            if fault.selection.picks(operation, place) && fault.strikes() {
                self.struck = self.struck.saturating_add(1);
                return Some(fault.clone());
            }
        }
        None
    }
}

impl<S: Storage> Storage for Faulty<S> {
    fn len(&self) -> Result<u64> {
        self.run(Operation::Len, None, Storage::len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.run(
            Operation::Read,
            Some(place(offset, total_len(bufs))),
            |storage| storage.read_vectored_at(bufs, offset),
        )
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.run(
            Operation::Write,
            Some(place(offset, total_len(bufs))),
            |storage| storage.write_vectored_at(bufs, offset),
        )
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.run(Operation::WriteZeroes, Some(range.clone()), |storage| {
            storage.write_zeroes(range, flags)
        })
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.run(Operation::Discard, Some(range.clone()), |storage| {
            storage.discard(range)
        })
    }

    fn flush(&self) -> Result<()> {
        self.run(Operation::Flush, None, Storage::flush)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.run(Operation::SetLen, None, |storage| storage.set_len(len))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.run(Operation::Extents, Some(range.clone()), |storage| {
            storage.extents(range, max)
        })
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.storage.allocated()
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, Op};

    fn faulty() -> Faulty<Memory> {
        Faulty::new(Memory::from(vec![1; 100]))
    }

    #[test]
    fn the_nth_request_fails_once_and_changes_nothing() {
        let faulty = faulty();
        faulty.add(
            Fault::on(Operation::Write)
                .nth(2)
                .kind(StorageErrorKind::NoSpace),
        );
        faulty.write_at(&[2], 0).unwrap();
        let error = faulty.write_at(&[3], 5).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::NoSpace);
        assert_eq!((error.offset(), error.len_bytes()), (Some(5), Some(1)));
        assert_eq!(faulty.get_ref().to_vec().unwrap()[5], 1);
        faulty.write_at(&[4], 5).unwrap();
        assert_eq!(faulty.count(Operation::Write), 3);
        assert_eq!(faulty.struck(), 1);
    }

    #[test]
    fn a_range_selects_requests_that_touch_it() {
        let faulty = faulty();
        faulty.add(Fault::on(Operation::Read).within(10..20).forever());
        let mut buf = [0; 5];
        faulty.read_at(&mut buf, 5).unwrap();
        faulty.read_at(&mut buf, 6).unwrap_err();
        faulty.read_at(&mut buf, 19).unwrap_err();
        faulty.read_at(&mut buf, 20).unwrap();
        faulty.write_at(&buf, 10).unwrap();
        assert_eq!(faulty.struck(), 2);
        faulty.clear();
        faulty.read_at(&mut buf, 19).unwrap();
    }

    #[test]
    fn failures_end_after_their_number() {
        let faulty = faulty();
        faulty.add(Fault::on(Operation::Flush).times(2));
        assert!(faulty.flush().is_err());
        assert!(faulty.flush().is_err());
        faulty.flush().unwrap();
        assert_eq!(faulty.count(Operation::Flush), 3);
    }

    #[test]
    fn an_after_effect_fault_has_written() {
        let faulty = faulty();
        faulty.add(Fault::on(Operation::Write).after_effect());
        faulty.write_at(&[9], 3).unwrap_err();
        assert_eq!(faulty.into_inner().to_vec().unwrap()[3], 9);
    }

    #[test]
    fn a_batch_fails_only_where_the_script_says() {
        let faulty = faulty();
        faulty.add(Fault::on(Operation::Write).within(50..60));
        let mut ops = [
            Op::write(&[5; 4], 0),
            Op::write(&[5; 4], 50),
            Op::write(&[5; 4], 60),
        ];
        faulty.submit(&mut ops);
        let failed: Vec<bool> = ops.iter().map(|op| op.result().unwrap().is_err()).collect();
        assert_eq!(failed, [false, true, false]);
    }

    #[test]
    fn every_operation_can_fail() {
        let faulty = faulty();
        for operation in [
            Operation::Len,
            Operation::Read,
            Operation::Write,
            Operation::WriteZeroes,
            Operation::Discard,
            Operation::Flush,
            Operation::SetLen,
            Operation::Extents,
        ] {
            faulty.add(Fault::on(operation));
        }
        assert!(faulty.len().is_err());
        assert!(faulty.read_at(&mut [0], 0).is_err());
        assert!(faulty.write_at(&[0], 0).is_err());
        assert!(faulty.write_zeroes(0..1, ZeroFlags::NONE).is_err());
        assert!(faulty.discard(0..1).is_err());
        assert!(faulty.flush().is_err());
        assert!(faulty.set_len(5).is_err());
        assert!(faulty.extents(0..1, 1).is_err());
        assert_eq!(faulty.struck(), 8);
    }
}
