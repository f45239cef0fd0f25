//! Reads that miss the L2 cache.

use std::path::Path;

use anyhow::Result;
use qcow2_image::create::{CreateOptions, Preallocation};

use super::Setting;
use super::clock::{Clock, Stopwatch};
use super::disk::{self, Disk};
use super::qemu::{Bench, DEPTH};
use super::samples::{Samples, in_turn};
use super::work::Buffer;

/// Bytes of the disk. Its L2 tables have 128 MiB, four times as many as the caches of both sides.
const LEN: u64 = 1 << 40;
/// What one of our L2 slices of 4 KiB maps, in bytes.
const SLICE_SPAN: u64 = 32 << 20;
/// An odd number of slices, so that each is visited before any is visited again; and more than an L2 table, which QEMU reads
/// as a whole.
const STEP: u64 = 33 * SLICE_SPAN;

const BENCH: Bench = Bench {
    write: false,
    count: 1 << 15,
    size: 4096,
    step: STEP,
    depth: DEPTH,
};

/// Reads from a preallocated image, whose data is a hole.
pub(super) fn beside_qemu(setting: &Setting) -> Result<Samples> {
    let path = setting.dir.join("image.qcow2");
    let options = CreateOptions::new(LEN).preallocation(Preallocation::Metadata);
    disk::create(&path, &options)?;
    in_turn(setting.runs, |_| ours(&path), |_| BENCH.rate(&path))
}

/// Each turn opens the image again, as QEMU does, and doesn't count it.
fn ours(path: &Path) -> Result<f64> {
    let image = disk::open(path)?;
    let mut buffer = Buffer::new(BENCH.size);
    let watch = Stopwatch::start();
    for offset in BENCH.offsets(LEN) {
        image.read(buffer.bytes(), offset)?;
    }
    Ok(watch.rate(Clock::Wall, BENCH.count))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_slice_is_read_twice_and_no_table_soon_again() {
        let slices: HashSet<_> = BENCH
            .offsets(LEN)
            .map(|offset| offset / SLICE_SPAN)
            .collect();
        assert_eq!(slices.len() as u64, LEN / SLICE_SPAN);
        // QEMU keeps 512 tables of 64 KiB.
        let tables: Vec<_> = BENCH.offsets(LEN).map(|offset| offset >> 29).collect();
        for window in tables.windows(900) {
            assert_eq!(window.iter().collect::<HashSet<_>>().len(), 900);
        }
    }
}
