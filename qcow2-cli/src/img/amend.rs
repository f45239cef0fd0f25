//! `amend`: other options for an image that is there.

use std::process::ExitCode;

use qcow2_image::create::CreateError;
use qcow2_image::luks::LuksError;
use qcow2_image::{AmendError, AmendOptions, Image, ImageError};
use qcow2_io::Storage;

use super::args::{self, Common, Failure};
use super::creation;
use super::progress::{Parts, Progress};
use crate::node::{self, Access};
use crate::words::getopt::{Long, Spec};
use crate::words::{keyval, system};
use crate::{Console, Objects, say};

const SPEC: Spec = Spec {
    short: "ho:f:t:pq",
    long: &[
        Long {
            name: "help",
            takes_value: false,
            code: 'h',
        },
        Long {
            name: "options",
            takes_value: true,
            code: 'o',
        },
        Long {
            name: "format",
            takes_value: true,
            code: 'f',
        },
        Long {
            name: "cache",
            takes_value: true,
            code: 't',
        },
        Long {
            name: "object",
            takes_value: true,
            code: '\u{1}',
        },
        Long {
            name: "image-opts",
            takes_value: false,
            code: '\u{2}',
        },
        Long {
            name: "force",
            takes_value: false,
            code: '\u{3}',
        },
        Long {
            name: "progress",
            takes_value: false,
            code: 'p',
        },
        Long {
            name: "quiet",
            takes_value: false,
            code: 'q',
        },
    ],
};

const USAGE: &str =
    "qemu-img amend -o FMT_OPTS [-f FMT | --image-opts] [-t CACHE_MODE] [--force] [-p] [-q]
        [--object OBJDEF] FILE

Change the options of an image.
  -o, --options FMT_OPTS   what to change; `-o help` lists the options
  -f, --format FMT         format of the image (default: what it looks like)
  --image-opts             FILE is a list of options
  --force                  allow what can make the disk unreadable, such as erasing the last key
  -p, --progress           show how far it is
  --object OBJDEF          define an object, such as a secret
  -q, --quiet              say nothing unless something is wrong";

/// What can be changed: name, kind, what it is for.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("backing_file", "str", "File name of a base image"),
    ("backing_fmt", "str", "Image format of the base image"),
    (
        "compat",
        "str",
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    ("data_file", "str", "File name of an external data file"),
    (
        "data_file_raw",
        "bool (on/off)",
        "The external data file must stay valid as a raw image",
    ),
    (
        "encrypt.iter-time",
        "num",
        "Time to spend in PBKDF in milliseconds",
    ),
    (
        "encrypt.keyslot",
        "num",
        "Select a single keyslot to modify explicitly",
    ),
    (
        "encrypt.new-secret",
        "str",
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    (
        "encrypt.old-secret",
        "str",
        "Select all keyslots that match this password",
    ),
    (
        "encrypt.state",
        "str",
        "Select new state of affected keyslots (active/inactive)",
    ),
    (
        "lazy_refcounts",
        "bool (on/off)",
        "Postpone refcount updates",
    ),
    (
        "refcount_bits",
        "num",
        "Width of a reference count entry in bits",
    ),
    ("size", "size", "Virtual disk size"),
];
/// What can be chosen for new images only.
const CREATION_ONLY: &[&str] = &[
    "cluster_size",
    "compression_type",
    "encryption",
    "encrypt.format",
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "extended_l2",
    "preallocation",
];

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("amend", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut lists) = (None, Vec::new());
    let (mut force, mut shown, mut quiet) = (false, false, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'o' => lists.push(args::option_list(value)?),
            'f' => format = Some(value),
            'p' => shown = true,
            'q' => quiet = true,
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{2}' => common.image_opts = true,
            '\u{3}' => force = true,
            _ => {}
        }
    }
    if lists.is_empty() {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    }
    let wants_help = lists.iter().any(|list| super::choices::asks_for_help(list));
    if wants_help && let Some(format) = &format {
        help(format, console)?;
        return Ok(ExitCode::SUCCESS);
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::new("Expecting one image file name"));
    };
    let node = common.open(name, format.as_deref(), &Access::write())?;
    if wants_help {
        help(node.driver, console)?;
        return Ok(ExitCode::SUCCESS);
    }
    let driver = node.driver;
    let key = node.options.text("encrypt.key-secret").map(str::to_owned);
    let total = node.storage().len().unwrap_or(0);
    let own_name = node.unfiltered().name().to_owned();
    let Some((mut image, below)) = node.into_image() else {
        return Err(Failure::new(format_args!(
            "Format driver '{driver}' does not support option amendment"
        )));
    };
    let pairs: Vec<(String, String)> = lists
        .iter()
        .flat_map(|list| keyval::parse(list, None))
        .collect();
    for (key, _) in &pairs {
        known(key)?;
    }
    keep_backing(&image, &pairs)?;
    let progress = Progress::new(console, shown && !quiet, total);
    let parts = Parts(&progress);
    let options = |wanted: &dyn Fn(&str) -> bool| {
        let mut options = AmendOptions::new().force(force).monitor(&parts);
        if let Some(key) = &key {
            options = options.secret(common.objects.secret(key).map_err(Failure::new)?);
        }
        for (key, value) in pairs.iter().filter(|(key, _)| wanted(key)) {
            options = set(options, key, value, &common.objects)?;
        }
        Ok::<_, Failure>(options)
    };
    let amended = image.amend(&options(&|_| true)?);
    if let Err(error) = &amended
        && is_late(error)
    {
        // The reference program finds that out when it comes to it, last of all.
        let rest = options(&|key| key != "compat")?;
        image.amend(&rest).map_err(|error| refusal(&error))?;
    }
    amended.map_err(|error| refusal(&error))?;
    progress.end();
    args::close_image(image, &own_name)?;
    args::close_below(below)?;
    Ok(ExitCode::SUCCESS)
}

fn help(format: &str, console: &Console) -> Result<(), Failure> {
    if format != "qcow2" {
        return Err(Failure::new(format_args!(
            "Format driver '{format}' does not support option amendment"
        )));
    }
    say!(console, "Amend options for '{format}':");
    for (name, kind, what) in OPTIONS {
        say!(console, "  {:<22} - {what}", format!("{name}=<{kind}>"));
    }
    Ok(())
}

/// Refuses what is no option of this command.
fn known(key: &str) -> Result<(), Failure> {
    if CREATION_ONLY.contains(&key) {
        return Err(Failure::new(format_args!("Invalid parameter '{key}'"))
            .hint("This option is only supported for image creation"));
    }
    if OPTIONS.iter().all(|(name, ..)| *name != key) {
        return Err(Failure::new(format_args!("Invalid parameter '{key}'")));
    }
    Ok(())
}

/// Names of the backing file must be those that are there.
fn keep_backing(image: &Image, pairs: &[(String, String)]) -> Result<(), Failure> {
    let given = |wanted: &str| {
        let mut pairs = pairs.iter().rev();
        pairs
            .find(|(key, _)| key == wanted)
            .map(|(_, value)| value.as_bytes())
    };
    let (name, format) = (given("backing_file"), given("backing_fmt"));
    if name.is_none() && format.is_none() {
        return Ok(());
    }
    let header = image.header();
    if name == header.backing_name.as_deref() && format == header.backing_format() {
        return Ok(());
    }
    Err(Failure::new("Cannot amend the backing file")
        .hint("You can use 'qemu-img rebase' instead."))
}

/// Whether a downgrade was refused for what the image holds.
fn is_late(error: &AmendError) -> bool {
    matches!(error, AmendError::Refused { option, why } if *option == "compat" && !why.contains("refcount_bits"))
}

fn set<'a>(
    options: AmendOptions<'a>,
    key: &str,
    value: &str,
    objects: &Objects,
) -> Result<AmendOptions<'a>, Failure> {
    let secret = |id: &str| objects.secret(id).map_err(Failure::new);
    match key {
        // It is what it was.
        "backing_file" | "backing_fmt" => Ok(options),
        "encrypt.new-secret" => Ok(options.new_secret(secret(value)?)),
        "encrypt.old-secret" => Ok(options.old_secret(secret(value)?)),
        _ => {
            let mut options = options;
            options.set(key, value).map_err(|error| refusal(&error))?;
            Ok(options)
        }
    }
}

fn refusal(error: &AmendError) -> Failure {
    if let AmendError::Image(image @ ImageError::SnapshotL1 { problem, .. }) = error {
        let errno = system::text(system::of_kind(image.kind()));
        return Failure::new(node::snapshot_l1_text(*problem)).then(Failure::new(format_args!(
            "Failed to turn zero into data clusters: {errno}"
        )));
    }
    Failure::new(match error {
        AmendError::UnknownOption { option } => format!("Invalid parameter '{option}'"),
        AmendError::Value(CreateError::UnknownValue {
            option: "compat",
            value,
            ..
        }) => {
            format!("Unknown compatibility level {value}")
        }
        AmendError::Value(error) => creation::text_of(error),
        AmendError::Refused { option, why } => refused_text(option, why),
        AmendError::Luks(error) => keys_text(error),
        error => system::sentence(error),
    })
}

fn refused_text(option: &str, why: &str) -> String {
    match option {
        "refcount_bits" if why.starts_with("it must be a power of two") => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        "refcount_bits" => {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above \
             (use compat=1.1 or greater)"
                .to_owned()
        }
        "data_file" if why.contains("no external data file") => {
            "data-file can only be set for images that use an external data file".to_owned()
        }
        "compat" if why.contains("refcount_bits") => {
            "compat=0.10 requires refcount_bits=16".to_owned()
        }
        "compat" if why.contains("snapshot") => {
            "Internal snapshots prevent downgrade of image".to_owned()
        }
        "compat" if why.contains("external data files") => {
            "Cannot downgrade an image with a data file".to_owned()
        }
        "compat" if why.contains("extended L2") => {
            "Cannot downgrade an image with incompatible features 0x10 set".to_owned()
        }
        "data_file_raw" => "data-file-raw cannot be set on existing images".to_owned(),
        "lazy_refcounts" => "Lazy refcounts only supported with compatibility level 1.1 and above \
             (use compat=1.1 or greater)"
            .to_owned(),
        _ => why.to_owned(),
    }
}

/// What can go wrong with key slots.
fn keys_text(error: &LuksError) -> String {
    let lost = "which will erase all the data in the image irreversibly - refusing operation";
    match error {
        LuksError::NoFreeSlot => "Can't add a keyslot - all keyslots are in use".to_owned(),
        LuksError::SlotActive { slot } => {
            format!("Refusing to overwrite active keyslot {slot} - please erase it first")
        }
        LuksError::LastSlot { slot } => {
            format!("Attempt to erase the only active keyslot {slot} {lost}")
        }
        LuksError::AllSlotsMatch => format!(
            "All the active keyslots match the (old) password that was given and erasing them {}",
            lost.trim_start_matches("which ")
        ),
        LuksError::NoSlotMatches => {
            "No keyslots match given (old) password for erase operation".to_owned()
        }
        error => system::sentence(error),
    }
}
