//! The images that a row works on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use qcow2_image::copy::{CopyOptions, copy};
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::{Image, SnapshotOptions};
use qcow2_io::{File, FileOptions, Storage as _};

use super::row::{Rival, Step};
use crate::bench::measure;

/// Data of the sparse images lies so far apart; bytes.
const FAR: u64 = 1 << 30;
/// Pieces of data and holes in turn; bytes.
const STRIPE: u64 = 4 << 20;

/// Sizes of disks in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) metadata: u64,
    pub(super) shrink: u64,
    pub(super) data: u64,
}

/// What there is before the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Nothing,
    /// An image with all tables.
    Tables,
    /// The same with a snapshot.
    Snapshot,
    /// A smaller one.
    SmallTables,
    /// Two large images with little data.
    Sparse,
    /// A raw file, and an image with the same disk.
    Both,
    /// An overlay, its backing file, and another that differs a little.
    Chain,
    /// The same with little data on a disk that is sixteen times as large.
    SparseChain,
}

/// The disk with little data is so much larger.
const LARGER: u64 = 16;

/// The files of a row.
pub(super) struct Scene {
    stage: Stage,
    dir: PathBuf,
    pub(super) sizes: Sizes,
}

impl Scene {
    /// Makes what no operation changes.
    pub(super) fn make(stage: Stage, dir: &Path, sizes: Sizes) -> Result<Self> {
        let scene = Self {
            stage,
            dir: dir.to_owned(),
            sizes,
        };
        match stage {
            Stage::Sparse => {
                for path in [scene.image(), scene.other()] {
                    let image = create(&path, &CreateOptions::new(sizes.metadata))?;
                    for at in (0..sizes.metadata).step_by(usize::try_from(FAR)?) {
                        image.write_at(&[7; 4096], at)?;
                    }
                    image.close()?;
                }
            }
            Stage::Both => {
                let raw = FileOptions::new().write(true).create(true);
                let raw = raw.open(scene.raw())?;
                raw.set_len(sizes.data)?;
                let mut noise = 1_u64;
                let mut stripe = vec![0; usize::try_from(STRIPE)?];
                for at in (0..sizes.data).step_by(usize::try_from(2 * STRIPE)?) {
                    for word in stripe.as_chunks_mut::<8>().0 {
                        noise = noise.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                        *word = noise.to_be_bytes();
                    }
                    raw.write_at(&stripe, at)?;
                }
                let image = create(&scene.image(), &CreateOptions::new(sizes.data))?;
                copy(&raw, &image, &CopyOptions::new())?;
                image.close()?;
            }
            Stage::Nothing
            | Stage::Tables
            | Stage::Snapshot
            | Stage::SmallTables
            | Stage::Chain
            | Stage::SparseChain => {}
        }
        Ok(scene)
    }

    /// Makes what operations change, and takes away what they leave.
    pub(super) fn set(&self) -> Result<()> {
        let size = match self.stage {
            Stage::SmallTables => self.sizes.shrink,
            _ => self.sizes.metadata,
        };
        match self.stage {
            Stage::Nothing => remove(&self.image())?,
            Stage::Tables | Stage::Snapshot | Stage::SmallTables => {
                remove(&self.image())?;
                let options = CreateOptions::new(size).preallocation(Preallocation::Metadata);
                let image = create(&self.image(), &options)?;
                if self.stage == Stage::Snapshot {
                    image.create_snapshot(&SnapshotOptions {
                        name: b"s".to_vec(),
                        ..SnapshotOptions::default()
                    })?;
                }
                image.close()?;
            }
            Stage::Chain => self.set_chain(self.sizes.data, 2 * STRIPE, STRIPE)?,
            Stage::SparseChain => self.set_chain(self.sizes.data * LARGER, FAR, 4096)?,
            Stage::Sparse | Stage::Both => remove(&self.target())?,
        }
        Ok(())
    }

    /// Makes two backing files with data at each multiple of `far`, of which the second differs in every eighth, and an overlay of
    /// the first with half of that.
    fn set_chain(&self, size: u64, far: u64, len: u64) -> Result<()> {
        for path in [self.image(), self.base(), self.other()] {
            remove(&path)?;
        }
        let step = usize::try_from(far)?;
        let piece = |byte: u8| vec![byte; usize::try_from(len).unwrap_or_default()];
        for path in [self.base(), self.other()] {
            let image = create(&path, &CreateOptions::new(size))?;
            for (number, at) in (0..size).step_by(step).enumerate() {
                let differs = path == self.other() && number % 8 == 0;
                image.write_at(&piece(if differs { 9 } else { 7 }), at)?;
            }
            image.close()?;
        }
        let options = CreateOptions::new(size).backing_file("base.qcow2", "qcow2");
        let file: File = FileOptions::new()
            .write(true)
            .create(true)
            .open(self.image())?;
        Image::create(&file, &options)?;
        let overlay = Image::options().no_backing().open_file(file)?;
        for at in (0..size).step_by(step * 2) {
            overlay.write_at(&piece(5), at)?;
        }
        Ok(overlay.close()?)
    }

    /// Looks at the copy that was made, if one was.
    pub(super) fn check(&self, step: Step, rival: Option<Rival>) -> Result<()> {
        let format = match (step, rival) {
            (Step::ToImage, None | Some(Rival::QemuImg)) => "qcow2",
            (Step::ToImage | Step::ToRaw, _) => "raw",
            _ => return Ok(()),
        };
        let mut command = Command::new("qemu-img");
        command.args(["compare", "-q", "-f", format, "-F", "raw"]);
        command.args([self.target(), self.raw()]);
        let run = measure::run(&mut command, Duration::MAX)?;
        ensure!(run.exit == Some(0), "the copy differs");
        Ok(())
    }

    pub(super) fn image(&self) -> PathBuf {
        self.dir.join("image.qcow2")
    }

    pub(super) fn base(&self) -> PathBuf {
        self.dir.join("base.qcow2")
    }

    pub(super) fn other(&self) -> PathBuf {
        self.dir.join("other.qcow2")
    }

    pub(super) fn raw(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    pub(super) fn target(&self) -> PathBuf {
        self.dir.join("target")
    }
}

fn create(path: &Path, options: &CreateOptions) -> Result<Image> {
    let file: File = FileOptions::new().write(true).create(true).open(path)?;
    Image::create(&file, options)?;
    Ok(Image::options().open_file(file)?)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
