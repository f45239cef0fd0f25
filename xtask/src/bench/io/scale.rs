//! Two threads beside one.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Memory, Storage};

use super::Setting;
use super::disk::{Disk, fill, full_raw};
use super::samples::{Samples, warm_in_turn};
use super::work::{Kind, Order, Random, Work};

/// Bytes of the disk.
pub(super) const LEN: u64 = 64 << 20;

impl Disk for Memory {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.read_at(buf, offset)?)
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        Ok(self.write_at(buf, offset)?)
    }
}

/// Reads of `size` bytes from an image that lies in memory, where nothing but the image can hold threads up.
pub(super) fn beside_one_thread(setting: &Setting, size: usize) -> Result<Samples> {
    let memory = Memory::new();
    Image::create(&memory, &CreateOptions::new(LEN))?;
    let image = Image::options().open(Arc::new(memory))?;
    fill(&image, LEN)?;
    compared(setting, &image, size)
}

/// Reads from the memory below such an image.
pub(super) fn memory_alone(setting: &Setting) -> Result<Samples> {
    let memory = Memory::new();
    fill(&memory, LEN)?;
    compared(setting, &memory, 512)
}

/// What the kernel and the processors give two threads.
pub(super) fn plain_file(setting: &Setting) -> Result<Samples> {
    let raw = full_raw(&setting.dir.join("raw"), LEN)?;
    compared(setting, &raw, 4096)
}

/// Nothing but arithmetic.
struct Loops;

impl Disk for Loops {
    fn read(&self, _: &mut [u8], offset: u64) -> Result<()> {
        /// About as long as a read of an image takes.
        const ROUNDS: u32 = 100;
        let mut random = Random::new(offset);
        let sum = (0..ROUNDS).fold(0, |sum, _| random.next() ^ sum);
        black_box(sum);
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64) -> Result<()> {
        bail!("there is nothing to write to")
    }
}

/// Two threads that have nothing in common: what the processors give at the time.
pub(super) fn loops(setting: &Setting) -> Result<Samples> {
    compared(setting, &Loops, 512)
}

/// Bytes that nobody can change.
struct Frozen(Vec<u8>);

impl Disk for Frozen {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let start = usize::try_from(offset)?;
        let bytes = self.0.get(start..start + buf.len());
        buf.copy_from_slice(bytes.context("behind the end")?);
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64) -> Result<()> {
        bail!("read-only")
    }
}

/// Copies that need no care at all: what memory gives at the time.
pub(super) fn copies(setting: &Setting) -> Result<Samples> {
    let frozen = Frozen(vec![1; usize::try_from(LEN)?]);
    compared(setting, &frozen, 512)
}

fn compared(setting: &Setting, disk: &impl Disk, size: usize) -> Result<Samples> {
    let work = |threads| Work {
        kind: Kind::Read,
        order: Order::Random,
        size,
        // A fifth of a second or so: new threads may have to share a processor for a while, until the scheduler parts them.
        count: if size < 4096 { 1 << 20 } else { 1 << 19 },
        threads,
    };
    warm_in_turn(
        setting.short_runs(),
        |turn| work(2).rate(setting.clock, disk, LEN, turn),
        |turn| work(1).rate(setting.clock, disk, LEN, turn),
    )
}
