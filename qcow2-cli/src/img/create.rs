//! `create`: new images.

use std::process::ExitCode;
use std::sync::Arc;

use qcow2_image::create::{CreateOptions, Preallocation, write_image};
use qcow2_image::luks::{self, LuksOptions};
use qcow2_io::{FileOptions, Storage, StorageErrorKind, ZeroFlags};

use super::args::{self, Failure};
use super::choices::{self, Format};
use super::creation::{self, Creation, refused};
use crate::node::{self, Access, OpenError};
use crate::words::getopt::{Long, Spec};
use crate::words::outside;
use crate::words::size::{self, SizeError};
use crate::words::system;
use crate::{Console, Objects, say};

const SPEC: Spec = Spec {
    short: "hqf:o:b:F:u",
    long: &[
        Long::flag("help", 'h'),
        Long::flag("quiet", 'q'),
        Long::value("object", '\u{1}'),
        Long::value("format", 'f'),
        Long::value("options", 'o'),
        Long::value("backing", 'b'),
        Long::value("backing-format", 'F'),
        Long::flag("backing-unsafe", 'u'),
    ],
};

const USAGE: &str = "qemu-img create [-f FMT] [-o FMT_OPTS] [-b BACKING_FILENAME [-F BACKING_FMT]]
        [--object OBJDEF] [-u] [-q] FILENAME [SIZE[bkKMGTPE]]

Make a new image.
  -f, --format FMT          format of the image (default: raw)
  -o, --options FMT_OPTS    options of the format; `-o help` lists them
  -b, --backing FILE        what the image does not have itself comes from FILE
  -F, --backing-format FMT  format of FILE
  -u, --backing-unsafe      don't open FILE
  --object OBJDEF           define an object, such as a secret
  -q, --quiet               say nothing unless something is wrong";

/// What is to be made.
struct Order {
    name: String,
    creation: Creation,
    size: Option<u64>,
    unsafe_backing: bool,
    quiet: bool,
    objects: Objects,
}

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("create", &SPEC, words)?;
    let (mut format, mut lists) = ("raw".to_owned(), Vec::new());
    let (mut backing, mut backing_format) = (None, None);
    let (mut quiet, mut unsafe_backing) = (false, false);
    let mut objects = Objects::default();
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'q' => quiet = true,
            'u' => unsafe_backing = true,
            'f' => format = value,
            'b' => backing = Some(value),
            'F' => backing_format = Some(value),
            'o' => lists.push(args::option_list(value)?),
            _ => objects.add(&value).map_err(Failure::new)?,
        }
    }
    let mut operands = parsed.operands.into_iter();
    let name = operands.next();
    if lists.iter().any(|list| choices::asks_for_help(list)) {
        let format = Format::from_name(&format).map_err(Failure::new)?;
        choices::help(format, name.is_some(), console);
        return Ok(ExitCode::SUCCESS);
    }
    let name = name.ok_or_else(|| Failure::usage("create", "Expecting image file name"))?;
    let size = operands
        .next()
        .map(|text| size_operand(&text))
        .transpose()?;
    if let Some(word) = operands.next() {
        return Err(Failure::usage(
            "create",
            format_args!("Unexpected argument: {word}"),
        ));
    }

    let in_file = |text: String| Failure::new(format_args!("{name}: {text}"));
    let format = Format::from_name(&format).map_err(&in_file)?;
    let mut new = Creation::new(format);
    for list in &lists {
        new.add_list(list)
            .map_err(|refusal| refused(&name, refusal))?;
    }
    if size.is_some() && new.get("size").is_some() {
        return Err(in_file(
            "The image size must be specified only once".to_owned(),
        ));
    }
    for (key, value, what) in [
        ("backing_file", backing, "Backing file not supported"),
        (
            "backing_fmt",
            backing_format,
            "Backing format not supported",
        ),
    ] {
        if let Some(value) = value {
            new.set(key, &value)
                .map_err(|_| in_file(format!("{what} for file format '{}'", format.name())))?;
        }
    }
    if new.get("backing_file") == Some("") {
        return Err(in_file(
            "Expected backing file name, got empty string".to_owned(),
        ));
    }
    let order = Order {
        name,
        creation: new,
        size,
        unsafe_backing,
        quiet,
        objects,
    };
    order.carry_out(console)?;
    Ok(ExitCode::SUCCESS)
}

/// The size behind the file's name.
pub(super) fn size_operand(text: &str) -> Result<u64, Failure> {
    let range =
        || Failure::new("Invalid image size specified. Must be between 0 and 9223372036854775807.");
    match size::parse(text) {
        Ok(size) if i64::try_from(size).is_ok() => Ok(size),
        Ok(_) | Err(SizeError::Range) => Err(range()),
        Err(SizeError::Invalid)
            if size::parse(text.strip_prefix('-').unwrap_or("x")).is_ok()
                && text.ends_with(|c: char| c.is_ascii_digit()) =>
        {
            Err(range())
        }
        Err(SizeError::Invalid) => Err(Failure::new(format_args!(
            "Invalid image size specified: '{text}'."
        ))),
    }
}

impl Order {
    fn failure(&self, text: impl std::fmt::Display) -> Failure {
        Failure::new(format_args!("{}: {text}", self.name))
    }

    fn carry_out(mut self, console: &Console) -> Result<(), Failure> {
        let mut size = match self.creation.get("size") {
            Some(size) => size.parse().ok(),
            None => self.size,
        };
        if let Some(backing) = self
            .creation
            .get("backing_file")
            .filter(|name| !name.is_empty())
        {
            if backing == self.name {
                return Err(self.failure(
                    "Error: Trying to create an image with the same filename as the backing file",
                ));
            }
            if !self.unsafe_backing {
                let found = self.backing_size(backing)?;
                size = size.or(Some(found));
            }
        }
        let size = size.ok_or_else(|| self.failure("Image creation needs a size parameter"))?;
        self.creation
            .set("size", &size.to_string())
            .map_err(|refusal| refused(&self.name, refusal))?;
        if !self.quiet {
            console.out(format_args!(
                "Formatting '{}', fmt={}{}\n",
                self.name,
                self.creation.format.name(),
                self.creation.line()
            ));
            console.flush();
        }
        make(&self.name, &self.creation, size, &self.objects).map_err(|text| self.failure(text))
    }

    /// Opens the backing file, and tells the size of its disk.
    fn backing_size(&self, backing: &str) -> Result<u64, Failure> {
        let wrap = |error: OpenError| {
            let failure = error
                .hints
                .into_iter()
                .fold(self.failure(error.text), Failure::hint);
            failure.hint("Could not open backing image.")
        };
        let format = self
            .creation
            .get("backing_fmt")
            .filter(|format| !format.is_empty());
        let name = node::resolve(&self.name, backing);
        let access = Access {
            locked: true,
            ..Access::read()
        };
        let found = node::open(&name, format, &access, &self.objects).map_err(wrap)?;
        if format.is_none() {
            return Err(self
                .failure("Backing file specified without backing format")
                .hint(format!("Detected format of {}.", found.driver)));
        }
        let size = found.storage().len();
        size.map_err(|error| self.failure(system::describe(&error)))
    }
}

/// Makes an image file; what was in it is lost.
pub(crate) fn make(
    name: &str,
    creation: &Creation,
    size: u64,
    objects: &Objects,
) -> Result<(), String> {
    match creation.format {
        Format::Raw => make_raw(name, creation, size),
        Format::Luks => make_luks(name, creation, size, objects),
        Format::Qcow2 => {
            let options = creation.to_options(objects)?.size(size);
            // What is wrong with the options is known before a file is touched.
            options.check().map_err(|error| creation::text_of(&error))?;
            let data = match options.chosen_data_file() {
                None => None,
                Some(data) => Some(new_file(&outside::text(data))?),
            };
            make_in(&*new_file(name)?, data.as_deref(), &options).inspect_err(|_| {
                // Half an image is of no use; a device is not ours to take away.
                let path = outside::path(name);
                if path.is_file() {
                    let _ = std::fs::remove_file(path);
                }
            })
        }
    }
}

/// Makes a qcow2 image in an open file.
fn make_in(
    file: &dyn Storage,
    data: Option<&dyn Storage>,
    options: &CreateOptions,
) -> Result<(), String> {
    write_image(file, data, options).map_err(|error| creation::text_of(&error))
}

/// Opens a file for a new image, and empties it.
fn new_file(name: &str) -> Result<Arc<dyn Storage>, String> {
    let path = name.strip_prefix("file:").unwrap_or(name);
    let opened = FileOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(outside::path(path));
    match opened {
        Ok(file) => Ok(Arc::new(file)),
        Err(error) if error.kind() == StorageErrorKind::Locked => Err(
            "Failed to get \"write\" lock\nIs another process using the image".to_owned()
                + &format!(" [{name}]?"),
        ),
        Err(error) => Err(format!(
            "Could not create '{path}': {}",
            system::describe(&error)
        )),
    }
}

fn make_raw(name: &str, creation: &Creation, size: u64) -> Result<(), String> {
    let preallocation = creation.preallocation()?;
    let file = new_file(name)?;
    // Whole sectors, as all disks have.
    let size = size.next_multiple_of(512);
    let failed = |what: &str, error| format!("{what}: {}", system::describe(&error));
    file.set_len(size)
        .map_err(|error| failed("Could not resize file", error))?;
    match preallocation {
        Preallocation::Full => fill(&*file, 0..size),
        Preallocation::Falloc if size > 0 => file.write_zeroes(0..size, ZeroFlags::NONE),
        _ => write_first_block(&*file, size),
    }
    .map_err(|error| failed("Could not write zeros for preallocation", error))
}

/// Writes zeros to the start of a raw file that had no bytes: who wants to know how buffers have to be aligned for it reads
/// there, and of holes some file systems read anything into any buffer.
pub(super) fn write_first_block(file: &dyn Storage, len: u64) -> qcow2_io::Result<()> {
    let len = match len {
        0..512 => 0,
        512..4096 => 512,
        _ => 4096,
    };
    let zeros = [0; 4096];
    file.write_at(zeros.get(..len).unwrap_or_default(), 0)
}

/// Writes zeros to a range of a file.
pub(super) fn fill(file: &dyn Storage, range: std::ops::Range<u64>) -> qcow2_io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let zeros = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(PIECE);
        let piece = usize::try_from(len).ok().and_then(|len| zeros.get(..len));
        file.write_at(piece.unwrap_or_default(), at)?;
        at += len;
    }
    file.flush()
}

fn make_luks(name: &str, creation: &Creation, size: u64, objects: &Objects) -> Result<(), String> {
    let mut options = LuksOptions::default();
    for key in [
        "cipher-alg",
        "cipher-mode",
        "ivgen-alg",
        "ivgen-hash-alg",
        "hash-alg",
        "iter-time",
    ] {
        if let Some(value) = creation.get(key) {
            options
                .set(key, value)
                .map_err(|_| format!("Parameter '{key}' does not accept value '{value}'"))?;
        }
    }
    let id = creation
        .get("key-secret")
        .ok_or("Parameter 'key-secret' is required for cipher")?;
    let secret = objects.secret(id).map_err(|error| error.0)?;
    let file = new_file(name)?;
    let text = |error: luks::LuksError| error.to_string();
    luks::create(&*file, 0, &options, &secret).map_err(text)?;
    let len = options
        .area_len()
        .map_err(text)?
        .saturating_add(size.next_multiple_of(512));
    file.set_len(len).map_err(|error| system::describe(&error))
}
