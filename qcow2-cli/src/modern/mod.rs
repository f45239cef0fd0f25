//! The program under its own name.
//!
//! A file is a command; `args` has what command lines share, `open` opens disks, `new` makes images, `answer` says what came of it,
//! and `failure` what went wrong and what to do next. Commands call the library; `audit`, `repair` and `explain` are [`crate::audit`] with a
//! command line.

mod amend;
mod answer;
mod args;
mod audit;
mod bitmap;
mod check;
mod commit;
mod compact;
mod compare;
mod convert;
mod create;
mod explain;
mod export;
mod failure;
mod fresh;
mod generate;
mod info;
mod map;
mod measure;
mod new;
mod open;
mod progress;
mod rebase;
mod repair;
mod resize;
mod snapshot;

use std::ffi::OsString;
use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::{Console, img, io};
use answer::Answer;
use args::OutputArgs;
pub use args::PassphraseArgs;
use failure::Failure;

/// Work on qcow2 and raw disk images
///
/// Called as `qemu-img` or `qemu-io`, by a link or a copy of that name, the program takes the command lines of those tools.
#[derive(Debug, Parser)]
#[command(
    name = "qcow2",
    version,
    after_help = "Exit codes:
  0  done
  1  it could not be done, or the command line is wrong
  check, audit and repair: 0 sound, 1 something could not be checked, 2 corrupt, 3 leaks only
  compare: 0 the same, 1 not the same, 2 something went wrong

Examples:
  qcow2 create disk.qcow2 20G
  qcow2 convert --compress disk.raw disk.qcow2
  qcow2 audit --deep disk.qcow2
  qcow2 snapshot create disk.qcow2 before-upgrade
  qcow2 img convert -O qcow2 -c disk.raw disk.qcow2
  ln -s \"$(command -v qcow2)\" ~/bin/qemu-img"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Command),
    Info(info::Command),
    Check(check::Command),
    Audit(audit::Command),
    Repair(repair::Command),
    Map(map::Command),
    Convert(convert::Command),
    Compare(compare::Command),
    Measure(measure::Command),
    Snapshot(snapshot::Command),
    Bitmap(bitmap::Command),
    Commit(commit::Command),
    Rebase(rebase::Command),
    Resize(resize::Command),
    Amend(amend::Command),
    Compact(compact::Command),
    Explain(explain::Command),
    /// Create, look at, check, convert and change images, with the commands of qemu-img
    #[command(disable_help_flag = true)]
    Img {
        /// The command and its arguments, as for qemu-img
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Read from and write to a disk by single requests, with the commands of qemu-io
    #[command(disable_help_flag = true)]
    Io {
        /// The arguments, as for qemu-io
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    Completions(generate::Completions),
    Man(generate::Pages),
}

/// Runs a command line, the program's name first.
pub fn main(args: &[OsString], console: &Console) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // If it can't be shown, nobody is there to read it.
            _ = error.print();
            let wrong = error.use_stderr();
            // 1 would say that the disks are not the same.
            let compares = args.get(1).is_some_and(|word| word == "compare");
            return ExitCode::from(match (wrong, compares) {
                (false, _) => 0,
                (true, false) => 1,
                (true, true) => compare::FAILED,
            });
        }
    };
    let with_name = |face: &str, words: Vec<OsString>| {
        let name = format!("{} {face}", console.program());
        let mut all = vec![OsString::from(&name)];
        all.extend(words);
        (all, console.renamed(name))
    };
    match cli.command {
        Command::Img { words } => {
            let (words, console) = with_name("img", words);
            img::main(&words, &console)
        }
        Command::Io { words } => {
            let (words, console) = with_name("io", words);
            io::main(&words, &console)
        }
        command => {
            let output = command.output();
            let answer = Answer::new(console, output);
            let code = command.run(&answer);
            let code = code.unwrap_or_else(|failure| failure.report(output, console));
            console.flush();
            match console.trouble() {
                // An answer that is lost was not given.
                Some(why) if why != ErrorKind::BrokenPipe && code == 0 => {
                    let failure = Failure::new(format!("standard output takes no more: {why}"));
                    ExitCode::from(failure.report(output, console))
                }
                _ => ExitCode::from(code),
            }
        }
    }
}

impl Command {
    /// How it is to answer.
    fn output(&self) -> OutputArgs {
        match self {
            Self::Create(command) => command.output,
            Self::Info(command) => command.output,
            Self::Check(command) => command.output,
            Self::Audit(command) => command.output,
            Self::Repair(command) => command.output,
            Self::Map(command) => command.output,
            Self::Convert(command) => command.output,
            Self::Compare(command) => command.output,
            Self::Measure(command) => command.output,
            Self::Snapshot(command) => command.output(),
            Self::Bitmap(command) => command.output(),
            Self::Commit(command) => command.output,
            Self::Rebase(command) => command.output,
            Self::Resize(command) => command.output,
            Self::Amend(command) => command.output,
            Self::Compact(command) => command.output,
            Self::Explain(command) => command.output,
            Self::Man(command) => command.output,
            Self::Completions(_) | Self::Img { .. } | Self::Io { .. } => OutputArgs::default(),
        }
    }

    /// Does it; gives the exit code.
    fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        match self {
            Self::Create(command) => command.run(answer),
            Self::Info(command) => command.run(answer),
            Self::Check(command) => command.run(answer),
            Self::Audit(command) => command.run(answer),
            Self::Repair(command) => command.run(answer),
            Self::Map(command) => command.run(answer),
            Self::Convert(command) => command.run(answer),
            Self::Compare(command) => command.run(answer),
            Self::Measure(command) => command.run(answer),
            Self::Snapshot(command) => command.run(answer),
            Self::Bitmap(command) => command.run(answer),
            Self::Commit(command) => command.run(answer),
            Self::Rebase(command) => command.run(answer),
            Self::Resize(command) => command.run(answer),
            Self::Amend(command) => command.run(answer),
            Self::Compact(command) => command.run(answer),
            Self::Explain(command) => command.run(answer),
            Self::Completions(command) => Ok(command.run(Cli::command(), answer)),
            Self::Man(command) => command.run(Cli::command(), answer),
            // They have faces of their own, and don't come here.
            Self::Img { .. } | Self::Io { .. } => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_of_all_command_lines_hold() {
        Cli::command().debug_assert();
    }
}
