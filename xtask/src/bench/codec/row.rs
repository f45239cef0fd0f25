//! What is measured, and what is expected of it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use qcow2_io::codec::Codec;

use super::{content, rival};

/// What stands on one side of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Compressed(Codec),
    Luks,
}

/// One conversion.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) from: Format,
    pub(super) to: Format,
    /// At least so many times as fast as QEMU.
    pub(super) goal: f64,
}

/// All rows, in the order in which they run.
pub(super) const ROWS: [Row; 6] = [
    Row {
        name: "compress-zlib",
        what: "a raw file to a compressed image, no larger than QEMU's",
        from: Format::Raw,
        to: Format::Compressed(Codec::Zlib),
        goal: 2.3,
    },
    Row {
        name: "compress-zstd",
        what: "the same with zstd",
        from: Format::Raw,
        to: Format::Compressed(Codec::Zstd),
        goal: 1.2,
    },
    Row {
        name: "read-zlib",
        what: "a compressed image of QEMU's to a raw file",
        from: Format::Compressed(Codec::Zlib),
        to: Format::Raw,
        goal: 1.8,
    },
    Row {
        name: "read-zstd",
        what: "the same with zstd",
        from: Format::Compressed(Codec::Zstd),
        to: Format::Raw,
        goal: 1.8,
    },
    Row {
        name: "luks-write",
        what: "a raw file to an image encrypted with AES-256 in XTS mode",
        from: Format::Raw,
        to: Format::Luks,
        goal: 1.5,
    },
    Row {
        name: "luks-read",
        what: "such an image of QEMU's to a raw file",
        from: Format::Luks,
        to: Format::Raw,
        goal: 1.5,
    },
];

impl Row {
    /// What is to be compressed with, if anything.
    pub(super) fn codec(&self) -> Option<Codec> {
        match self.to {
            Format::Compressed(codec) => Some(codec),
            Format::Raw | Format::Luks => None,
        }
    }

    pub(super) fn writes_image(&self) -> bool {
        self.to != Format::Raw
    }

    /// The file that both sides read; made by QEMU unless it is the raw one.
    pub(super) fn source(&self, files: &Files) -> Result<PathBuf> {
        if self.from == Format::Raw {
            return Ok(files.raw());
        }
        let made = files.source_made();
        rival::make(self.from, &files.raw(), &made, files)?;
        Ok(made)
    }

    /// How our side is told what to do.
    pub(super) fn own_args(&self, files: &Files) -> Vec<String> {
        let secret = format!("--secret-file={}", files.secret().display());
        let mut args = Vec::new();
        match self.from {
            Format::Raw => {}
            Format::Compressed(_) => args.push("--from-image".to_owned()),
            Format::Luks => args.extend(["--from-image".to_owned(), secret.clone()]),
        }
        match self.to {
            Format::Raw => {}
            Format::Compressed(codec) => args.push(format!("--compress={codec}")),
            Format::Luks => args.extend(["--encrypt".to_owned(), secret]),
        }
        args
    }
}

/// The files of a run, all in one folder.
pub(super) struct Files {
    dir: PathBuf,
}

impl Files {
    /// Makes what is copied.
    pub(super) fn make(dir: &Path, len: u64) -> Result<Self> {
        let files = Self {
            dir: dir.to_owned(),
        };
        fs::write(files.secret(), "benchmark")?;
        content::write(&files.raw(), len)?;
        Ok(files)
    }

    /// The disk, as it is.
    pub(super) fn raw(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// The disk as an image that QEMU made.
    pub(super) fn source_made(&self) -> PathBuf {
        self.dir.join("source.qcow2")
    }

    pub(super) fn ours(&self) -> PathBuf {
        self.dir.join("ours")
    }

    pub(super) fn rivals(&self) -> PathBuf {
        self.dir.join("rivals")
    }

    pub(super) fn secret(&self) -> PathBuf {
        self.dir.join("secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_side_is_told_formats_and_secret() {
        let files = Files { dir: "/d".into() };
        let args = |name: &str| {
            let row = ROWS.iter().find(|row| row.name == name).unwrap();
            row.own_args(&files).join(" ")
        };
        assert_eq!(args("compress-zstd"), "--compress=zstd");
        assert_eq!(args("read-zlib"), "--from-image");
        assert_eq!(args("luks-write"), "--encrypt --secret-file=/d/secret");
        assert_eq!(args("luks-read"), "--from-image --secret-file=/d/secret");
    }
}
