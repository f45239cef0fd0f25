//! The project's harness, called as `cargo xtask`: what is worth scripting twice.
//!
//! One file a command, each thin over library functions. A new command is a module with `Args` and `run`, a variant of
//! [`Command`], and an arm in [`main`].

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that people run in a terminal"
)]

mod bench;
mod cargo;
mod check_image;
mod crash;
mod fuzz;
mod iotests;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The harness of the qcow2 workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What can be asked for; the help text of each stands on its arguments.
#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Args),
    CheckImage(check_image::Args),
    Crash(crash::Args),
    Fuzz(fuzz::Args),
    Iotests(iotests::Args),
    Soak(soak::Args),
    Test(test::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // If it can't be shown, nobody is there to read it.
            _ = error.print();
            // The usual 2 would say that an image is corrupt.
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let outcome = match cli.command {
        Command::Bench(args) => bench::run(&args),
        Command::CheckImage(args) => check_image::run(&args),
        Command::Crash(args) => crash::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Iotests(args) => iotests::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Test(args) => test::run(&args),
    };
    bench::note_peak();
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
