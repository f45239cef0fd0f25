//! Completions and man pages, made from the definitions of the command lines.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Command as Definition};
use clap_complete::Shell;
use clap_mangen::Man;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::OutputArgs;
use super::failure::Failure;
use crate::audit::{plural, shown};

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 completions bash > /etc/bash_completion.d/qcow2
  qcow2 completions fish > ~/.config/fish/completions/qcow2.fish")]
pub(crate) struct Completions {
    /// Which shell
    shell: Shell,
}

/// Write man pages, one for each command
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 man /usr/local/share/man/man1")]
pub(crate) struct Pages {
    /// The folder that they go to; made if it is not there
    folder: PathBuf,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Written {
    folder: String,
    pages: Vec<String>,
}

impl Completions {
    /// The script for the shell.
    pub(super) fn run(&self, mut cli: Definition, answer: &Answer<'_>) -> u8 {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut cli, "qcow2", &mut script);
        answer.print(&String::from_utf8_lossy(&script));
        0
    }
}

impl Pages {
    pub(super) fn run(&self, mut cli: Definition, answer: &Answer<'_>) -> Result<u8, Failure> {
        let about = |error: std::io::Error| Failure::from(error).about(&self.folder);
        fs::create_dir_all(&self.folder).map_err(about)?;
        cli.build();
        let mut written = Written {
            folder: name(&self.folder),
            pages: Vec::new(),
        };
        write(&cli, "qcow2", &self.folder, &mut written.pages)?;
        answer.give(&written, || {
            let count = plural(written.pages.len() as u64, "page");
            format!("{}: {count}\n", shown(&self.folder))
        })?;
        Ok(0)
    }
}

/// The page of a command, and those of its subcommands.
fn write(
    command: &Definition,
    title: &str,
    folder: &Path,
    pages: &mut Vec<String>,
) -> Result<(), Failure> {
    let page = format!("{title}.1");
    let path = folder.join(&page);
    let mut text = Vec::new();
    let named = command.clone().name(leaked(title)).display_name(title);
    Man::new(named).title(title).render(&mut text)?;
    fs::write(&path, text).map_err(|error| Failure::from(error).about(&path))?;
    pages.push(page);
    for sub in command.get_subcommands() {
        if sub.get_name() != "help" && !sub.is_hide_set() {
            write(sub, &format!("{title}-{}", sub.get_name()), folder, pages)?;
        }
    }
    Ok(())
}

/// Names of commands live as long as the program.
fn leaked(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}
