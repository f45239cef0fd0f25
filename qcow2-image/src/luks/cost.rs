use std::time::Duration;

use qcow2_io::cipher::{Hash, MIN_ITERATIONS, calibrate};

use super::LuksError;

/// How much work a passphrase shall be to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyCost {
    /// As many iterations as take this long on this machine, and at least 1000.
    Time(Duration),
    /// This many iterations; fewer than 1000 count as 1000.
    Iterations(u32),
}

impl Default for KeyCost {
    /// Two seconds, as with `qemu-img`.
    fn default() -> Self {
        Self::Time(Duration::from_secs(2))
    }
}

impl KeyCost {
    /// Iterations to derive `key_len` bytes.
    pub(super) fn iterations(self, hash: Hash, key_len: usize) -> Result<u32, LuksError> {
        match self {
            Self::Iterations(iterations) => Ok(iterations.max(MIN_ITERATIONS)),
            Self::Time(time) => match calibrate(hash, key_len, time) {
                u32::MAX => Err(LuksError::TooMuchTime { time }),
                iterations => Ok(iterations),
            },
        }
    }
}

/// How much work a header may ask of whoever tries a passphrase on it.
///
/// Counted are the rounds of PBKDF2: iterations times blocks of the hash, of all active slots together and of the digest that
/// tells whether a slot gave the right key. A machine does a few million rounds a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkLimit(u64);

impl WorkLimit {
    /// No limit: an image may keep a thread busy for days. For images from a trusted source only.
    pub const NONE: Self = Self(u64::MAX);

    /// At most this many rounds.
    pub const fn rounds(rounds: u64) -> Self {
        Self(rounds)
    }

    pub(super) fn check(self, needed: u64) -> Result<(), LuksError> {
        if needed > self.0 {
            return Err(LuksError::TooMuchWork {
                needed,
                limit: self.0,
            });
        }
        Ok(())
    }
}

impl Default for WorkLimit {
    /// 100 million rounds: about half a minute, and enough for eight slots that took the fastest machines two seconds each.
    fn default() -> Self {
        Self(100_000_000)
    }
}
