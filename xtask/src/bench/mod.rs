//! `cargo xtask bench`: whole workloads, side by side with QEMU, as ratios taken in one run.
//!
//! `case` has the images, `check` the benchmark, `measure` runs processes, `read` is the yardstick, `table` the outcome on the screen.

mod case;
mod check;
mod measure;
mod read;
mod table;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// Measure whole workloads beside QEMU
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    Check(check::Args),
    #[command(hide = true)]
    Read(read::Args),
}

/// Runs a workload.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.workload {
        Workload::Check(args) => check::run(args),
        Workload::Read(args) => read::run(args),
    }
}

pub(crate) use measure::note_peak;
