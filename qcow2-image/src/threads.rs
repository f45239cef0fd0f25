//! Work that several threads share.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Threads for one piece of work, at most.
pub(crate) const MAX: usize = 256;

/// How many threads there should be: one for each processor.
pub(crate) fn available() -> usize {
    thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(MAX)
}

/// Runs `work` on so many threads, the caller's among them, and waits for all.
pub(crate) fn on_threads(threads: usize, work: &(dyn Fn() + Sync)) {
    thread::scope(|scope| {
        for _ in 1..threads {
            let thread = thread::Builder::new().name("qcow2-work".to_owned());
            // With fewer threads it takes longer.
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
}

/// Does something to each of `items`. If they are at least `enough`, all processors take part, in any order; else it goes in order.
///
/// # Errors
///
/// The first error; what nobody has begun then is not done.
pub(crate) fn for_each<T: Sync, E: Send>(
    items: &[T],
    enough: usize,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // Schedules are explored with threads of another kind.
    if items.len() < enough.max(2) || cfg!(shuttle) {
        return items.iter().try_for_each(work);
    }
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    on_threads(available().min(items.len()), &|| {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(item) {
                next.store(items.len(), Ordering::Relaxed);
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_item_is_taken_once_and_the_first_error_ends_it() {
        let items: Vec<u64> = (0..1000).collect();
        for enough in [10, 10_000] {
            let sum = std::sync::atomic::AtomicU64::new(0);
            let done = for_each(&items, enough, |item| {
                sum.fetch_add(*item, Ordering::Relaxed);
                Ok::<(), ()>(())
            });
            assert_eq!((done, sum.into_inner()), (Ok(()), 499_500));
            let seen = AtomicUsize::new(0);
            let done = for_each(&items, enough, |item| {
                seen.fetch_add(1, Ordering::Relaxed);
                if *item < 5 { Ok(()) } else { Err("five") }
            });
            assert_eq!(done, Err("five"));
            assert!(seen.into_inner() < 5 + 2 * MAX);
        }
        assert_eq!(for_each(&[], 0, |_: &u8| Err(())), Ok(()));
    }
}
