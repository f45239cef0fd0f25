//! First writes, each to a cluster that is not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{File, Storage};

use super::Setting;
use super::disk::{self, Disk, Raw};
use super::qemu::Bench;
use super::samples::{Samples, in_turn};
use super::work::Buffer;

/// Bytes of an empty disk.
const LEN: u64 = 64 << 30;
const CLUSTER: u64 = 64 << 10;
const COUNT: u32 = 1 << 14;
/// The backing file has what is written over, and no more.
const BACKING_LEN: u64 = COUNT as u64 * CLUSTER;

/// A new disk and what is written to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    bench: Bench,
    over_backing: bool,
}

pub(super) const SMALL: First = first(4096, false);
pub(super) const WHOLE: First = first(64 << 10, false);
pub(super) const OVER_BACKING: First = first(4096, true);

const fn first(size: usize, over_backing: bool) -> First {
    First {
        bench: Bench {
            write: true,
            count: COUNT,
            size,
            step: CLUSTER,
        },
        over_backing,
    }
}

/// A new image for each turn of each side.
pub(super) fn beside_qemu(setting: &Setting, first: First) -> Result<Samples> {
    let files = Files::make(&setting.dir, first)?;
    in_turn(setting.runs, |_| files.ours(), |_| files.qemu())
}

/// The rival writes to a new sparse file of the same length.
pub(super) fn beside_plain_file(setting: &Setting, first: First) -> Result<Samples> {
    let files = Files::make(&setting.dir, first)?;
    in_turn(setting.runs * 3, |_| files.ours(), |_| files.plain())
}

struct Files {
    first: First,
    image: PathBuf,
    backing: PathBuf,
}

impl Files {
    fn make(dir: &Path, first: First) -> Result<Self> {
        let files = Self {
            first,
            image: dir.join("image.qcow2"),
            backing: dir.join("backing.raw"),
        };
        if first.over_backing {
            disk::full_raw(&files.backing, BACKING_LEN)?;
        }
        Ok(files)
    }

    fn len(&self) -> u64 {
        if self.first.over_backing {
            BACKING_LEN
        } else {
            LEN
        }
    }

    fn create(&self) -> Result<()> {
        let mut options = CreateOptions::new(self.len());
        if self.first.over_backing {
            options = options.backing_file("backing.raw", "raw");
        }
        disk::create(&self.image, &options)
    }

    /// Our writes, and a flush, so that nothing is left for later.
    fn ours(&self) -> Result<f64> {
        self.create()?;
        let mut options = Image::options();
        if self.first.over_backing {
            options = options.backing(Arc::new(File::open(&self.backing)?));
        }
        let image = options.open_path(&self.image)?;
        let start = Instant::now();
        self.write_to(&image)?;
        image.flush()?;
        let rate = self.rate(start);
        self.ensure_written(&image)?;
        image.close()?;
        fs::remove_file(&self.image)?;
        Ok(rate)
    }

    /// QEMU's writes. It flushes when it closes the image, which does not count.
    fn qemu(&self) -> Result<f64> {
        self.create()?;
        let rate = self.first.bench.rate(&self.image)?;
        fs::remove_file(&self.image)?;
        Ok(rate)
    }

    fn plain(&self) -> Result<f64> {
        let raw = Raw::create(&self.image, self.len())?;
        let start = Instant::now();
        self.write_to(&raw)?;
        raw.sync()?;
        let rate = self.rate(start);
        self.ensure_written(&raw)?;
        drop(raw);
        fs::remove_file(&self.image)?;
        Ok(rate)
    }

    fn write_to(&self, disk: &impl Disk) -> Result<()> {
        let mut buffer = Buffer::new(self.first.bench.size);
        let bytes = buffer.bytes();
        for offset in self.first.bench.offsets(self.len()) {
            disk.write(bytes, offset)?;
        }
        Ok(())
    }

    fn rate(&self, start: Instant) -> f64 {
        f64::from(self.first.bench.count) / start.elapsed().as_secs_f64()
    }

    /// Fails unless the last cluster holds what was written.
    fn ensure_written(&self, disk: &impl Disk) -> Result<()> {
        let bench = &self.first.bench;
        let (mut written, mut found) = (Buffer::new(bench.size), Buffer::new(bench.size));
        if let Some(offset) = bench.offsets(self.len()).last() {
            disk.read(found.bytes(), offset)?;
            ensure!(
                found.bytes() == written.bytes(),
                "what was written to {offset:#x} is not there"
            );
        }
        Ok(())
    }
}
