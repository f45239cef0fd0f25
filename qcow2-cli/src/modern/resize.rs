//! `qcow2 resize`: another size for a disk.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::ResizeOptions;
use qcow2_image::create::Preallocation;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{OpenArgs, OutputArgs, bytes};
use super::failure::Failure;
use super::new::{self, PreallocationName};
use super::open::{Disk, Want};
use crate::audit::shown;
use crate::words::size;

/// Change the size of a disk
///
/// What is added reads as zeros. A guest sees the new size when it looks the next time; its partitions and file systems are its own
/// affair, and have to be made smaller before the disk is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 resize disk.qcow2 +10G
  qcow2 resize disk.qcow2 40G --preallocation metadata
  qcow2 resize --shrink disk.qcow2 8G")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// The new size, or how much more or less it is to be, with + or - in front
    #[arg(allow_hyphen_values = true, value_parser = change)]
    size: Change,

    /// Allow a smaller size; what is behind it is lost
    #[arg(long)]
    shrink: bool,

    /// How much of what is added is laid out at once
    #[arg(long, value_enum, value_name = "MODE", default_value = "off")]
    preallocation: PreallocationName,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What becomes of the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    To(u64),
    By(u64),
    Less(u64),
}

fn change(text: &str) -> Result<Change, String> {
    Ok(match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(digits), _) => Change::By(bytes(digits)?),
        (None, Some(digits)) => Change::Less(bytes(digits)?),
        (None, None) => Change::To(bytes(text)?),
    })
}

impl Change {
    fn of(self, now: u64) -> Option<u64> {
        match self {
            Self::To(size) => Some(size),
            Self::By(more) => now.checked_add(more),
            Self::Less(less) => now.checked_sub(less),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Resized {
    filename: String,
    old_size: u64,
    new_size: u64,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let disk = Disk::open(&self.image, &self.open, &Want::write())?;
        let resized = self
            .resize(&disk)
            .map_err(|failure| failure.about(&self.image))?;
        disk.close()?;
        answer.give(&resized, || {
            format!(
                "{}: the disk has {} ({} bytes) now, and had {}\n",
                shown(&self.image),
                size::human(resized.new_size),
                resized.new_size,
                size::human(resized.old_size)
            )
        })?;
        Ok(0)
    }

    fn resize(&self, disk: &Disk) -> Result<Resized, Failure> {
        let old_size = disk.len()?;
        let new_size = self.size.of(old_size).ok_or_else(|| {
            Failure::new(format!(
                "a disk of {old_size} bytes can't be changed by so much"
            ))
        })?;
        if new_size < old_size && !self.shrink {
            return Err(Failure::new(format!(
                "the disk has {old_size} bytes, and all behind the first {new_size} would be lost"
            ))
            .hint("make the guest's file systems smaller first; --shrink does it then"));
        }
        if !new_size.is_multiple_of(512) || new_size == 0 {
            return Err(Failure::new(format!(
                "{new_size} bytes are no size for a disk: it must be a multiple of 512, and not 0"
            )));
        }
        let mode = Preallocation::from(self.preallocation);
        if new_size < old_size && mode != Preallocation::Off {
            return Err(Failure::new(
                "nothing is added, so nothing of it can be preallocated",
            ));
        }
        if let Some(image) = disk.image() {
            let options = ResizeOptions {
                preallocation: mode,
                shrink: self.shrink,
            };
            image.resize(new_size, options)?;
        } else {
            if mode == Preallocation::Metadata {
                return Err(Failure::new("a raw disk has no metadata to preallocate"));
            }
            let storage = disk.storage();
            storage.set_len(new_size)?;
            new::lay_out(&*storage, old_size, new_size, mode)?;
        }
        Ok(Resized {
            filename: name(&self.image),
            old_size,
            new_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        assert_eq!(change("1k").unwrap().of(5), Some(1024));
        assert_eq!(change("+1k").unwrap().of(512), Some(1536));
        assert_eq!(change("-512").unwrap().of(1024), Some(512));
        assert_eq!(change("-1k").unwrap().of(512), None);
        assert_eq!(change("+16E").ok(), None);
        assert_eq!(change("+15E").unwrap().of(u64::MAX), None);
        assert!(change("--shrinkk").is_err());
    }
}
