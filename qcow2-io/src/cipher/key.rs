use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use zeroize::Zeroizing;

use super::hash::with_digest;
use super::{CipherError, Hash};

/// Iterations below which [`calibrate`] never goes.
pub const MIN_ITERATIONS: u32 = 1000;

/// Long enough for a thread's clock to mean something, and short enough to wait for.
const MEASURED: Duration = Duration::from_millis(50);

/// Fills `out` by PBKDF2 with HMAC. Zero iterations count as one.
///
/// The time it takes grows with `iterations` and the length of `out`; whoever has them from an image decides before how much
/// work is too much.
pub fn derive_key(hash: Hash, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
    with_digest!(hash, D => pbkdf2::pbkdf2_hmac::<D>(passphrase, salt, iterations, out));
}

/// How many iterations of [`derive_key`] for a key of `key_len` bytes take about `target` of this thread's CPU time here; at
/// least [`MIN_ITERATIONS`]. Itself takes a tenth of a second or so.
pub fn calibrate(hash: Hash, key_len: usize, target: Duration) -> u32 {
    let mut key = Zeroizing::new(vec![0; key_len]);
    let mut iterations = MIN_ITERATIONS;
    loop {
        let start = thread_time();
        derive_key(hash, b"passphrase", &[0x5a; 32], iterations, &mut key);
        let spent = thread_time().saturating_sub(start);
        if spent >= MEASURED || iterations == u32::MAX {
            return scale(iterations, spent, target);
        }
        iterations = iterations.saturating_mul(2);
    }
}

/// CPU time of this thread: what others do at the same time must not make a key weaker.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

pub(super) fn scale(iterations: u32, spent: Duration, target: Duration) -> u32 {
    let scaled = u128::from(iterations).saturating_mul(target.as_nanos()) / spent.as_nanos().max(1);
    u32::try_from(scaled)
        .unwrap_or(u32::MAX)
        .max(MIN_ITERATIONS)
}

/// Fills `out` with random bytes fit for keys, from the system.
///
/// # Errors
///
/// [`NoRandomness`](CipherError::NoRandomness) when it has none to give.
pub fn random(out: &mut [u8]) -> Result<(), CipherError> {
    getrandom::fill(out).map_err(|error| CipherError::NoRandomness {
        reason: error.to_string(),
    })
}
