//! Opening a large image.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use qcow2_image::create::{CreateOptions, Preallocation};

use super::Setting;
use super::disk::{self, Disk};
use super::samples::Samples;

/// Bytes of the disk.
const LEN: u64 = 16 << 40;

/// Milliseconds until it is open.
pub(super) fn open(setting: &Setting) -> Result<Samples> {
    measured(setting, |path| {
        let start = Instant::now();
        let image = disk::open(path)?;
        let took = start.elapsed();
        image.close()?;
        Ok(took.as_secs_f64() * 1e3)
    })
}

/// Milliseconds until a first write to it is complete.
pub(super) fn open_and_write(setting: &Setting) -> Result<Samples> {
    measured(setting, |path| {
        let start = Instant::now();
        let image = disk::open(path)?;
        image.write(&[1; 4096], 0)?;
        let took = start.elapsed();
        image.close()?;
        Ok(took.as_secs_f64() * 1e3)
    })
}

fn measured(setting: &Setting, turn: impl Fn(&Path) -> Result<f64>) -> Result<Samples> {
    let path: PathBuf = setting.dir.join("image.qcow2");
    let options = CreateOptions::new(LEN).preallocation(Preallocation::Metadata);
    disk::create(&path, &options)?;
    turn(&path)?;
    let turns = (0..setting.short_runs()).map(|_| turn(&path));
    Ok(Samples {
        ours: turns.collect::<Result<_>>()?,
        rival: Vec::new(),
    })
}
