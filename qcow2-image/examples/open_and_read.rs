//! Opens an image and shows what its guest sees.
//!
//! ```text
//! open_and_read IMAGE                          tell the size
//! open_and_read IMAGE OFFSET LENGTH            print a range as hexadecimal bytes
//! open_and_read IMAGE OFFSET LENGTH TARGET     copy a range into a new file
//! ```
//!
//! Nothing is written to the image. Backing and data files that it names are followed if they are in its directory or
//! below; any other image is refused.
#![expect(
    clippy::print_stderr,
    reason = "a program tells its user what went wrong"
)]

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;

use qcow2_image::{Image, References};
use qcow2_io::{ExtentKind, Storage};

/// Read at a time, so that memory does not depend on the range; bytes.
const PIECE: u64 = 1 << 20;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Err(error) = run(&args, &mut io::stdout().lock()) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("open_and_read: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    ExitCode::FAILURE
}

/// The program. What it prints goes to `out`.
pub(crate) fn run(args: &[OsString], out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let (path, range, target) = match args {
        [path] => (path, None, None),
        [path, offset, len] => (path, Some((offset, len)), None),
        [path, offset, len, target] => (path, Some((offset, len)), Some(target)),
        _ => return Err("usage: open_and_read IMAGE [OFFSET LENGTH [TARGET]]".into()),
    };
    let image = Image::options()
        .read_only(true)
        .references(References::SameDirectory)
        .open_path(path)?;
    let size = image.virtual_size();
    let Some((offset, len)) = range else {
        writeln!(out, "{size} bytes, {} of them data", data_bytes(&image)?)?;
        return Ok(());
    };
    let (offset, len) = (number(offset)?, number(len)?);
    // A storage reads as zeros behind its end. Who names such a range has mistaken something.
    let end = offset
        .checked_add(len)
        .filter(|end| *end <= size)
        .ok_or_else(|| format!("the disk has {size} bytes, {len} at {offset} reach beyond"))?;
    match target {
        None => print(&image, offset..end, out),
        Some(target) => copy(&image, offset..end, target.as_ref()),
    }
}

/// Bytes of the disk that are neither zeros nor unused, in this image or one below it.
fn data_bytes(disk: &dyn Storage) -> Result<u64, Box<dyn Error>> {
    let (mut at, end) = (0, disk.len()?);
    let mut sum = 0;
    while at < end {
        for extent in disk.extents(at..end, 1000)? {
            if extent.kind == ExtentKind::Data {
                sum += extent.len;
            }
            at = extent.end();
        }
    }
    Ok(sum)
}

/// Prints a range, sixteen bytes a line.
fn print(disk: &dyn Storage, range: Range<u64>, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    for_each_piece(disk, range, |mut offset, piece| {
        for line in piece.chunks(16) {
            write!(out, "{offset:012x} ")?;
            for byte in line {
                write!(out, " {byte:02x}")?;
            }
            writeln!(out)?;
            offset += line.len() as u64;
        }
        Ok(())
    })
}

/// Copies a range into a file that must not exist.
fn copy(disk: &dyn Storage, range: Range<u64>, target: &Path) -> Result<(), Box<dyn Error>> {
    let mut file = File::create_new(target)
        .map_err(|error| format!("{} can't be created: {error}", target.display()))?;
    for_each_piece(disk, range, |_, piece| file.write_all(piece))?;
    file.sync_all()?;
    Ok(())
}

fn for_each_piece(
    disk: &dyn Storage,
    range: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), Box<dyn Error>> {
    let mut buf = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = PIECE.min(range.end - at);
        buf.resize(usize::try_from(len)?, 0);
        disk.read_at(&mut buf, at)?;
        each(at, &buf)?;
        at += len;
    }
    Ok(())
}

/// A number, decimal or hexadecimal after `0x`.
fn number(arg: &OsString) -> Result<u64, String> {
    let text = arg.to_str().unwrap_or_default();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .map_err(|error| format!("{} is no number of bytes: {error}", arg.display()))
}
