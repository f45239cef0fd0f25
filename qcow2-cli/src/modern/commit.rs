//! `qcow2 commit`: what an overlay holds goes down into a layer below.

use std::path::{Path, PathBuf};

use clap::Args;
use qcow2_image::Image;
use qcow2_image::commit::CommitOptions;

use super::answer::{Answer, name};
use super::args::{OpenArgs, OutputArgs, RateArgs, ReadArgs, ThreadsArgs};
use super::export::Moved;
use super::failure::Failure;
use super::open::{self, Want};
use super::progress::Bar;
use crate::audit::shown;

/// Write what an overlay holds into a layer below it
///
/// The overlay is emptied then, unless it is to keep what it has. Whatever else uses the layer below sees another disk from then on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 commit overlay.qcow2
  qcow2 commit --base 2 overlay.qcow2
  qcow2 commit --base base.qcow2 --references all overlay.qcow2")]
pub(crate) struct Command {
    /// The overlay
    image: PathBuf,

    /// Into which layer: 1 is the backing file, 2 the one below it, and so on; or the name of its file. Behind 1 the overlay keeps
    /// what it has
    #[arg(short, long, value_name = "N|FILE", default_value = "1")]
    base: String,

    /// The overlay keeps what it has
    #[arg(short, long)]
    keep: bool,

    #[command(flatten)]
    rate: RateArgs,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let about = |failure: Failure| failure.about(&self.image);
        let depth = self.depth()?;
        let want = Want {
            writable_layer: Some(depth),
            ..Want::write()
        };
        let mut image = open::image(&self.image, &self.open, &want)?;
        let bar = Bar::new(self.output, "committing")?;
        let keep = self.keep || depth > 1;
        let options = CommitOptions::new()
            .base(depth)
            .keep(keep)
            .threads(self.threads.count())
            .rate(self.rate.rate)
            .monitor(&bar);
        let done = image.commit(&options).map_err(|error| {
            about(error.into()).if_ended(
                "IMAGE reads as before, and has all that it had; the same command goes on with it",
            )
        })?;
        bar.end();
        image.close().map_err(|error| about(error.into()))?;
        let moved = Moved::new(name(&self.image), "commit", &done);
        answer.give(&moved, || {
            format!(
                "{}: {} went into layer {depth}{}\n",
                shown(&self.image),
                moved.words(),
                if keep { "" } else { "; it is empty now" }
            )
        })?;
        Ok(0)
    }

    /// How deep the base lies.
    fn depth(&self) -> Result<usize, Failure> {
        if let Ok(depth) = self.base.parse::<usize>() {
            return match depth {
                0 => {
                    Err(Failure::new("layer 0 is the overlay itself").hint("its backing file is 1"))
                }
                depth => Ok(depth),
            };
        }
        let read = ReadArgs {
            open: self.open.clone(),
            ..ReadArgs::default()
        };
        let image = open::image(&self.image, &self.open, &Want::read(&read))?;
        layer_of(&image, Path::new(&self.base)).ok_or_else(|| {
            Failure::new(format!("no layer below is {}", self.base))
                .hint("`qcow2 info --chain IMAGE` shows the layers")
                .about(&self.image)
        })
    }
}

fn layer_of(image: &Image, wanted: &Path) -> Option<usize> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let wanted_real = real(wanted);
    let chain = image.chain();
    let found = chain.layers().iter().skip(1).position(|layer| {
        layer.path().is_some_and(|path| {
            path == wanted || (wanted_real.is_some() && real(path) == wanted_real)
        })
    });
    found.map(|at| at + 1)
}
