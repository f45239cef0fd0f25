//! Group commit: who asks for a flush shares the next one with all who ask meanwhile.

use std::ops::RangeInclusive;

use crate::sync::{Condvar, Mutex, lock, wait};

/// Runs a piece of work such that each caller gets one run that began after it asked.
#[derive(Debug)]
pub struct GroupCommit<E> {
    state: Mutex<State<E>>,
    finished: Condvar,
}

#[derive(Debug)]
struct State<E> {
    /// Runs begun so far; the last one may be under way.
    begun: u64,
    /// The last run that came to its end; those between it and the last one begun have panicked.
    finished: u64,
    running: bool,
    failed: Vec<Failed<E>>,
    /// Those who wait for a run to come.
    waiting: usize,
    /// Those among them whom the run under way is for.
    sharing: usize,
}

/// The error of a run, for those who wait for it.
#[derive(Debug)]
struct Failed<E> {
    runs: RangeInclusive<u64>,
    error: E,
    /// How many have yet to hear of it.
    left: usize,
}

impl<E> Default for GroupCommit<E> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                begun: 0,
                finished: 0,
                running: false,
                failed: Vec::new(),
                waiting: 0,
                sharing: 0,
            }),
            finished: Condvar::new(),
        }
    }
}

impl<E> GroupCommit<E> {
    /// Runs `work`, or waits for a run of another caller that begins after this call.
    ///
    /// # Errors
    ///
    /// That of the run; the others that share it get it from `share`.
    pub fn run(
        &self,
        work: impl FnOnce() -> Result<(), E>,
        share: impl Fn(&E) -> E,
    ) -> Result<(), E> {
        let mut state = lock(&self.state);
        let mine = state.begun + 1;
        if state.running {
            state.waiting += 1;
            loop {
                state = wait(&self.finished, state);
                if state.finished >= mine {
                    return state.outcome_of(mine, share);
                }
                if !state.running {
                    state.waiting -= 1;
                    break;
                }
            }
        }
        state.begun += 1;
        state.running = true;
        state.sharing = std::mem::take(&mut state.waiting);
        drop(state);
        // A panic in `work` must not leave the others waiting.
        let mut run = Run {
            commit: self,
            error: None,
            completed: false,
        };
        let result = work();
        run.completed = true;
        if let Err(error) = &result {
            run.error = Some(share(error));
        }
        drop(run);
        result
    }
}

impl<E> State<E> {
    fn outcome_of(&mut self, run: u64, share: impl Fn(&E) -> E) -> Result<(), E> {
        let found = self
            .failed
            .iter()
            .position(|failed| failed.runs.contains(&run));
        let Some((index, failed)) =
            found.and_then(|index| Some((index, self.failed.get_mut(index)?)))
        else {
            return Ok(());
        };
        failed.left -= 1;
        if failed.left == 0 {
            return Err(self.failed.swap_remove(index).error);
        }
        Err(share(&failed.error))
    }
}

struct Run<'a, E> {
    commit: &'a GroupCommit<E>,
    error: Option<E>,
    completed: bool,
}

impl<E> Drop for Run<'_, E> {
    fn drop(&mut self) {
        let mut state = lock(&self.commit.state);
        state.running = false;
        let sharing = std::mem::take(&mut state.sharing);
        if self.completed {
            // Also for those whose own run panicked: this one began after they asked.
            let runs = state.finished + 1..=state.begun;
            state.finished = state.begun;
            if let Some(error) = self.error.take()
                && sharing > 0
            {
                state.failed.push(Failed {
                    runs,
                    error,
                    left: sharing,
                });
            }
        } else {
            // One of those who wait does it again.
            state.waiting += sharing;
        }
        drop(state);
        self.commit.finished.notify_all();
    }
}
