//! `resize`: another size for a disk.

use std::process::ExitCode;

use qcow2_format::header::Version;
use qcow2_image::create::Preallocation;
use qcow2_image::{ImageError, ResizeOptions};
use qcow2_io::{Storage, ZeroFlags};

use super::args::{self, Common, Failure};
use crate::node::{Access, Node};
use crate::words::getopt::{Long, Spec};
use crate::words::size;
use crate::words::system;
use crate::{Console, complain, say};

const SPEC: Spec = Spec {
    short: "hf:q",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::value("preallocation", '\u{3}'),
        Long::flag("shrink", '\u{4}'),
        Long::flag("quiet", 'q'),
    ],
};

const USAGE: &str = "qemu-img resize [-f FMT | --image-opts] [--preallocation PREALLOC] [--shrink] [-q]
        [--object OBJDEF] FILE [+-]SIZE[bkKMGTPE]

Change the size of a disk: to SIZE, or by it if a sign comes first.
  -f, --format FMT             format of the image
  --image-opts                 FILE is a list of options
  --preallocation PREALLOC     off, metadata, falloc or full: what is laid out for the part that is added
  --shrink                     allow a smaller size; what is behind it is lost
  --object OBJDEF              define an object, such as a secret
  -q, --quiet                  say nothing unless something is wrong";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    // `-1G` is a size and no option, if it comes last.
    let (size, words) = match words.split_last() {
        Some((last, rest)) if !matches!(last.as_str(), "-h" | "--help") => (Some(last), rest),
        _ => (None, words),
    };
    let parsed = args::parse("resize", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut preallocation) = (None, Preallocation::Off);
    let (mut quiet, mut shrink) = (false, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'q' => quiet = true,
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{2}' => common.image_opts = true,
            '\u{3}' => preallocation = mode(&value)?,
            _ => shrink = true,
        }
    }
    let ([name], Some(size)) = (parsed.operands.as_slice(), size) else {
        return Err(Failure::usage(
            "resize",
            "Expecting image file name and size",
        ));
    };
    let (sign, digits) = match size.strip_prefix('+') {
        Some(digits) => (Some(true), digits),
        None => match size.strip_prefix('-') {
            Some(digits) => (Some(false), digits),
            None => (None, size.as_str()),
        },
    };
    let amount = size::parse(digits)
        .ok()
        .filter(|size| i64::try_from(*size).is_ok());
    let amount = amount.ok_or_else(|| {
        let (text, hints) = super::creation::no_size("size");
        hints.into_iter().fold(Failure::new(text), Failure::hint)
    })?;
    let node = common.open(name, format.as_deref(), &Access::write())?;
    let now = node
        .storage()
        .len()
        .map_err(|error| Failure::new(system::describe(&error)))?;
    let total = match sign {
        None => amount,
        Some(true) => now.saturating_add(amount),
        Some(false) => now.saturating_sub(amount),
    };
    if total == 0 {
        return Err(Failure::new("New image size must be positive"));
    }
    if total <= now && preallocation != Preallocation::Off {
        return Err(Failure::new(
            "Preallocation can only be used for growing images",
        ));
    }
    if total < now && !shrink {
        complain!(
            console,
            "qemu-img: Use the --shrink option to perform a shrink operation.\n\
             qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
             such an operation, make sure there is no important data there."
        );
        return Ok(ExitCode::FAILURE);
    }
    change(&node, total, preallocation)?;
    args::close(node)?;
    if !quiet {
        say!(console, "Image resized.");
    }
    Ok(ExitCode::SUCCESS)
}

fn mode(name: &str) -> Result<Preallocation, Failure> {
    Ok(match name {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        other => {
            return Err(Failure::new(format_args!(
                "Invalid preallocation mode '{other}'"
            )));
        }
    })
}

fn change(node: &Node, total: u64, preallocation: Preallocation) -> Result<(), Failure> {
    if let Some(image) = node.image() {
        if !total.is_multiple_of(512) {
            return Err(Failure::new("The new size must be a multiple of 512"));
        }
        let header = image.header();
        if header.version == Version::V2 && header.snapshot_count > 0 {
            return Err(Failure::new("Can't resize a v2 image which has snapshots"));
        }
        let options = ResizeOptions {
            preallocation,
            shrink: true,
        };
        return image.resize(total, options).map_err(|error| {
            Failure::new(match &error {
                ImageError::Unsupported { what } => (*what).to_owned(),
                ImageError::Option { why, .. } => why.clone(),
                error => system::describe(error),
            })
        });
    }
    let storage = node.storage();
    let old = storage.len().unwrap_or_default();
    let failed = |error: qcow2_io::StorageError| {
        Failure::new(format_args!(
            "Failed to resize: {}",
            system::describe(&error)
        ))
    };
    if preallocation == Preallocation::Metadata {
        return Err(Failure::new("Unsupported preallocation mode 'metadata'"));
    }
    storage.set_len(total).map_err(failed)?;
    match preallocation {
        Preallocation::Off if old == 0 => {
            super::create::write_first_block(&*storage, total).map_err(failed)
        }
        Preallocation::Off => Ok(()),
        Preallocation::Full => super::create::fill(&*storage, old..total).map_err(failed),
        _ => storage
            .write_zeroes(old..total, ZeroFlags::NONE)
            .map_err(failed),
    }
}
