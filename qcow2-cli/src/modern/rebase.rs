//! `qcow2 rebase`: another backing file for an image.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::Image;
use qcow2_image::chain::{BackingFile, Transferred};
use qcow2_image::rebase::RebaseOptions;

use super::answer::{Answer, name};
use super::args::{BackingArgs, CompressArgs, OpenArgs, OutputArgs, RateArgs, ThreadsArgs};
use super::export::Moved;
use super::failure::Failure;
use super::new;
use super::open::{self, Want};
use super::progress::Bar;
use crate::audit::{clean, shown};

/// Change the backing file of an image, and keep its disk
///
/// What the old backing file has and the new one has not is stored in the image first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 rebase --backing newer.qcow2 --backing-format qcow2 overlay.qcow2
  qcow2 rebase --no-backing overlay.qcow2
  qcow2 rebase --unsafe --backing ../moved/base.qcow2 -F qcow2 overlay.qcow2")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    backing: BackingArgs,

    /// Store all of the disk in the image, which needs no backing file then
    #[arg(long, conflicts_with = "backing")]
    no_backing: bool,

    /// Change only the name that the image has, whatever its disk shows then: for files that were moved
    #[arg(short = 'u', long = "unsafe")]
    name_only: bool,

    #[command(flatten)]
    compress: CompressArgs,

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
        if self.backing.named().is_none() && !self.no_backing {
            return Err(Failure::new("the new backing file is missing")
                .hint("--backing FILE --backing-format FORMAT, or --no-backing for none"));
        }
        let want = Want {
            no_backing: self.name_only,
            ..Want::write()
        };
        let mut image = open::image(&self.image, &self.open, &want)?;
        let moved = self
            .rebase(&mut image)
            .and_then(|moved| {
                image.close()?;
                Ok(moved)
            })
            .map_err(|failure| {
                failure
                    .about(&self.image)
                    .if_ended("IMAGE has the backing file that it had, and reads as before; the same command does it")
            })?;
        answer.give(&moved, || {
            let over = match self.backing.named() {
                Some((backing, _)) => format!("is over {} now", clean(backing)),
                None => "has no backing file now".to_owned(),
            };
            let stored = if self.name_only {
                String::new()
            } else {
                format!(", and got {}", moved.words())
            };
            format!("{}: it {over}{stored}\n", shown(&self.image))
        })?;
        Ok(0)
    }

    fn rebase(&self, image: &mut Image) -> Result<Moved, Failure> {
        let filename = name(&self.image);
        let named = self.backing.named();
        if self.name_only {
            let names = named.map(|(name, format)| (name.as_bytes(), format.name().as_bytes()));
            image.set_backing_name(names)?;
            return Ok(Moved::new(filename, "rebase", &Transferred::default()));
        }
        let backing = match named {
            None => None,
            Some((name, format)) => {
                let policy = new::backing_policy(&self.image, name, self.open.policy()?)?;
                let mut options = Image::options().path(&self.image).references(policy);
                for (layer, secret) in self.open.passphrases.read()? {
                    options = options.layer_secret(layer, secret);
                }
                Some(BackingFile::open(name, format.name(), &options)?)
            }
        };
        let bar = Bar::new(self.output, "rebasing")?;
        let mut options = RebaseOptions::new()
            .threads(self.threads.count())
            .rate(self.rate.rate)
            .monitor(&bar);
        if let Some(level) = self.compress.level(image.header().compression_type)? {
            options = options.compress(level);
        }
        let done = image.rebase(backing.as_ref(), &options)?;
        Ok(Moved::new(filename, "rebase", &done))
    }
}
