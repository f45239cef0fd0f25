//! `commit`: what an overlay holds goes down into a layer below.

use std::error::Error;
use std::process::ExitCode;

use qcow2_image::chain::ChainError;
use qcow2_image::commit::CommitOptions;
use qcow2_io::Storage;

use super::args::{self, CacheMode, Common, Failure};
use super::progress::Progress;
use crate::node::{self, Access, Node};
use crate::words::getopt::{Long, Spec};
use crate::words::outside;
use crate::words::system;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:t:b:dpqr:",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("cache", 't'),
        Long::value("base", 'b'),
        Long::flag("drop", 'd'),
        Long::flag("keep", 'd'),
        Long::value("rate-limit", 'r'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::flag("progress", 'p'),
        Long::flag("quiet", 'q'),
    ],
};

const USAGE: &str =
    "qemu-img commit [-f FMT | --image-opts] [-t CACHE_MODE] [-b BASE] [-r RATE] [-d] [-p] [-q]
        [--object OBJDEF] FILE

Write what an image holds into its backing file, and empty the image.
  -f, --format FMT        format of the image (default: what it looks like)
  --image-opts            FILE is a list of options
  -b, --base BASE         write into this layer of the chain; the image keeps what it has
  -d, --drop              the image keeps what it has
  -r, --rate-limit RATE   write no more than so many bytes a second
  -p, --progress          show how far it is
  --object OBJDEF         define an object, such as a secret
  -q, --quiet             say nothing unless something is wrong";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("commit", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut base_name) = (None, None);
    let (mut keep, mut shown, mut quiet) = (false, false, false);
    let (mut rate, mut cache) = (0, CacheMode::default());
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'b' => base_name = Some(value),
            'd' => keep = true,
            'p' => shown = true,
            'q' => quiet = true,
            'r' => rate = args::number("rate limit", &value, args::ANY_BYTES)?,
            't' => cache = CacheMode::of_target(&value)?,
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{2}' => common.image_opts = true,
            _ => {}
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("commit", "Expecting one image file name"));
    };
    // First a look, to know how deep the base lies; then again, with that layer open for writing.
    let depth = {
        let node = common.open(name, format.as_deref(), &Access::read())?;
        if format.is_none()
            && !common.image_opts
            && node.driver == "raw"
            && !name.starts_with("json:")
        {
            node::warn_of_guess(name);
        }
        depth_of(&node, base_name.as_deref(), name)?
    };
    let access = Access {
        writable_layers: depth,
        direct: cache.direct,
        unmap: true,
        ..Access::write()
    };
    let node = common.open(name, format.as_deref(), &access)?;
    let total = node.storage().len().unwrap_or(0);
    let own_name = node.unfiltered().name().to_owned();
    let Some((mut image, below)) = node.into_image() else {
        return Err(Failure::new("Image does not have a backing file"));
    };
    let progress = Progress::new(console, shown && !quiet, total);
    let options = CommitOptions::new()
        .base(depth)
        .keep(keep || base_name.is_some())
        .rate(rate)
        .monitor(&progress);
    image.commit(&options).map_err(|error| {
        Failure::new(match &error {
            ChainError::Image(error) => system::describe(error),
            ChainError::Emptying(error) => {
                format!("Failed to empty {name}: {}", system::describe(error))
            }
            ChainError::Read { source, .. } => job_failed(source),
            ChainError::Write { source, .. } => job_failed(&**source),
            error => error.to_string(),
        })
    })?;
    progress.end();
    args::close_image(image, &own_name)?;
    args::close_below(below)?;
    if !quiet {
        say!(console, "Image committed.");
    }
    Ok(ExitCode::SUCCESS)
}

fn job_failed(cause: &(dyn Error + 'static)) -> String {
    format!("Block job failed: {}", system::describe(cause))
}

/// How deep the base lies.
fn depth_of(node: &Node, base: Option<&str>, name: &str) -> Result<usize, Failure> {
    let mut layer = node.child("backing");
    let Some(base) = base else {
        return match layer {
            Some(_) => Ok(1),
            None => Err(Failure::new("Image does not have a backing file")),
        };
    };
    let mut above = node;
    for depth in 1.. {
        let Some(node) = layer else { break };
        // A name of a layer is meant as the image above it has it: from that one's directory.
        let meant = node::resolve(above.path(), base);
        if node.filename == meant || same_file(&node.filename, &meant) {
            return Ok(depth);
        }
        above = node;
        layer = node.child("backing");
    }
    Err(Failure::new(format_args!(
        "Did not find '{base}' in the backing chain of '{name}'"
    )))
}

fn same_file(one: &str, other: &str) -> bool {
    let real = |name: &str| std::fs::canonicalize(outside::path(name)).ok();
    real(one).is_some_and(|one| Some(one) == real(other))
}
