//! `dd`: a part of a disk, in blocks.

use std::process::ExitCode;

use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_io::Storage;

use super::args::{self, Common, Failure};
use super::choices::Format;
use super::create;
use super::creation::{Creation, refused};
use crate::node::Access;
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:O:U",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("output-format", 'O'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::flag("force-share", 'U'),
    ],
};

const USAGE: &str = "qemu-img dd [-f FMT | --image-opts] [-O FMT] [-U] [--object OBJDEF]
        [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT

Copy blocks of a disk into a new image.
  bs=BLOCK_SIZE          bytes of a block (default: 512)
  count=BLOCKS           stop behind so many, counted from the start of INPUT
  skip=BLOCKS            leave out so many at the start
  if=INPUT, of=OUTPUT    from where to where
  -f, --format FMT       format of INPUT
  -O, --output-format    format of OUTPUT (default: raw)
  --image-opts           INPUT is a list of options
  -U, --force-share      read beside a program that writes
  --object OBJDEF        define an object, such as a secret";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("dd", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut target_format, mut force_share) = (None, "raw".to_owned(), false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'O' => target_format = value,
            'U' => force_share = true,
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            _ => common.image_opts = true,
        }
    }
    let (mut input, mut output) = (None, None);
    let (mut block, mut count, mut skip) = (512, None, 0);
    for operand in &parsed.operands {
        let (key, value) = operand.split_once('=').unwrap_or((operand, ""));
        match key {
            "if" => input = Some(value),
            "of" => output = Some(value),
            "bs" => {
                block = args::number("bs", value, 1..=i32::MAX.unsigned_abs().into())?;
            }
            "count" => count = Some(args::number("count", value, args::ANY_BYTES)?),
            "skip" => skip = args::number("skip", value, args::ANY_BYTES)?,
            other => return Err(Failure::new(format_args!("unrecognized operand {other}"))),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let access = Access {
        force_share,
        ..Access::read()
    };
    let source = common.open(input, format.as_deref(), &access)?;
    let len = source
        .storage()
        .len()
        .map_err(|error| Failure::new(system::describe(&error)))?;
    // As the reference program has it, `count` counts from the start of the disk, not from behind `skip`.
    let end = count.map_or(len, |count: u64| count.saturating_mul(block).min(len));
    let start = skip.saturating_mul(block);
    if start > end {
        crate::complain!(
            console,
            "qemu-img: {input}: cannot skip to specified offset"
        );
    }
    let size = end.saturating_sub(start);
    let target_format =
        Format::from_name(&target_format).map_err(|_| Failure::new("Unknown file format"))?;
    let mut creation = Creation::new(target_format);
    creation
        .set("size", &size.to_string())
        .map_err(|refusal| refused("", refusal).without_name())?;
    create::make(output, &creation, size, &common.objects).map_err(|text| {
        Failure::new(format_args!(
            "{output}: error while creating output image: {text}"
        ))
    })?;
    let plain = Common {
        objects: common.objects.clone(),
        image_opts: false,
    };
    let target = plain.open(output, Some(target_format.name()), &Access::write())?;
    // Clusters lie as they are written: one after the other.
    let options = CopyOptions::new()
        .sparse(0)
        .ordered(target.image().is_some())
        .window(start.min(end)..end);
    let (from, to) = (source.storage(), target.storage());
    let place = match target.image() {
        Some(image) => Target::Image(image),
        None => Target::Storage(&*to),
    };
    copy(&*from, place, &options).map_err(|error| Failure::new(system::sentence(&error)))?;
    drop((from, to));
    args::close(target)?;
    Ok(ExitCode::SUCCESS)
}
