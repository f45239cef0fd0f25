//! `qcow2 explain`: what a finding of a check means.

use clap::Args;

use super::answer::Answer;
use super::args::OutputArgs;
use super::failure::Failure;
use crate::audit::{self, Form};

/// Tell what a finding of a check means, and what repairs it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 explain LEAK
  qcow2 explain list")]
pub(crate) struct Command {
    /// The code of the finding, such as LEAK; `list` for all of them
    #[arg(default_value = "list")]
    code: String,

    /// All of them as a page in Markdown
    #[arg(long, conflicts_with_all = ["json"])]
    markdown: bool,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let form = match (self.markdown, self.output.json) {
            (true, _) => Form::Markdown,
            (_, true) => Form::Json,
            _ => Form::Human,
        };
        let code = self.code.to_ascii_uppercase();
        let text =
            audit::explanation(&code, form, answer.look).map_err(|error| Failure::of(&error))?;
        answer.print(&text);
        Ok(0)
    }
}
