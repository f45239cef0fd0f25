//! Up to where a copy is done for good.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::run::lock;

/// What a copy that was interrupted can be taken up from: all before it is in the target, durably.
///
/// It can be written down as text and read again. It is of use as long as the source and the target are as they were left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checkpoint {
    /// Bytes of the source that need not be copied again.
    pub(super) offset: u64,
    /// Length of the source in bytes.
    pub(super) len: u64,
    /// The target had nothing but zeros when the copy began, so zeros behind the offset need no writing now either.
    pub(super) was_zero: bool,
}

impl Checkpoint {
    /// How far the copy came; bytes of the source.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.was_zero { "zero" } else { "any" };
        write!(f, "{}/{}/{kind}", self.offset, self.len)
    }
}

/// A text that is no [`Checkpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a checkpoint is OFFSET/LENGTH/zero or OFFSET/LENGTH/any")]
pub struct NoCheckpoint;

impl FromStr for Checkpoint {
    type Err = NoCheckpoint;

    fn from_str(text: &str) -> Result<Self, NoCheckpoint> {
        let mut parts = text.split('/');
        let mut number = || parts.next()?.parse().ok();
        let (offset, len) = number().zip(number()).ok_or(NoCheckpoint)?;
        let was_zero = match (parts.next(), parts.next()) {
            (Some("zero"), None) => true,
            (Some("any"), None) => false,
            _ => return Err(NoCheckpoint),
        };
        Ok(Self {
            offset,
            len,
            was_zero,
        })
    }
}

/// Which pieces are under way, and so up to where everything is written.
#[derive(Debug)]
pub(super) struct Marks {
    /// Bytes between two checkpoints; 0 for none.
    every: u64,
    under_way: Mutex<UnderWay>,
    /// The last checkpoint.
    last: AtomicU64,
    /// Held by the thread that makes one.
    making: Mutex<()>,
}

#[derive(Debug)]
struct UnderWay {
    starts: BTreeSet<u64>,
    /// Where the next piece will begin.
    next: u64,
}

impl Marks {
    pub(super) fn new(every: u64, start: u64) -> Self {
        Self {
            every,
            under_way: Mutex::new(UnderWay {
                starts: BTreeSet::new(),
                next: start,
            }),
            last: AtomicU64::new(start),
            making: Mutex::new(()),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.every > 0
    }

    /// A piece is about to be worked on. Told under the lock that gives out pieces.
    pub(super) fn begin(&self, start: u64, end: u64) {
        if self.is_on() {
            let mut under_way = lock(&self.under_way);
            under_way.starts.insert(start);
            under_way.next = end;
        }
    }

    /// A piece is written.
    pub(super) fn end(&self, start: u64) {
        if self.is_on() {
            lock(&self.under_way).starts.remove(&start);
        }
    }

    /// All before this is written.
    pub(super) fn reached(&self) -> u64 {
        let under_way = lock(&self.under_way);
        under_way.starts.first().copied().unwrap_or(under_way.next)
    }

    /// Makes a checkpoint if it is time for one, or if `now` says so: `make` is told up to where all is written.
    pub(super) fn make<E>(
        &self,
        now: bool,
        make: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.is_on() {
            return Ok(());
        }
        let Ok(_making) = self.making.try_lock() else {
            return Ok(());
        };
        let reached = self.reached();
        let since = reached.saturating_sub(self.last.load(Ordering::Relaxed));
        if since >= self.every || (now && since > 0) {
            make(reached)?;
            self.last.store(reached, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_as_it_was_written() {
        for (was_zero, text) in [(true, "4096/1000000/zero"), (false, "4096/1000000/any")] {
            let checkpoint = Checkpoint {
                offset: 4096,
                len: 1_000_000,
                was_zero,
            };
            assert_eq!(checkpoint.to_string(), text);
            assert_eq!(text.parse(), Ok(checkpoint));
        }
        for text in ["", "1", "1/2", "1/2/all", "1/2/any/3", "-1/2/any"] {
            assert_eq!(text.parse::<Checkpoint>(), Err(NoCheckpoint), "{text}");
        }
    }

    #[test]
    fn what_is_under_way_holds_the_mark_back() {
        let marks = Marks::new(10, 0);
        let made = |now| {
            let mut at = None;
            let made: Result<(), ()> = marks.make(now, |reached| {
                at = Some(reached);
                Ok(())
            });
            made.unwrap();
            at
        };
        marks.begin(0, 10);
        marks.begin(10, 30);
        marks.end(10);
        assert_eq!((marks.reached(), made(true)), (0, None));
        marks.begin(30, 35);
        marks.end(0);
        assert_eq!(made(false), Some(30));
        marks.end(30);
        assert_eq!(made(false), None);
        assert_eq!(made(true), Some(35));
        assert_eq!(made(true), None);
    }
}
