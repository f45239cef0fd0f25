//! Makes a new image and fills its disk from a raw file.
//!
//! ```text
//! create_and_write IMAGE SIZE FILE     SIZE as for qemu-img: 1048576, 64M, 1.5G
//! ```
//!
//! Where the file has holes or zeros, the image allocates nothing. If anything fails, the image is removed.
#![expect(
    clippy::print_stderr,
    reason = "a program tells its user what went wrong"
)]

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{ExtentKind, File, FileOptions, Storage};

/// Copied at a time; bytes.
const PIECE: u64 = 1 << 20;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Err(error) = run(&args, &mut io::stdout().lock()) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("create_and_write: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    ExitCode::FAILURE
}

/// The program. What it prints goes to `out`.
pub(crate) fn run(args: &[OsString], out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let [path, size, source] = args else {
        return Err("usage: create_and_write IMAGE SIZE FILE".into());
    };
    let mut options = CreateOptions::default().cluster_size(65536);
    options.set("size", size.to_str().unwrap_or_default())?;
    let source = File::open(source)?;
    let room = options.chosen_size().unwrap_or(0);
    if source.len()? > room {
        let message = format!("the file has {} bytes, the disk only {room}", source.len()?);
        return Err(message.into());
    }

    // Fails if the file exists: creating an image means losing whatever was there.
    let file = FileOptions::new().write(true).create_new(true).open(path)?;
    let written = fill(file, &options, &source).inspect_err(|_| {
        // If that fails, too, the first error still says more.
        let _ = fs::remove_file(path);
    })?;
    writeln!(out, "{written} bytes of data written")?;
    Ok(())
}

/// Makes the image and copies the data; gives the number of bytes that were no zeros.
fn fill(file: File, options: &CreateOptions, source: &File) -> Result<u64, Box<dyn Error>> {
    Image::create(&file, options)?;
    // The same descriptor: nobody else can get hold of the image in between.
    let image = Image::options().open_file(file)?;
    let mut written = 0;
    let mut buf = Vec::new();
    let (mut at, end) = (0, source.len()?);
    while at < end {
        for extent in source.extents(at..end, 1000)? {
            at = extent.end();
            if extent.kind != ExtentKind::Data {
                continue;
            }
            let mut from = extent.offset;
            while from < extent.end() {
                let len = PIECE.min(extent.end() - from);
                buf.resize(usize::try_from(len)?, 0);
                source.read_at(&mut buf, from)?;
                if buf.iter().any(|byte| *byte != 0) {
                    image.write_at(&buf, from)?;
                    written += len;
                }
                from += len;
            }
        }
    }
    // Writes back everything and says whether that worked. Dropping the image would do it, too, but in silence.
    image.close()?;
    Ok(written)
}
