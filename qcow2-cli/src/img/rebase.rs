//! `rebase`: another backing file for an image.

use std::process::ExitCode;
use std::sync::Arc;

use qcow2_image::ImageError;
use qcow2_image::chain::{BackingFile, ChainError};
use qcow2_image::rebase::RebaseOptions;
use qcow2_io::Storage;
use qcow2_io::codec::Level;

use super::args::{self, CacheMode, Common, Failure};
use super::progress::Progress;
use crate::node::{self, Access, Content};
use crate::words::getopt::{Long, Spec};
use crate::words::{outside, system};
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:F:b:upt:T:qUc",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("cache", 't'),
        Long::value("backing", 'b'),
        Long::value("backing-format", 'F'),
        Long::value("backing-cache", 'T'),
        Long::flag("backing-unsafe", 'u'),
        Long::flag("compress", 'c'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::flag("force-share", 'U'),
        Long::flag("progress", 'p'),
        Long::flag("quiet", 'q'),
    ],
};

const USAGE: &str =
    "qemu-img rebase [-f FMT | --image-opts] [-t CACHE_MODE] [-b BACKING_FILE [-F BACKING_FMT]]
        [-T CACHE_MODE] [-u] [-c] [-p] [-q] [-U] [--object OBJDEF] FILE

Change the backing file of an image, and keep its disk.
  -f, --format FMT           format of the image
  --image-opts               FILE is a list of options
  -b, --backing FILE         the new backing file; none if FILE is empty
  -F, --backing-format FMT   its format
  -u, --backing-unsafe       change the name only, whatever the disk shows then
  -c, --compress             compress what has to be stored
  -U, --force-share          read beside a program that writes
  -p, --progress             show how far it is
  --object OBJDEF            define an object, such as a secret
  -q, --quiet                say nothing unless something is wrong";

/// What a backing file can be said to be; only images and plain files can be opened.
const KNOWN_FORMATS: &[&str] = &[
    "bochs",
    "cloop",
    "dmg",
    "file",
    "host_cdrom",
    "host_device",
    "luks",
    "nbd",
    "parallels",
    "qcow",
    "qcow2",
    "qed",
    "raw",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("rebase", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut backing, mut backing_format) = (None, None, None);
    let (mut unsafely, mut compress, mut shown, mut quiet) = (false, false, false, false);
    let mut cache = CacheMode::default();
    let mut source_cache = cache;
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'b' => backing = Some(value),
            'F' => backing_format = Some(value),
            'u' => unsafely = true,
            'c' => compress = true,
            'p' => shown = true,
            'q' => quiet = true,
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{2}' => common.image_opts = true,
            't' => cache = CacheMode::of_target(&value)?,
            'T' => source_cache = CacheMode::of_source(&value)?,
            _ => {}
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("rebase", "Expecting one image file name"));
    };
    if !unsafely && backing.is_none() {
        return Err(Failure::usage(
            "rebase",
            "Must specify backing file (-b) or use unsafe mode (-u)",
        ));
    }
    let access = Access {
        no_backing: unsafely,
        direct: cache.direct,
        unmap: true,
        ..Access::write()
    };
    let top = common.open(name, format.as_deref(), &access)?;
    if compress && top.image().is_none() {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    if let Some(format) = backing_format.as_deref()
        && !KNOWN_FORMATS.contains(&format)
    {
        return Err(Failure::new(format_args!(
            "Invalid format name: '{format}'"
        )));
    }
    let new_name = backing.filter(|name| !name.is_empty());
    let cannot_change = |why: &str| {
        let to = new_name.as_deref().unwrap_or_default();
        Failure::new(format_args!(
            "Could not change the backing file to '{to}': {why}"
        ))
    };
    let (filename, total) = (top.path().to_owned(), top.storage().len().unwrap_or(0));
    let own_name = top.unfiltered().name().to_owned();
    let Some((mut image, below)) = top.into_image() else {
        return Err(cannot_change("Operation not supported"));
    };
    let progress = Progress::new(console, shown && !quiet, total);
    let stored = new_name.as_deref().map(outside::bytes);
    if unsafely {
        let names = match (&stored, &backing_format) {
            (None, _) => None,
            (Some(_), None) => return Err(cannot_change("backing format must be specified")),
            (Some(name), Some(format)) => Some((&**name, format.as_bytes())),
        };
        image
            .set_backing_name(names)
            .map_err(|error| cannot_change(&system::describe(&error)))?;
    } else {
        let new = match &new_name {
            None => None,
            Some(name) => {
                let resolved = node::resolve(&filename, name);
                let opened = node::open(
                    &resolved,
                    backing_format.as_deref(),
                    &Access {
                        direct: source_cache.direct,
                        ..Access::read()
                    },
                    &common.objects,
                );
                let opened = opened.map_err(|error| {
                    let failure = Failure::new(format_args!(
                        "Could not open new backing file '{name}': {}",
                        error.text
                    ));
                    error.hints.into_iter().fold(failure, Failure::hint)
                })?;
                if backing_format.is_none() {
                    return Err(cannot_change("backing format must be specified"));
                }
                let format = backing_format.as_deref().unwrap_or("raw");
                let file = match &opened.content {
                    Content::Image(image) if format == "qcow2" => {
                        BackingFile::image(&*outside::bytes(name), Arc::clone(image))
                    }
                    _ => BackingFile::raw(&*outside::bytes(name), opened.storage()),
                };
                Some((file, opened))
            }
        };
        let mut options = RebaseOptions::new().dense(true).monitor(&progress);
        if compress {
            options = options.compress(Level::default());
        }
        image
            .rebase(new.as_ref().map(|(file, _)| file), &options)
            .map_err(|error| match &error {
                ChainError::Image(ImageError::Unsupported { .. }) if compress => {
                    Failure::new("Compression not supported for this file format")
                }
                ChainError::Image(error) => cannot_change(&system::describe(error)),
                error => cannot_change(&error.to_string()),
            })?;
    }
    progress.end();
    args::close_image(image, &own_name)?;
    args::close_below(below)?;
    Ok(ExitCode::SUCCESS)
}
