//! First writes, each to a cluster that is not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{File, Op, Storage};

use super::Setting;
use super::clock::{Clock, Stopwatch};
use super::disk::{self, Disk, Raw};
use super::qemu::{Bench, DEPTH};
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
    /// Threads of ours.
    threads: u32,
    /// Ours come in batches as deep as QEMU's queue.
    batches: bool,
}

impl First {
    /// Four threads of ours.
    pub(super) const fn by_four(self) -> Self {
        Self { threads: 4, ..self }
    }

    /// Each write begins where the last one ended: of those to one cluster the first copies.
    pub(super) const fn in_order(mut self) -> Self {
        self.bench.step = self.bench.size as u64;
        self.bench.count = COUNT * 4;
        self
    }

    /// Ours come in batches, as many at a time as QEMU has in flight.
    pub(super) const fn in_batches(self) -> Self {
        Self {
            batches: true,
            ..self
        }
    }

    /// QEMU, too, makes one request after the other.
    pub(super) const fn one_at_a_time(mut self) -> Self {
        self.bench.depth = 1;
        self
    }
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
            depth: DEPTH,
        },
        over_backing,
        threads: 1,
        batches: false,
    }
}

/// A new image for each turn of each side.
pub(super) fn beside_qemu(setting: &Setting, first: First) -> Result<Samples> {
    let files = Files::make(&setting.dir, first)?;
    in_turn(setting.runs, |_| files.ours(Clock::Wall), |_| files.qemu())
}

/// The rival writes to a new sparse file of the same length, whole clusters if there is something to copy.
pub(super) fn beside_plain_file(setting: &Setting, first: First) -> Result<Samples> {
    let files = Files::make(&setting.dir, first)?;
    let clock = setting.clock;
    in_turn(
        setting.runs * 3,
        |_| files.ours(clock),
        |_| files.plain(clock),
    )
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
    fn ours(&self, clock: Clock) -> Result<f64> {
        self.create()?;
        let mut options = Image::options();
        if self.first.over_backing {
            options = options.backing(Arc::new(File::open(&self.backing)?));
        }
        let image = options.open_path(&self.image)?;
        let watch = Stopwatch::start();
        if self.first.batches {
            self.submit_to(&image)?;
        } else {
            self.write_to(&image)?;
        }
        image.flush()?;
        let rate = watch.rate(clock, self.first.bench.count);
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

    fn plain(&self, clock: Clock) -> Result<f64> {
        let raw = Raw::create(&self.image, self.len())?;
        let watch = Stopwatch::start();
        if self.first.over_backing {
            self.copy_to(&raw, &Raw::open(&self.backing)?)?;
        } else {
            self.write_to(&raw)?;
        }
        raw.sync()?;
        let rate = watch.rate(clock, self.first.bench.count);
        self.ensure_written(&raw)?;
        drop(raw);
        fs::remove_file(&self.image)?;
        Ok(rate)
    }

    /// All writes, dealt out to the threads.
    fn write_to(&self, disk: &impl Disk) -> Result<()> {
        let threads = self.first.threads;
        if threads == 1 {
            return self.write_part(disk, 0);
        }
        thread::scope(|scope| {
            let parts: Vec<_> = (0..threads)
                .map(|part| scope.spawn(move || self.write_part(disk, part)))
                .collect();
            for part in parts {
                match part.join() {
                    Ok(result) => result?,
                    Err(_) => bail!("a thread panicked"),
                }
            }
            Ok(())
        })
    }

    fn write_part(&self, disk: &impl Disk, part: u32) -> Result<()> {
        let mut buffer = Buffer::new(self.first.bench.size);
        let bytes = buffer.bytes();
        let offsets = self
            .first
            .bench
            .offsets(self.len())
            .skip(usize::try_from(part)?);
        for offset in offsets.step_by(usize::try_from(self.first.threads)?) {
            disk.write(bytes, offset)?;
        }
        Ok(())
    }

    fn submit_to(&self, image: &Image) -> Result<()> {
        let mut buffer = Buffer::new(self.first.bench.size);
        let bytes: &[u8] = buffer.bytes();
        let offsets: Vec<u64> = self.first.bench.offsets(self.len()).collect();
        for offsets in offsets.chunks(usize::try_from(DEPTH)?) {
            let mut ops: Vec<_> = offsets.iter().map(|at| Op::write(bytes, *at)).collect();
            image.submit(&mut ops);
            for op in &mut ops {
                op.take_result().context("a write has no result")??;
            }
        }
        Ok(())
    }

    /// What an image can't do without: the rest of each cluster is read and all of it written.
    fn copy_to(&self, disk: &impl Disk, backing: &impl Disk) -> Result<()> {
        let mut buffer = Buffer::new(self.first.bench.size);
        let mut cluster = Buffer::new(usize::try_from(CLUSTER)?);
        for offset in self.first.bench.offsets(self.len()) {
            backing.read(cluster.bytes(), offset)?;
            if let Some(start) = cluster.bytes().get_mut(..self.first.bench.size) {
                start.copy_from_slice(buffer.bytes());
            }
            disk.write(cluster.bytes(), offset)?;
        }
        Ok(())
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
