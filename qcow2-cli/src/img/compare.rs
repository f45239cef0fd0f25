//! `compare`: do two disks show the same.

use std::process::ExitCode;

use qcow2_image::compare::{CompareError, CompareOptions, Difference, Side, compare_chains};

use super::args::{self, CacheMode, Common, Failure};
use super::progress::Progress;
use crate::node::Access;
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:F:T:pqsU",
    long: &[
        Long::flag("help", 'h'),
        Long::value("a-format", 'f'),
        Long::value("b-format", 'F'),
        Long::value("cache", 'T'),
        Long::flag("strict", 's'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::flag("force-share", 'U'),
        Long::flag("progress", 'p'),
        Long::flag("quiet", 'q'),
    ],
};

const USAGE: &str = "qemu-img compare [-f FMT] [-F FMT] [--image-opts] [-s] [-T CACHE_MODE] [-p] [-q] [-U]
        [--object OBJDEF] FILE1 FILE2

Tell whether two disks show the same. Exit code: 0 they do, 1 they don't, more: something went wrong.
  -f, --a-format FMT    format of FILE1
  -F, --b-format FMT    format of FILE2
  --image-opts          FILE1 and FILE2 are lists of options
  -s, --strict          sizes and what is allocated must be the same, too
  -U, --force-share     read beside a program that writes
  -p, --progress        show how far it is
  --object OBJDEF       define an object, such as a secret
  -q, --quiet           say nothing unless something is wrong";

/// Something went wrong before anything was compared.
const CANNOT_OPEN: u8 = 2;
/// A disk could not be read.
const CANNOT_READ: u8 = 4;

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("compare", &SPEC, words)?;
    let mut common = Common::default();
    let (mut formats, mut force_share, mut cache) = ([None, None], false, None);
    let (mut strict, mut shown, mut quiet) = (false, false, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => formats[0] = Some(value),
            'F' => formats[1] = Some(value),
            's' => strict = true,
            'U' => force_share = true,
            'p' => shown = true,
            'q' => quiet = true,
            '\u{1}' => common
                .objects
                .add(&value)
                .map_err(|error| Failure::new(error).code(CANNOT_OPEN))?,
            '\u{2}' => common.image_opts = true,
            'T' => cache = Some(value),
            _ => {}
        }
    }
    let [first_name, second_name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("compare", "Expecting two image file names"));
    };
    let cache = cache
        .map(|name| CacheMode::of_source(&name).map_err(|failure| failure.code(CANNOT_OPEN)))
        .transpose()?;
    let access = Access {
        force_share,
        direct: cache.is_some_and(|mode| mode.direct),
        ..Access::read()
    };
    let open = |name: &str, format: Option<&str>| {
        common
            .open(name, format, &access)
            .map_err(|failure| failure.code(CANNOT_OPEN))
    };
    let [first_format, second_format] = &formats;
    let first = open(first_name, first_format.as_deref())?;
    let second = open(second_name, second_format.as_deref())?;
    let (first_disk, second_disk) = (first.storage(), second.storage());
    let chains = [first.chain_of(&*first_disk), second.chain_of(&*second_disk)];
    let (first, second) = (first_disk.as_ref(), second_disk.as_ref());
    let len = first.len().unwrap_or(0).max(second.len().unwrap_or(0));
    let progress = Progress::new(console, shown && !quiet, len);
    let options = CompareOptions::new().strict(strict).monitor(&progress);
    let common = first.len().unwrap_or(0).min(second.len().unwrap_or(0));
    let outcome =
        compare_chains(&chains[0], &chains[1], &options).map_err(|error| match &error {
            CompareError::Storage {
                side,
                offset,
                source,
                ..
            } => {
                let name = match side {
                    Side::First => first_name,
                    Side::Second => second_name,
                };
                if *offset >= common && common < len && !quiet {
                    // What both have was the same.
                    say!(console, "Warning: Image size mismatch!");
                }
                let text = system::describe(source);
                Failure::new(format_args!(
                    "Error while reading offset {offset} of {name}: {text}"
                ))
                .code(CANNOT_READ)
            }
            error => Failure::new(error).code(CANNOT_READ),
        })?;
    let tell = |text: String| {
        if !quiet {
            say!(console, "{text}");
        }
    };
    // What both have comes first; only then their ends are looked at.
    let within = match outcome.difference {
        Some(Difference::Content { offset } | Difference::Allocation { offset }) => offset < common,
        Some(_) => true,
        None => false,
    };
    if outcome.first_len != outcome.second_len && !within {
        tell("Warning: Image size mismatch!".to_owned());
    }
    let text = match outcome.difference {
        None => {
            progress.at(len);
            tell("Images are identical.".to_owned());
            progress.end_here();
            return Ok(ExitCode::SUCCESS);
        }
        Some(Difference::Size) => "Strict mode: Image size mismatch!".to_owned(),
        Some(Difference::Allocation { offset }) => {
            format!("Strict mode: Offset {offset} block status mismatch!")
        }
        Some(Difference::Content { offset }) => format!("Content mismatch at offset {offset}!"),
        Some(_) => "Content mismatch!".to_owned(),
    };
    tell(text);
    progress.end_here();
    Ok(ExitCode::from(1))
}
