//! `map`: which layer holds which part of a disk, and where.

use std::process::ExitCode;

use qcow2_image::chain::Chain;
use qcow2_image::map::{MapEntry, map};
use qcow2_io::Storage;

use super::args::{self, Common, Failure, Output};
use crate::node::{Access, Node};
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:s:l:U",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("output", '\u{1}'),
        Long::value("object", '\u{2}'),
        Long::flag("image-opts", '\u{3}'),
        Long::flag("force-share", 'U'),
        Long::value("start-offset", 's'),
        Long::value("max-length", 'l'),
    ],
};

const USAGE: &str =
    "qemu-img map [-f FMT | --image-opts] [--start-offset OFFSET] [--max-length LENGTH]
        [--output human|json] [-U] [--object OBJDEF] FILE

Tell which file of a chain holds which part of a disk.
  -f, --format FMT            format of the image (default: what it looks like)
  --image-opts                FILE is a list of options
  -s, --start-offset OFFSET   begin there
  -l, --max-length LENGTH     tell of no more than so many bytes
  -U, --force-share           read beside a program that writes
  --output human|json         for people (the default) or for programs
  --object OBJDEF             define an object, such as a secret";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("map", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut output) = (None, Output::Human);
    let (mut start, mut max, mut force_share) = (0, None, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'U' => force_share = true,
            's' => start = args::number("start offset", &value, args::ANY_BYTES)?,
            'l' => max = Some(args::number("max length", &value, args::ANY_BYTES)?),
            '\u{1}' => output = Output::from_name("map", &value)?,
            '\u{2}' => common.objects.add(&value).map_err(Failure::new)?,
            _ => common.image_opts = true,
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("map", "Expecting one image file name"));
    };
    let access = Access {
        force_share,
        ..Access::read()
    };
    let node = common.open(name, format.as_deref(), &access)?;
    let failed = |text: String| Failure::new(format_args!("Failed to get image metadata: {text}"));
    let storage = node.storage();
    let len = storage
        .len()
        .map_err(|error| failed(system::describe(&error)))?;
    let end = max.map_or(len, |max| start.saturating_add(max).min(len));
    let names = layer_names(&node);
    let window = window_start(&node);
    let chain = match node.image() {
        Some(image) => image.chain(),
        None => Chain::raw(&*storage),
    };
    let rows = map(chain, start..end).map_err(|error| failed(system::describe(&error)))?;
    if output == Output::Human {
        say!(
            console,
            "{:<16}{:<16}{:<16}File",
            "Offset",
            "Length",
            "Mapped to"
        );
    }
    let mut first = true;
    for row in rows {
        let mut row = row.map_err(|error| failed(system::describe(&error)))?;
        row.offset = row.offset.map(|offset| offset + window);
        match output {
            Output::Json => {
                let before = if first { "[" } else { ",\n" };
                console.out(format_args!("{before}{}", json(&row)));
            }
            Output::Human => human(&row, &names, console)?,
        }
        first = false;
    }
    if output == Output::Json && first {
        // A row without length, where there is nothing to tell.
        console.out(format_args!(
            "[{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \"compressed\": false}}"
        ));
    }
    if output == Output::Json {
        say!(console, "]");
    }
    Ok(ExitCode::SUCCESS)
}

/// Where in its file a plain disk begins.
fn window_start(node: &Node) -> u64 {
    let mut options = node.options.clone();
    match node.driver {
        "raw" => options.take_size("offset").ok().flatten().unwrap_or(0),
        _ => 0,
    }
}

/// Which file the data of each layer lies in.
fn layer_names(node: &Node) -> Vec<String> {
    let mut names = Vec::new();
    let mut layer = Some(node);
    while let Some(node) = layer.map(Node::unfiltered) {
        let data = node.child("data-file").or_else(|| node.child("file"));
        names.push(data.unwrap_or(node).filename.clone());
        layer = node.child("backing");
    }
    names
}

fn json(row: &MapEntry<'_>) -> String {
    let offset = row
        .offset
        .map_or(String::new(), |offset| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{offset}}}",
        row.start, row.len, row.depth, row.present, row.zero, row.data, row.compressed
    )
}

/// Only what a program could read from the file itself.
fn human(row: &MapEntry<'_>, names: &[String], console: &Console) -> Result<(), Failure> {
    if !row.data || row.zero {
        return Ok(());
    }
    let Some(offset) = row.offset else {
        return Err(Failure::new(
            "File contains external, encrypted or compressed clusters.",
        ));
    };
    let name = names.get(row.depth).map_or("", String::as_str);
    say!(
        console,
        "{:<16}{:<16}{:<16}{name}",
        hex(row.start),
        hex(row.len),
        hex(offset)
    );
    Ok(())
}

/// As C prints it with `%#x`.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    }
}
