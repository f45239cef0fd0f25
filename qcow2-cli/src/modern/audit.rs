//! `qcow2 audit`: what is wrong with images, where, and what is dangerous about them.

use std::path::PathBuf;

use clap::Args;

use super::answer::Answer;
use super::args::{OutputArgs, ThreadsArgs};
use super::failure::Failure;
use crate::audit::{self, Choice, Form, Interrupt, Settings};

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

    /// Show every finding, not just a screenful
    #[arg(long)]
    all: bool,

    /// Keep and show at most N findings of each kind
    #[arg(long, value_name = "N", conflicts_with = "all")]
    max_findings: Option<usize>,

    /// Exit with 2 if there is any hazard
    #[arg(long)]
    deny_hazards: bool,

    /// Decode every compressed cluster, too, and name those that can't be read; takes as long as reading the whole disk
    #[arg(long)]
    deep: bool,

    /// Audit the backing files, too, as far as --references lets them be opened
    #[arg(long)]
    chain: bool,

    /// What --chain may open: deny, same-directory (of the first image, and below; the default), allow:PATH (a file or folder, may be
    /// repeated) or all
    #[arg(long, value_name = "POLICY", requires = "chain", value_parser = audit::parse_references)]
    references: Vec<Choice>,

    /// Check beside a running writer: read again until the findings are stable, and leave out those that are not
    #[arg(long, short_alias = 'U', alias = "force-share")]
    online: bool,

    /// Tell who owns the cluster at this offset of the image file: decimal or 0x…, perhaps with k, M, G or T
    #[arg(long, value_name = "HOST_OFFSET", value_parser = audit::parse_offset, conflicts_with_all = ["chain", "deny_hazards", "all", "max_findings", "deep"])]
    owner: Option<u64>,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let failed = |error: anyhow::Error| Failure::of(&error);
        if let Some(offset) = self.owner {
            let [path] = self.images.as_slice() else {
                return Err(Failure::new("--owner looks into one image"));
            };
            let form = if self.output.json {
                Form::Json
            } else {
                Form::Human
            };
            let threads = self.threads.count();
            let text = audit::owner_of(path, offset, self.online, threads, form, answer.look)
                .map_err(failed)?;
            answer.print(&text);
            return Ok(0);
        }
        let settings = Settings {
            json: self.output.json,
            all: self.all,
            max_findings: self.max_findings,
            threads: self.threads.count(),
            quiet: self.output.quiet,
            progress: self.output.progress(),
            deny_hazards: self.deny_hazards,
            deep: self.deep,
            chain: self.chain,
            references: audit::references(&self.references).map_err(failed)?,
            online: self.online,
            full: false,
            look: answer.look,
        };
        let inputs = audit::expand(&self.images).map_err(failed)?;
        let interrupt = Interrupt::listen().map_err(failed)?;
        audit::run(&settings, &inputs, &interrupt).map_err(failed)
    }
}
