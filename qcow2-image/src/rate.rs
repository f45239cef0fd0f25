//! Not faster than was asked for.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A pause lasts no longer, so that the work can be cancelled.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Holds threads up so that all together stay below a rate.
#[derive(Debug)]
pub(crate) struct Rate {
    bytes_per_second: u64,
    /// When the next byte may be taken.
    next: Mutex<Instant>,
}

impl Rate {
    /// `None` for a rate of 0, which means no limit.
    pub(crate) fn new(bytes_per_second: u64) -> Option<Self> {
        (bytes_per_second > 0).then(|| Self {
            bytes_per_second,
            next: Mutex::new(Instant::now()),
        })
    }

    /// Takes so many bytes, once it is time to. `false` if `is_over` said so meanwhile.
    pub(crate) fn take(&self, bytes: u64, is_over: impl Fn() -> bool) -> bool {
        let turn = {
            // Whoever panics ends the work.
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            // What was not used in the past is gone.
            let turn = (*next).max(Instant::now());
            *next = turn.checked_add(self.time_for(bytes)).unwrap_or(turn);
            turn
        };
        loop {
            let left = turn.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            if is_over() {
                return false;
            }
            thread::sleep(left.min(PAUSE_MAX));
        }
    }

    fn time_for(&self, bytes: u64) -> Duration {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn time_is_bytes_by_rate() {
        assert!(Rate::new(0).is_none());
        let rate = Rate::new(1 << 20).unwrap();
        assert_eq!(rate.time_for(1 << 20), Duration::from_secs(1));
        assert_eq!(rate.time_for(1 << 19), Duration::from_millis(500));
        assert_eq!(
            Rate::new(1).unwrap().time_for(u64::MAX),
            Duration::from_nanos(u64::MAX)
        );
    }

    #[test]
    fn the_first_bytes_come_at_once_and_the_next_wait_until_all_is_over() {
        let rate = Rate::new(1).unwrap();
        assert!(rate.take(1 << 40, || false));
        assert!(!rate.take(1, || true));
    }
}
