//! `qemu-img convert`, the rival.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use qcow2_io::codec::Codec;

use super::row::{Files, Format, Row};
use super::timed;
use crate::bench::measure;

/// Numbers of coroutines that are tried; 16 is the most there can be.
const COROUTINES: [u32; 5] = [1, 2, 4, 8, 16];

/// QEMU with the settings that are best for a row.
pub(super) struct Rival {
    pub(super) coroutines: u32,
}

impl Rival {
    /// Tries all, and takes the fastest.
    pub(super) fn best(row: &Row, source: &Path, files: &Files) -> Result<Self> {
        let mut best = (f64::INFINITY, 1);
        for coroutines in COROUTINES {
            let command = Self { coroutines }.command(row, source, files);
            let seconds = timed(command, &files.rivals())?;
            if seconds < best.0 {
                best = (seconds, coroutines);
            }
        }
        Ok(Self { coroutines: best.1 })
    }

    pub(super) fn command(&self, row: &Row, source: &Path, files: &Files) -> Command {
        let coroutines = self.coroutines.to_string();
        let mut command = convert(row.from, row.to, source, &files.rivals(), files);
        command.args(["-W", "-m", &coroutines]);
        command
    }
}

/// Makes an image of a raw file.
pub(super) fn make(format: Format, raw: &Path, image: &Path, files: &Files) -> Result<()> {
    timed(convert(Format::Raw, format, raw, image, files), image).map(drop)
}

/// Has QEMU tell that both sides wrote the same disk as they read.
pub(super) fn compare(row: &Row, files: &Files) -> Result<()> {
    for file in [files.ours(), files.rivals()] {
        let mut command = Command::new("qemu-img");
        command.arg("compare").args(secret(files));
        command
            .arg("--image-opts")
            .arg(image_options(row.to, &file));
        command.arg(image_options(Format::Raw, &files.raw()));
        let run = measure::run(&mut command, Duration::MAX)?;
        ensure!(run.exit == Some(0), "{} differs", file.display());
    }
    Ok(())
}

fn convert(from: Format, to: Format, source: &Path, target: &Path, files: &Files) -> Command {
    let mut command = Command::new("qemu-img");
    command.arg("convert").args(secret(files));
    match to {
        Format::Raw => command.args(["-O", "raw"]),
        Format::Compressed(Codec::Zstd) => {
            command.args(["-c", "-O", "qcow2", "-o", "compression_type=zstd"])
        }
        Format::Compressed(_) => command.args(["-c", "-O", "qcow2"]),
        Format::Luks => command.args([
            "-O",
            "qcow2",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ]),
    };
    command.arg("--image-opts").arg(image_options(from, source));
    command.arg(target);
    command
}

fn secret(files: &Files) -> [OsString; 2] {
    let mut object = OsString::from("secret,id=s,file=");
    object.push(files.secret());
    ["--object".into(), object]
}

fn image_options(format: Format, file: &Path) -> OsString {
    let mut options = OsString::from(match format {
        Format::Raw => "driver=raw,file.filename=",
        Format::Compressed(_) => "driver=qcow2,file.filename=",
        Format::Luks => "driver=qcow2,encrypt.key-secret=s,file.filename=",
    });
    options.push(file);
    options
}
