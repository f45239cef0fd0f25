//! The face of `qemu-img`: its command lines, its words, its exit codes.
//!
//! A file is a command; `args.rs` has what commands share.

mod amend;
mod args;
mod bitmap;
mod check;
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

use crate::Console;

pub(crate) use args::Failure;
pub(crate) use info::Facts;

/// A command: gets what comes behind its name.
type Command = fn(&[String], &Console) -> Result<ExitCode, Failure>;

/// Commands by their names, in the order in which help lists them.
const COMMANDS: &[(&str, Command)] = &[
    ("amend", amend::run),
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

/// Runs a command line, the program's name first.
pub fn main(args: &[OsString], console: &Console) -> ExitCode {
    let args: Vec<String> = args
        .iter()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
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
