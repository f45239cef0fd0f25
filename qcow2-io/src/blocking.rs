//! Requests that wait where a test wants them to.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::selection::{Selection, place};
use crate::storage::total_len;
use crate::{Extent, Limits, Operation, Result, Storage, ZeroFlags};

/// Which request of a [`Blocking`] storage is to stop, and where.
///
/// Starts as "the next request of this operation, before it does anything"; the methods narrow or change that.
#[derive(Clone, Debug)]
pub struct Pause {
    selection: Selection,
    after_effect: bool,
}

impl Pause {
    /// Stops the next `operation`.
    pub fn on(operation: Operation) -> Self {
        Self {
            selection: Selection::of(operation),
            after_effect: false,
        }
    }

    /// Only a request that touches a byte of `range`. Operations without a place ([`Flush`](Operation::Flush),
    /// [`Len`](Operation::Len), [`SetLen`](Operation::SetLen)) then never match.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.selection.within(range);
        self
    }

    /// Only the `nth` matching request, counted from 1.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        self.selection.nth(nth);
        self
    }

    /// The request is carried out first and stops before it returns.
    #[must_use]
    pub fn after_effect(mut self) -> Self {
        self.after_effect = true;
        self
    }
}

/// A storage whose requests stop at chosen points until they are released, so that a test decides who comes first.
///
/// Each pause stops one request; all others pass, also while one is stopped. Batches go through one operation at a time.
/// Put it into an `Arc` to arm pauses while something else uses it.
///
/// ```
/// use qcow2_io::{Blocking, Memory, Operation, Pause, Storage};
///
/// let storage = Blocking::new(Memory::from(vec![1; 100]));
/// std::thread::scope(|scope| {
///     let pause = storage.arm(Pause::on(Operation::Write).within(10..20));
///     let writer = scope.spawn(|| storage.write_at(&[2; 5], 12));
///     pause.wait_until_stopped();
///     let mut buf = [0; 5];
///     storage.read_at(&mut buf, 12)?; // comes before the write, for sure
///     assert_eq!(buf, [1; 5]);
///     pause.release();
///     writer.join().expect("it doesn't panic")
/// })?;
/// # Ok::<(), qcow2_io::StorageError>(())
/// ```
#[derive(Debug)]
pub struct Blocking<S> {
    storage: S,
    gate: Arc<Gate>,
}

/// An armed pause. Dropping it releases the request, so that a test that fails doesn't wait for its own threads: make it
/// inside the scope that joins them.
#[derive(Debug)]
#[must_use = "a dropped pause stops nobody"]
pub struct PauseHandle {
    gate: Arc<Gate>,
    id: u64,
}

/// Where the requests wait, and those who wait for them.
#[derive(Debug, Default)]
struct Gate {
    points: Mutex<Points>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Points {
    next_id: u64,
    /// Those that have not been released.
    list: Vec<Point>,
}

#[derive(Debug)]
struct Point {
    id: u64,
    pause: Pause,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No request has come yet.
    Armed,
    /// A request has come, and does its work before it stops.
    Claimed,
    /// The request waits.
    Stopped,
}

/// A request that is to stop.
struct Claim {
    id: u64,
    after_effect: bool,
}

impl<S: Storage> Blocking<S> {
    /// Wraps a storage; nothing is armed yet.
    pub fn new(storage: S) -> Self {
        Self {
            storage,
            gate: Arc::default(),
        }
    }

    /// Arms a pause. Of several that match a request, the first armed takes it; each counts the requests that it saw.
    pub fn arm(&self, pause: Pause) -> PauseHandle {
        let mut points = self.gate.points();
        let id = points.next_id;
        points.next_id = id.wrapping_add(1);
        points.list.push(Point {
            id,
            pause,
            phase: Phase::Armed,
        });
        PauseHandle {
            gate: Arc::clone(&self.gate),
            id,
        }
    }

    /// The storage below, past all pauses.
    pub fn get_ref(&self) -> &S {
        &self.storage
    }

    /// Gives the storage below back.
    pub fn into_inner(self) -> S {
        self.storage
    }

    fn run<T>(
        &self,
        operation: Operation,
        place: Option<&Range<u64>>,
        action: impl FnOnce(&S) -> Result<T>,
    ) -> Result<T> {
        match self.gate.claim(operation, place) {
            None => action(&self.storage),
            Some(claim) if claim.after_effect => {
                let result = action(&self.storage);
                self.gate.stop(claim.id);
                result
            }
            Some(claim) => {
                self.gate.stop(claim.id);
                action(&self.storage)
            }
        }
    }
}

impl PauseHandle {
    /// Waits until a request is stopped here, as long as that takes.
    pub fn wait_until_stopped(&self) {
        let points = self.gate.points();
        let stopped = |points: &mut Points| points.phase(self.id) == Some(Phase::Stopped);
        drop(self.gate.wait(points, stopped));
    }

    /// Whether a request is stopped here now.
    pub fn is_stopped(&self) -> bool {
        self.gate.points().phase(self.id) == Some(Phase::Stopped)
    }

    /// Lets the request go on; if none has come yet, none will be stopped.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for PauseHandle {
    fn drop(&mut self) {
        self.gate.points().list.retain(|point| point.id != self.id);
        self.gate.changed.notify_all();
    }
}

impl Gate {
    // Each change of the list is one step, so a panic elsewhere leaves it whole.
    fn points(&self) -> MutexGuard<'_, Points> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        points: MutexGuard<'a, Points>,
        until: impl Fn(&mut Points) -> bool,
    ) -> MutexGuard<'a, Points> {
        self.changed
            .wait_while(points, |points| !until(points))
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The pause that means this request, if there is one.
    fn claim(&self, operation: Operation, place: Option<&Range<u64>>) -> Option<Claim> {
        let mut points = self.points();
        for point in &mut points.list {
            if point.phase == Phase::Armed && point.pause.selection.picks(operation, place) {
                point.phase = Phase::Claimed;
                return Some(Claim {
                    id: point.id,
                    after_effect: point.pause.after_effect,
                });
            }
        }
        None
    }

    /// Waits until the pause is released, which may have happened already.
    fn stop(&self, id: u64) {
        let mut points = self.points();
        if let Some(point) = points.list.iter_mut().find(|point| point.id == id) {
            point.phase = Phase::Stopped;
            self.changed.notify_all();
        }
        drop(self.wait(points, |points| points.phase(id).is_none()));
    }
}

impl Points {
    /// How far a pause is; `None` once it was released.
    fn phase(&self, id: u64) -> Option<Phase> {
        let point = self.list.iter().find(|point| point.id == id)?;
        Some(point.phase)
    }
}

impl<S: Storage> Storage for Blocking<S> {
    fn len(&self) -> Result<u64> {
        self.run(Operation::Len, None, Storage::len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let place = place(offset, total_len(bufs));
        self.run(Operation::Read, Some(&place), |storage| {
            storage.read_vectored_at(bufs, offset)
        })
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let place = place(offset, total_len(bufs));
        self.run(Operation::Write, Some(&place), |storage| {
            storage.write_vectored_at(bufs, offset)
        })
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let place = range.clone();
        self.run(Operation::WriteZeroes, Some(&place), |storage| {
            storage.write_zeroes(range, flags)
        })
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let place = range.clone();
        self.run(Operation::Discard, Some(&place), |storage| {
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
        let place = range.clone();
        self.run(Operation::Extents, Some(&place), |storage| {
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
    use std::thread;

    use super::*;
    use crate::{Memory, Op};

    fn blocking() -> Blocking<Memory> {
        Blocking::new(Memory::from(vec![1; 100]))
    }

    fn byte(storage: &impl Storage, offset: u64) -> u8 {
        let mut byte = [0];
        storage.read_at(&mut byte, offset).unwrap();
        byte[0]
    }

    #[test]
    fn a_request_stops_before_its_effect_and_others_pass() {
        let storage = blocking();
        thread::scope(|scope| {
            let pause = storage.arm(Pause::on(Operation::Write).within(10..20));
            assert!(!pause.is_stopped());
            storage.write_at(&[2], 20).unwrap();
            let writer = scope.spawn(|| storage.write_at(&[3; 20], 5));
            pause.wait_until_stopped();
            assert!(pause.is_stopped());
            assert_eq!(byte(&storage, 12), 1);
            // One request only: this one touches the range, too.
            storage.write_at(&[4], 12).unwrap();
            assert_eq!(byte(&storage, 12), 4);
            pause.release();
            writer.join().unwrap().unwrap();
            assert_eq!(byte(&storage, 12), 3);
        });
    }

    #[test]
    fn a_request_stops_after_its_effect() {
        let storage = blocking();
        thread::scope(|scope| {
            let pause = storage.arm(Pause::on(Operation::Discard).after_effect());
            let other = scope.spawn(|| storage.discard(0..50));
            pause.wait_until_stopped();
            assert_eq!(byte(&storage, 0), 0);
            assert!(!other.is_finished());
            pause.release();
            other.join().unwrap().unwrap();
        });
    }

    #[test]
    fn two_requests_are_released_in_the_order_of_choice() {
        let storage = blocking();
        thread::scope(|scope| {
            let first = storage.arm(Pause::on(Operation::Write));
            let second = storage.arm(Pause::on(Operation::Write));
            let one = scope.spawn(|| storage.write_at(&[5], 0));
            first.wait_until_stopped();
            let two = scope.spawn(|| storage.write_at(&[6], 0));
            second.wait_until_stopped();
            second.release();
            two.join().unwrap().unwrap();
            assert_eq!(byte(&storage, 0), 6);
            first.release();
            one.join().unwrap().unwrap();
            assert_eq!(byte(&storage, 0), 5);
        });
    }

    #[test]
    fn the_nth_request_stops_also_in_a_batch() {
        let storage = blocking();
        thread::scope(|scope| {
            let pause = storage.arm(Pause::on(Operation::Write).nth(2));
            scope.spawn(|| {
                storage.submit(&mut [Op::write(&[7], 0), Op::write(&[7], 1), Op::write(&[7], 2)]);
            });
            pause.wait_until_stopped();
            assert_eq!(storage.get_ref().to_vec().unwrap()[..3], [7, 1, 1]);
        });
        assert_eq!(storage.into_inner().to_vec().unwrap()[..3], [7, 7, 7]);
    }

    #[test]
    fn a_pause_released_in_advance_stops_nobody() {
        let storage = blocking();
        storage.arm(Pause::on(Operation::Flush)).release();
        storage.flush().unwrap();
    }

    #[test]
    fn every_operation_can_stop() {
        type Action = fn(&Blocking<Memory>);
        let storage = blocking();
        let actions: [(Operation, Action); 8] = [
            (Operation::Len, |s| drop(s.len())),
            (Operation::Read, |s| s.read_at(&mut [0], 0).unwrap()),
            (Operation::Write, |s| s.write_at(&[0], 0).unwrap()),
            (Operation::WriteZeroes, |s| {
                s.write_zeroes(0..1, ZeroFlags::NONE).unwrap();
            }),
            (Operation::Discard, |s| s.discard(0..1).unwrap()),
            (Operation::Flush, |s| s.flush().unwrap()),
            (Operation::SetLen, |s| s.set_len(5).unwrap()),
            (Operation::Extents, |s| drop(s.extents(0..1, 1))),
        ];
        for (operation, action) in actions {
            thread::scope(|scope| {
                let pause = storage.arm(Pause::on(operation));
                let request = scope.spawn(|| action(&storage));
                pause.wait_until_stopped();
                pause.release();
                request.join().unwrap();
            });
        }
    }
}
