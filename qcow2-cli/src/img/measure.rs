//! `measure`: how large a file will be.

use std::process::ExitCode;

use qcow2_image::create::CreateError;
use qcow2_image::measure::{BitmapSize, MeasureError, MeasureOptions, estimate, measure_raw};
use qcow2_image::{BitmapState, SnapshotKey};
use qcow2_io::Storage;

use super::args::{self, Common, Failure, Output};
use super::choices::{self, Format};
use super::create::size_operand;
use super::creation::{self, Creation, refused};
use crate::node::Access;
use crate::words::dict::Value;
use crate::words::getopt::{Long, Spec};
use crate::words::{keyval, system};
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:l:o:O:s:U",
    long: &[
        Long::flag("help", 'h'),
        Long::value("source-format", 'f'),
        Long::value("snapshot", 'l'),
        Long::value("target-format", 'O'),
        Long::value("options", 'o'),
        Long::value("size", 's'),
        Long::value("output", '\u{1}'),
        Long::value("object", '\u{2}'),
        Long::flag("image-opts", '\u{3}'),
        Long::flag("force-share", 'U'),
    ],
};

const USAGE: &str =
    "qemu-img measure [-O FMT] [-o FMT_OPTS] [--output human|json] [--object OBJDEF]
        (--size SIZE | [-f FMT | --image-opts] [-l SNAPSHOT] [-U] FILE)

Tell how long the file of a new image will be: with what FILE has, and with every cluster written.
  -O, --target-format FMT   format of the new image (default: raw)
  -o, --options FMT_OPTS    options of the format; `-o help` lists them
  -s, --size SIZE           a disk of this size without data
  -f, --source-format FMT   format of FILE
  --image-opts              FILE is a list of options
  -l, --snapshot SNAPSHOT   of FILE, this snapshot
  -U, --force-share         read beside a program that writes
  --output human|json       for people (the default) or for programs
  --object OBJDEF           define an object, such as a secret";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("measure", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut target, mut lists) = (None, "raw".to_owned(), Vec::new());
    let (mut snapshot, mut virtual_size, mut output, mut force_share) =
        (None, None, Output::Human, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'l' => snapshot = Some(snapshot_key(&value)?),
            'O' => target = value,
            'o' => lists.push(args::option_list(value)?),
            's' => virtual_size = Some(size_operand(&value)?),
            'U' => force_share = true,
            '\u{1}' => output = Output::from_name("measure", &value)?,
            '\u{2}' => common.objects.add(&value).map_err(Failure::new)?,
            _ => common.image_opts = true,
        }
    }
    let name = match parsed.operands.as_slice() {
        [] => None,
        [name] => Some(name.as_str()),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    if lists.iter().any(|list| choices::asks_for_help(list)) {
        let format = Format::from_name(&target).map_err(Failure::new)?;
        choices::help(format, false, console);
        return Ok(ExitCode::SUCCESS);
    }
    if virtual_size.is_some() && name.is_some() {
        return Err(Failure::new(
            "--size N cannot be used together with a filename.",
        ));
    }
    if name.is_none() && (common.image_opts || format.is_some() || snapshot.is_some()) {
        return Err(Failure::new(
            "--image-opts, -f, and -l require a filename argument.",
        ));
    }
    if virtual_size.is_none() && name.is_none() {
        return Err(Failure::new(
            "Either --size N or one filename must be specified.",
        ));
    }
    let target = Format::from_name(&target).map_err(Failure::new)?;
    let mut creation = Creation::new(target);
    for list in &lists {
        creation.add_list(list).map_err(|refusal| {
            let failure = refused("", refusal);
            failure.without_name()
        })?;
    }
    let access = Access {
        force_share,
        snapshot,
        ..Access::read()
    };
    let node = name
        .map(|name| common.open(name, format.as_deref(), &access))
        .transpose()?;
    let source = node.as_ref().map(super::super::node::Node::storage);
    let len = match (&source, virtual_size) {
        (Some(source), _) => source
            .len()
            .map_err(|error| Failure::new(system::describe(&error)))?,
        (None, size) => size.unwrap_or(0),
    };
    let (required, full, bitmaps) = if target == Format::Raw {
        let required = source
            .as_ref()
            .map(|source| measure_raw(&**source).map_or(len, |found| found.required));
        (required.unwrap_or(len), len.next_multiple_of(512), None)
    } else {
        // Nothing will be made, so it doesn't matter what a backing file is.
        if creation.get("backing_file").is_some() && creation.get("backing_fmt").is_none() {
            creation
                .set("backing_fmt", "raw")
                .map_err(|refusal| refused("", refusal).without_name())?;
        }
        let mut options = creation.to_options(&common.objects).map_err(Failure::new)?;
        if options.chosen_size().is_none() || source.is_none() {
            let size = options.chosen_size().unwrap_or(len).max(len);
            options = options.size(size);
        }
        let sizes: Vec<_> = node
            .as_ref()
            .and_then(|node| node.image())
            .and_then(|image| image.bitmaps().ok())
            .unwrap_or_default()
            .iter()
            .filter(|bitmap| bitmap.state == BitmapState::Consistent)
            .map(|bitmap| BitmapSize {
                name_len: bitmap.name.len() as u64,
                granularity: bitmap.granularity,
            })
            .collect();
        let mut wanted = MeasureOptions::new().bitmaps(&sizes);
        if let Some(source) = &source {
            wanted = wanted.source(&**source);
        }
        let found = estimate(&options, &wanted).map_err(|error| {
            Failure::new(match &error {
                MeasureError::Create(CreateError::SizeTooLarge { .. }) => {
                    "The image size is too large (try using a larger cluster size)".to_owned()
                }
                MeasureError::Create(error) => creation::text_of(error),
                error => error.to_string(),
            })
        })?;
        let image = node.as_ref().and_then(|node| node.image());
        let bitmaps = found.bitmaps.filter(|_| image.is_some());
        (found.required, found.fully_allocated, bitmaps)
    };
    match output {
        Output::Human => {
            say!(
                console,
                "required size: {required}\nfully allocated size: {full}"
            );
            if let Some(bitmaps) = bitmaps {
                say!(console, "bitmaps size: {bitmaps}");
            }
        }
        Output::Json => {
            let mut members = vec![
                ("required", required.into()),
                ("fully-allocated", full.into()),
            ];
            if let Some(bitmaps) = bitmaps {
                members.push(("bitmaps", bitmaps.into()));
            }
            say!(console, "{}", Value::Object(members).to_json());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Which snapshot `-l` names: `snapshot.id=ID`, `snapshot.name=NAME`, or an id or name.
pub(super) fn snapshot_key(text: &str) -> Result<SnapshotKey, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotKey::any(text));
    }
    let (mut id, mut name) = (None, None);
    for (key, value) in keyval::parse(text, None) {
        match key.as_str() {
            "snapshot.id" => id = Some(value),
            "snapshot.name" => name = Some(value),
            other => {
                Console::warn(format_args!("qemu-img: Invalid parameter '{other}'\n"));
                return Err(Failure::new(format_args!(
                    "Failed in parsing snapshot param '{text}'"
                )));
            }
        }
    }
    match (id, name) {
        (Some(id), _) => Ok(SnapshotKey::Id(id.into_bytes())),
        (None, Some(name)) => Ok(SnapshotKey::Name(name.into_bytes())),
        (None, None) => Err(Failure::new(format_args!(
            "Failed in parsing snapshot param '{text}'"
        ))),
    }
}
