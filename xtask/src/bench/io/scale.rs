//! Two threads beside one.

use std::sync::Arc;

use anyhow::Result;
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Memory, Storage};

use super::Setting;
use super::disk::{Disk, fill, full_raw};
use super::samples::{Samples, warm_in_turn};
use super::work::{Kind, Order, Work};

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

fn compared(setting: &Setting, disk: &impl Disk, size: usize) -> Result<Samples> {
    let work = |threads| Work {
        kind: Kind::Read,
        order: Order::Random,
        size,
        count: if size < 4096 { 1 << 17 } else { 1 << 16 },
        threads,
    };
    warm_in_turn(
        setting.short_runs(),
        |turn| work(2).rate(setting.clock, disk, LEN, turn),
        |turn| work(1).rate(setting.clock, disk, LEN, turn),
    )
}
