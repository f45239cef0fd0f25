//! The contract of [`Storage`] as a program: every backend and every wrapper runs it in its tests.
//!
//! A violated promise panics with a sentence that names it. Storages of fixed length are welcome: what they may refuse is
//! skipped, the rest holds for them too.

/// Compares bytes and names the first that differs, where a dump of both would hide it.
macro_rules! assert_bytes {
    ($found:expr, $expected:expr $(, $($what:tt)+)?) => {{
        let (found, expected): (&[u8], &[u8]) = (&$found, &$expected);
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert_eq!(differs, None $(, $($what)+)?);
        assert_eq!(found.len(), expected.len() $(, $($what)+)?);
    }};
}

mod order;
mod space;
mod transfer;

use crate::{Storage, StorageErrorKind};

/// Where fixed storages must at least reach, and growable ones are made to.
const REACH: u64 = 1 << 20;

/// Runs all checks. Each call of `make` gives a fresh storage that is either empty and growable, or of a fixed length of at
/// least 1 MiB of zeros.
///
/// # Panics
///
/// When the storage breaks its contract.
pub fn run(make: impl Fn() -> Box<dyn Storage>) {
    transfer::starts_as_zeros(&*make());
    transfer::reads_past_the_end_give_zeros(&*make());
    transfer::vectored_requests_equal_plain_ones(&*make());
    transfer::unaligned_writes_leave_their_neighbours(&*make());
    space::writes_past_the_end_grow(&*make());
    space::zeroed_ranges_read_as_zeros(&*make());
    space::zeroing_past_the_end_grows(&*make());
    space::discarded_ranges_read_as_zeros(&*make());
    space::a_cut_storage_grows_back_with_zeros(&*make());
    space::extents_cover_and_tell_the_truth(&*make());
    transfer::empty_requests_change_nothing(&*make());
    transfer::huge_offsets_are_errors(&*make());
    order::disjoint_writers_do_not_disturb_each_other(&*make());
    order::a_batch_equals_a_loop(&*make());
    order::flushing_keeps_everything(&*make());
}

/// Whether the storage can change its length; if so, it is left at length 0.
fn growable(storage: &dyn Storage) -> bool {
    match storage.set_len(0) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(
                error.kind(),
                StorageErrorKind::Unsupported,
                "a fixed length says so"
            );
            assert!(
                storage.len().expect("len") >= REACH,
                "a fixed storage holds 1 MiB"
            );
            false
        }
    }
}

/// Makes the storage at least [`REACH`] long.
fn reach(storage: &dyn Storage) {
    if growable(storage) {
        storage.set_len(REACH).expect("a growable storage grows");
    }
}

fn bytes(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    storage.read_at(&mut buf, offset).expect("a read succeeds");
    buf
}

fn assert_zeros(storage: &dyn Storage, offset: u64, len: usize, what: &str) {
    let found = bytes(storage, offset, len);
    let stray = found.iter().position(|byte| *byte != 0);
    assert_eq!(
        stray, None,
        "{what}: {len} bytes at {offset:#x} read as zeros"
    );
}

/// Bytes that are never zero and differ with their place.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..)
        .take(len)
        .map(|position| {
            u8::try_from(position.wrapping_mul(0x9e37_79b9) >> 7 & 0xff).map_or(1, |byte| byte | 1)
        })
        .collect()
}
