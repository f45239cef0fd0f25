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

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn alone_every_call_is_a_run_with_its_own_result() {
        let commit = GroupCommit::default();
        let mut runs = 0;
        for number in 0..5 {
            let work = || {
                runs += 1;
                if number == 3 { Err("third") } else { Ok(()) }
            };
            let expected = if number == 3 { Err("third") } else { Ok(()) };
            assert_eq!(commit.run(work, |error| *error), expected);
        }
        assert_eq!(runs, 5);
    }

    /// Callers that come while a run is under way; gives how often there was another, and what each got.
    fn who_come_later(
        first: Result<(), u32>,
        later: Result<(), u32>,
    ) -> (usize, Vec<Result<(), u32>>) {
        let commit = GroupCommit::default();
        let runs = Mutex::new(0);
        let (started, has_started) = channel();
        let (proceed, may_proceed) = channel();
        let results = thread::scope(|scope| {
            let one = scope.spawn(|| {
                let work = move || {
                    started.send(()).unwrap();
                    may_proceed.recv().unwrap();
                    first
                };
                commit.run(work, |error| *error)
            });
            has_started.recv().unwrap();
            let call = || {
                let work = || {
                    *lock(&runs) += 1;
                    later
                };
                commit.run(work, |error| *error)
            };
            let others: Vec<_> = (0..4).map(|_| scope.spawn(call)).collect();
            while lock(&commit.state).waiting < 4 {
                thread::yield_now();
            }
            proceed.send(()).unwrap();
            assert_eq!(one.join().unwrap(), first);
            others
                .into_iter()
                .map(|other| other.join().unwrap())
                .collect()
        });
        assert!(lock(&commit.state).failed.is_empty());
        let runs = *lock(&runs);
        (runs, results)
    }

    #[test]
    fn all_who_come_during_a_run_share_the_next() {
        assert_eq!(who_come_later(Ok(()), Ok(())), (1, vec![Ok(()); 4]));
    }

    #[test]
    fn an_error_is_for_those_whose_run_it_was() {
        assert_eq!(who_come_later(Err(1), Ok(())), (1, vec![Ok(()); 4]));
        assert_eq!(who_come_later(Ok(()), Err(2)), (1, vec![Err(2); 4]));
    }

    #[test]
    fn after_a_panic_the_next_caller_runs() {
        let commit: GroupCommit<u32> = GroupCommit::default();
        let call = || commit.run(|| resume_unwind(Box::new("on purpose")), |error| *error);
        assert!(catch_unwind(AssertUnwindSafe(call)).is_err());
        assert_eq!(commit.run(|| Err(5), |error| *error), Err(5));
        assert_eq!(commit.run(|| Ok(()), |error| *error), Ok(()));
    }
}
