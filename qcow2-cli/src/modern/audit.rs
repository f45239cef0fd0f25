//! `qcow2 audit`: what is wrong with images, where, and what is dangerous about them.

use std::path::PathBuf;

use clap::Args;

use super::answer::Answer;
use super::args::{OutputArgs, ThreadsArgs};
use super::failure::Failure;
use crate::audit::{self, Form, Interrupt, Settings, Switches};

/// Tell what is wrong with images, where, and what is dangerous about them
///
/// Images are opened read-only, and nothing that an image names is opened unless --chain is given. Of a folder, all qcow2 images below
/// it are audited.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes are those of qemu-img check: 0 sound, 1 something could not be checked, 2 corrupt, 3 leaks only; of
several images the worst one counts, in the order 1, 2, 3, 0.

Examples:
  qcow2 audit disk.qcow2
  qcow2 audit --deep --chain --references all overlay.qcow2
  qcow2 audit --deny-hazards --json uploads/
  qcow2 audit --owner 0x50000 disk.qcow2"
)]
pub(crate) struct Command {
    /// Images, or folders with images
    #[arg(value_name = "IMAGE|DIR", required = true)]
    images: Vec<PathBuf>,

    #[command(flatten)]
    switches: Switches,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let failed = |error: anyhow::Error| Failure::of(&error);
        if let Some(offset) = self.switches.owner {
            let [path] = self.images.as_slice() else {
                return Err(Failure::new("--owner looks into one image"));
            };
            let form = if self.output.json {
                Form::Json
            } else {
                Form::Human
            };
            let threads = self.threads.count();
            let text = audit::owner_of(
                path,
                offset,
                self.switches.online,
                threads,
                form,
                answer.look,
            )
            .map_err(failed)?;
            answer.print(&text);
            return Ok(0);
        }
        let settings = Settings {
            json: self.output.json,
            all: self.switches.all,
            max_findings: self.switches.max_findings,
            threads: self.threads.count(),
            quiet: self.output.quiet,
            progress: self.output.progress(),
            deny_hazards: self.switches.deny_hazards,
            deep: self.switches.deep,
            chain: self.switches.chain,
            references: self.switches.references().map_err(failed)?,
            online: self.switches.online,
            full: false,
            look: answer.look,
        };
        let inputs = audit::expand(&self.images).map_err(failed)?;
        let interrupt = Interrupt::listen().map_err(failed)?;
        audit::run(&settings, &inputs, &interrupt).map_err(failed)
    }
}
