//! The program under its own name: which face to show, and what a finding of a check means.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use qcow2_check::Code;

use crate::{Console, complain, img, io, say};

/// Work on qcow2 and raw disk images
///
/// Called as `qemu-img` or `qemu-io`, by a link or a copy of that name, the program takes the command lines of those tools.
#[derive(Debug, Parser)]
#[command(
    name = "qcow2",
    version,
    after_help = "Examples:\n  qcow2 img create -f qcow2 disk.qcow2 20G\n  qcow2 img convert -O qcow2 -c disk.raw disk.qcow2\n  \
                  qcow2 io -c 'read -P 0 0 64k' disk.qcow2\n  qcow2 explain LEAK\n  ln -s \"$(command -v qcow2)\" ~/bin/qemu-img"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
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
    /// Tell what a finding of a check means, and what repairs it
    Explain {
        /// The code of the finding, such as LEAK; `list` for all of them
        code: String,
    },
}

/// Runs a command line, the program's name first.
pub fn main(args: &[OsString], console: &Console) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // If it can't be shown, nobody is there to read it.
            _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
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
        Command::Explain { code } => explain(&code, console),
    }
}

fn explain(code: &str, console: &Console) -> ExitCode {
    if code == "list" {
        for code in Code::ALL {
            say!(console, "{:<26} {}", code.id(), code.explanation());
        }
        return ExitCode::SUCCESS;
    }
    let wanted = code.to_ascii_uppercase();
    let Some(found) = Code::from_id(&wanted) else {
        complain!(
            console,
            "there is no finding '{code}'; `qcow2 explain list` has them all"
        );
        return ExitCode::FAILURE;
    };
    say!(console, "{} ({})", found.id(), found.severity());
    say!(console, "{}", found.explanation());
    say!(console, "Repair: {}", found.repair());
    ExitCode::SUCCESS
}
