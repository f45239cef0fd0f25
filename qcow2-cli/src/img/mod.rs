//! The face of `qemu-img`: its command lines, its words, its exit codes.
//!
//! A file is a command; `args.rs` has what commands share.

mod amend;
mod args;
mod bench;
mod bitmap;
mod check;
mod choices;
mod commit;
mod compare;
mod convert;
mod create;
mod creation;
mod dd;
mod info;
mod map;
mod measure;
mod progress;
mod rebase;
mod resize;
mod snapshot;

use std::ffi::OsString;
use std::process::ExitCode;

use crate::words::getopt::{Long, Spec};
use crate::words::outside;
use crate::{Console, say};

pub(crate) use args::Failure;
pub(crate) use info::Facts;

/// A command: gets what comes behind its name.
type Command = fn(&[String], &Console) -> Result<ExitCode, Failure>;

/// Commands by their names, in the order in which help lists them.
const COMMANDS: &[(&str, Command)] = &[
    ("amend", amend::run),
    ("bench", bench::run),
    ("bitmap", bitmap::run),
    ("check", check::run),
    ("commit", commit::run),
    ("compare", compare::run),
    ("convert", convert::run),
    ("create", create::run),
    ("dd", dd::run),
    ("info", info::run),
    ("map", map::run),
    ("measure", measure::run),
    ("rebase", rebase::run),
    ("resize", resize::run),
    ("snapshot", snapshot::run),
];

/// What stands before the command.
const GLOBAL: Spec = Spec {
    short: "hVT:",
    long: &[
        Long::flag("help", 'h'),
        Long::flag("version", 'V'),
        Long::value("trace", 'T'),
    ],
};

/// Takes the options before the command; gives the rest, or the exit code if that is all.
fn global_options<'a>(args: &'a [String], console: &Console) -> Result<&'a [String], ExitCode> {
    let mut taken = 0;
    while let Some(word) = args.get(taken).filter(|word| word.starts_with('-')) {
        taken += 1;
        // The value may be a word of its own.
        let bare_trace = word == "-T" || word == "--trace";
        taken += usize::from(bare_trace && taken < args.len());
    }
    let (options, rest) = args.split_at_checked(taken).unwrap_or((args, &[]));
    let parsed = args::parse("", &GLOBAL, options).map_err(|failure| failure.report(console))?;
    for (code, _) in parsed.options {
        match code {
            'h' => {
                help(console);
                return Err(ExitCode::SUCCESS);
            }
            'V' => {
                // Scripts take the number for what the tool can do.
                say!(
                    console,
                    "qemu-img version 10.0.0 (qcow2 {})",
                    env!("CARGO_PKG_VERSION")
                );
                return Err(ExitCode::SUCCESS);
            }
            // Nothing is traced.
            _ => {}
        }
    }
    Ok(rest)
}

fn help(console: &Console) {
    say!(
        console,
        "Usage: qemu-img [-h | -V] COMMAND [ARGUMENT]...\n\nWork on disk images. The commands:"
    );
    for (name, _) in COMMANDS {
        say!(console, "  {name}");
    }
    say!(
        console,
        "\n`qemu-img COMMAND --help` tells what a command takes.\n"
    );
    say!(
        console,
        "Supported formats: blkdebug compress copy-on-read file host_cdrom host_device null-aio null-co qcow2 quorum raw"
    );
}

/// Runs a command line, the program's name first.
pub fn main(args: &[OsString], console: &Console) -> ExitCode {
    let args: Vec<String> = args.iter().skip(1).map(|arg| outside::of_os(arg)).collect();
    let args = match global_options(&args, console) {
        Ok(rest) => rest,
        Err(code) => return code,
    };
    let Some((name, rest)) = args.split_first() else {
        return Failure::usage("", "Not enough arguments").report(console);
    };
    let Some((_, command)) = COMMANDS.iter().find(|(found, _)| found == name) else {
        return Failure::usage("", format!("Command not found: {name}")).report(console);
    };
    match command(rest, console) {
        Ok(code) => code,
        Err(failure) => failure.report(console),
    }
}
