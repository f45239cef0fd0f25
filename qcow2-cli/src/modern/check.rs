//! `qcow2 check`: is an image sound, in a line.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use qcow2_check::{Counts, Options, Verdict, check};
use qcow2_io::{File, FileOptions, Storage, StorageErrorKind};
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{OutputArgs, ThreadsArgs};
use super::failure::Failure;
use super::open::{self, Want};
use crate::audit::{Interrupt, Progress, facts, shown};

/// Tell whether an image is sound
///
/// The quick verdict: what qemu-img check counts, and what it has no eye for. `qcow2 audit` tells what is wrong, where, and what is
/// dangerous about it; `qcow2 repair` mends it. Nothing that the image names is opened, and no passphrase is needed.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 sound, 1 something could not be checked, 2 corrupt, 3 leaks only.

Examples:
  qcow2 check disk.qcow2
  qcow2 check --quiet disk.qcow2 || qcow2 audit disk.qcow2"
)]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// Check beside a program that writes; what it is about to write looks like damage (`qcow2 audit --online` knows)
    #[arg(short = 'U', long)]
    force_share: bool,

    /// IMAGE is a list of options of nodes, as qemu-img has them; json:{...} is taken for a description without this, too
    #[arg(long)]
    image_opts: bool,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Checked {
    filename: String,
    verdict: Verdict,
    exit_code: u8,
    qemu_verdict: Verdict,
    #[serde(flatten)]
    counts: Counts,
}

impl Command {
    fn open(&self) -> Result<File, Failure> {
        let file = FileOptions::new()
            .force_share(self.force_share)
            .open(&self.image);
        file.map_err(|error| {
            let locked = error.kind() == StorageErrorKind::Locked;
            let failure = Failure::opening(&error).about(&self.image);
            if locked {
                failure
                    .hint("`qcow2 audit --online IMAGE` checks it beside the program that uses it")
            } else {
                failure
            }
        })
    }

    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let want = Want {
            force_share: self.force_share,
            image_opts: self.image_opts,
            ..Want::default()
        };
        let file: Arc<dyn Storage> = match open::described(&self.image, &want) {
            Some(text) => {
                open::described_file(text, &want).map_err(|failure| failure.about(&self.image))?
            }
            None => Arc::new(self.open()?),
        };
        if !facts::has_magic(&*file) {
            return Err(Failure::new("the file does not start as a qcow2 image does")
                .hint("of a raw disk there is nothing to check; `qcow2 repair --level salvage` searches for a lost header")
                .about(&self.image));
        }
        let interrupt = Interrupt::listen().map_err(|error| Failure::of(&error))?;
        let progress = Progress::new(self.output.progress(), &interrupt);
        let options = Options {
            threads: self.threads.count(),
            max_findings: 1,
            monitor: Some(&progress),
            ..Options::default()
        };
        let report = check(&*file, &options);
        progress.finish();
        let verdict = report.verdict();
        let checked = Checked {
            filename: name(&self.image),
            verdict,
            exit_code: verdict.exit_code(),
            qemu_verdict: report.qemu_verdict(),
            counts: report.counts,
        };
        let (colour, words) = match verdict {
            Verdict::Sound => ("1;32", "sound"),
            Verdict::Leaks => ("1;33", "sound, with leaks"),
            Verdict::Corrupt => ("1;31", "corrupt"),
            Verdict::Incomplete => ("1;31", "can't be checked in full"),
        };
        let text = || {
            let mut text = format!(
                "{}: {}\n",
                answer.look.bold(&shown(&self.image)),
                answer.look.paint(colour, words)
            );
            if verdict != Verdict::Sound {
                text.push_str("  `qcow2 audit` tells what is wrong, `qcow2 repair` mends it\n");
            }
            text
        };
        if verdict == Verdict::Sound {
            answer.give(&checked, text)?;
        } else {
            answer.tell(&checked, text)?;
        }
        Ok(checked.exit_code)
    }
}
