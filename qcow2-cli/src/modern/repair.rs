//! `qcow2 repair`: what would mend an image, mending it, and the way back.

use std::path::PathBuf;

use clap::Args;

use super::answer::Answer;
use super::args::{ConsentArgs, OutputArgs, PassphraseArgs, ThreadsArgs};
use super::failure::Failure;
use crate::audit::repair::{self, LevelName, OrphansName, Request};
use crate::audit::{self, Choice, Interrupt};

/// Mend an image
///
/// The plan comes first: what would be written, why, and what it means for the guest's data. Its outcome is checked before anything
/// is written. What is overwritten is saved to an undo file, so that there is a way back.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes are those of a check of what is there in the end (with --plan: of what is there now): 0 sound, 1 something
could not be checked, or done, 2 corrupt, 3 leaks only.

Examples:
  qcow2 repair --plan disk.qcow2
  qcow2 repair --level leaks --yes disk.qcow2
  qcow2 repair --undo disk.qcow2.undo disk.qcow2
  qcow2 repair --passphrase-file key --yes encrypted.qcow2
  qcow2 repair --level salvage --salvage-to rescued.qcow2 disk.qcow2"
)]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// How far the repair goes
    #[arg(long, value_enum, default_value = "all")]
    level: LevelName,

    /// Only show what would be done
    #[arg(long)]
    plan: bool,

    /// Where what is overwritten is saved [default: beside the image, with .undo behind its name]
    #[arg(long, value_name = "FILE")]
    undo_file: Option<PathBuf>,

    /// What becomes of clusters that are found without references after pointers were lost
    #[arg(long, value_enum, default_value_t)]
    orphans: OrphansName,

    /// Drop bitmaps that a crash left in use, too
    #[arg(long)]
    drop_stale_bitmaps: bool,

    /// Write what can be read of the repaired disk, backing files among it, to a new image, and leave the old one as it is. The new
    /// image is not encrypted
    #[arg(long, value_name = "OUT", conflicts_with_all = ["plan", "undo_file"])]
    salvage_to: Option<PathBuf>,

    /// Undo the repair that this file tells of
    #[arg(long, value_name = "FILE", conflicts_with_all = ["level", "plan", "undo_file", "salvage_to", "drop_stale_bitmaps"])]
    undo: Option<PathBuf>,

    /// Show every action, not just the first ones
    #[arg(long)]
    all: bool,

    /// Which files that the image names --salvage-to may open: deny, same-directory (of the image, and below; the default), allow:PATH (a
    /// file or folder, may be repeated) or all
    #[arg(long, value_name = "POLICY", value_parser = audit::parse_references, requires = "salvage_to")]
    references: Vec<Choice>,

    #[command(flatten)]
    passphrases: PassphraseArgs,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    consent: ConsentArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let failed = |error: anyhow::Error| Failure::of(&error);
        if let Some(undo) = &self.undo {
            return repair::undo(&self.image, undo, self.output.json, self.output.quiet)
                .map_err(failed);
        }
        let request = Request {
            image: &self.image,
            level: self.level.into(),
            orphans: self.orphans.into(),
            drop_stale_bitmaps: self.drop_stale_bitmaps,
            plan_only: self.plan,
            yes: self.consent.yes,
            undo_file: self.undo_file.as_deref(),
            json: self.output.json,
            all: self.all,
            quiet: self.output.quiet,
            progress: self.output.progress(),
            threads: self.threads.count(),
            secrets: self.passphrases.read()?,
            references: audit::references(&self.references).map_err(failed)?,
            look: answer.look,
        };
        let interrupt = Interrupt::listen().map_err(failed)?;
        match &self.salvage_to {
            Some(out) => repair::salvage_to(&request, out, &interrupt),
            None => repair::run(&request, &interrupt),
        }
        .map_err(failed)
    }
}
