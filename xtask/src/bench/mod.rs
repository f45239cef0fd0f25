//! `cargo xtask bench`: whole workloads, side by side with QEMU, as ratios taken in one run.
//!
//! `check` is the checker's benchmark: `case` has its images, `read` is the yardstick, `table` the outcome on the screen. `io` is that of
//! the virtual disk, `codec` that of compression and encryption, `lifecycle` that of whole operations on images, `repair` that of repairs. For all, `measure` runs processes, and `place` finds room for files.

mod case;
mod check;
mod codec;
mod io;
mod lifecycle;
mod measure;
mod place;
mod read;
mod repair;
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
    Codec(codec::Args),
    #[command(hide = true)]
    Convert(codec::ConvertArgs),
    Io(io::Args),
    Lifecycle(lifecycle::Args),
    #[command(hide = true)]
    LifecycleStep(lifecycle::StepArgs),
    #[command(hide = true)]
    Read(read::Args),
    Repair(repair::Args),
}

/// Runs a workload.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.workload {
        Workload::Check(args) => check::run(args),
        Workload::Codec(args) => codec::run(args),
        Workload::Convert(args) => codec::convert(args),
        Workload::Io(args) => io::run(args),
        Workload::Lifecycle(args) => lifecycle::run(args),
        Workload::LifecycleStep(args) => lifecycle::step(args),
        Workload::Read(args) => read::run(args),
        Workload::Repair(args) => repair::run(args),
    }
}

pub(crate) use measure::note_peak;
