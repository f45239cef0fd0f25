//! Pieces that are stored in order, as compressed ones mostly are.
//!
//! A thread takes a parcel, then the next piece of work, fills the parcel and hands it in. If it is its turn, the thread
//! stores it, and all that follow and are there already. So nobody waits for a turn; one waits only for an empty parcel, and then
//! another thread, which has one, holds everyone up.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

use super::pack::Parcel;
use super::run::{Run, Watch, lock};

/// Parcels for each thread: one that it fills, and one that waits for its turn.
const PARCELS: usize = 2;

/// The threads that store in order, and the parcels between them.
pub(super) struct Order<'r, 'a> {
    run: &'r Run<'a>,
    state: Mutex<State>,
    /// A parcel is empty, or all are to stop.
    returned: Condvar,
}

#[derive(Default)]
struct State {
    empty: Vec<Parcel>,
    /// Handed in before their turn, by ticket.
    waiting: BTreeMap<u64, Parcel>,
    /// Whose turn it is.
    turn: u64,
    /// A thread is storing, and will look for more.
    is_storing: bool,
}

impl State {
    /// The parcel whose turn it is, if it is there.
    fn take_next(&mut self) -> Option<Parcel> {
        self.waiting.remove(&self.turn)
    }
}

impl<'r, 'a> Order<'r, 'a> {
    pub(super) fn new(run: &'r Run<'a>, threads: usize) -> Self {
        let parcels = if threads == 1 { 1 } else { threads * PARCELS };
        Self {
            run,
            state: Mutex::new(State {
                empty: (0..parcels).map(|_| Parcel::default()).collect(),
                ..State::default()
            }),
            returned: Condvar::new(),
        }
    }

    /// Works until nothing is left.
    pub(super) fn work(&self) {
        let _leaving = Leaving(self);
        let _watch = Watch(self.run);
        while let Some(mut parcel) = self.empty_parcel() {
            let Some(job) = self.run.next() else {
                // Others that wait must learn that nothing is left, too.
                return lock(&self.state).empty.push(parcel);
            };
            if let Err(error) = parcel.fill(self.run, job) {
                return self.run.fail(error);
            }
            self.hand_in(parcel);
        }
    }

    /// Waits for an empty parcel. `None` when all are to stop.
    fn empty_parcel(&self) -> Option<Parcel> {
        let mut state = lock(&self.state);
        loop {
            if self.run.is_stopped() {
                return None;
            }
            if let Some(parcel) = state.empty.pop() {
                return Some(parcel);
            }
            let waited = self.returned.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stores what has its turn.
    fn hand_in(&self, parcel: Parcel) {
        let mut state = lock(&self.state);
        state.waiting.insert(parcel.ticket(), parcel);
        if state.is_storing {
            return;
        }
        state.is_storing = true;
        while let Some(mut parcel) = state.take_next() {
            drop(state);
            if self.run.is_stopped() {
                return;
            }
            if let Err(error) = parcel.store(self.run) {
                return self.run.fail(error);
            }
            self.run.note_done(parcel.job());
            state = lock(&self.state);
            state.turn += 1;
            state.empty.push(parcel);
            self.returned.notify_one();
        }
        state.is_storing = false;
    }
}

/// Wakes the others, who may have to leave, too.
struct Leaving<'o, 'r, 'a>(&'o Order<'r, 'a>);

impl Drop for Leaving<'_, '_, '_> {
    fn drop(&mut self) {
        // Whoever is about to wait has looked before, with the lock.
        drop(lock(&self.0.state));
        self.0.returned.notify_all();
    }
}
