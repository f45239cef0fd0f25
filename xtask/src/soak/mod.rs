//! `cargo xtask soak`: random programs, against plain bytes and QEMU, or with every storage operation failing in turn; and
//! repairs beside QEMU's.

pub(crate) mod programs;
mod repair;

use std::path::Path;
use std::process::ExitCode;
use std::thread;

use anyhow::{Result, ensure};
use qcow2_image::testing::{
    Engine, Failure, FaultRuns, Program, RealEngine, Scale, in_memory, live, qemu, run_beside_qemu,
    run_by_qemu, run_in_memory,
};

use programs::Plan;

/// What is done in a life.
const DEEDS: usize = 16;

/// Run random programs on images, and compare with plain bytes and with QEMU
///
/// Each seed is an image, of any geometry and with any option, and a sequence of operations on it. What the guest sees must
/// equal plain bytes, and what qemu-img reads from the same file; both checkers must call the image clean. Every fourth
/// program is played by qemu-io instead, and read here. A program that fails is made small and printed; its seed runs it
/// again: --seed N --programs 1.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many programs
    #[arg(long, value_name = "N", default_value_t = 1000)]
    programs: u64,

    /// The first seed; the others follow it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Let each storage operation of each program fail in turn, instead of comparing with QEMU
    #[arg(long)]
    faults: bool,

    /// Run lives instead: snapshots, bitmaps, sizes, versions and backing files come and go, by us and by QEMU in turn
    #[arg(long, conflicts_with = "faults")]
    lives: bool,

    /// Repair damaged images instead, one in N of some 19,000, here and by qemu-img check -r all, and compare what is left
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8", conflicts_with_all = ["faults", "lives"])]
    repair: Option<usize>,

    /// Don't run QEMU
    #[arg(long, conflicts_with_all = ["faults", "lives", "repair"])]
    without_qemu: bool,

    /// How many run at once; one for each core if left out
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,

    /// End after so many failures
    #[arg(long, value_name = "N", default_value_t = 10)]
    max_failures: usize,

    /// Print failing programs as they are
    #[arg(long)]
    no_shrink: bool,
}

/// Runs the programs; the exit code is a failure when one failed.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(step) = args.repair {
        return repair::run(step);
    }
    let engine = RealEngine::default();
    let with_qemu = !args.without_qemu;
    ensure!(
        !with_qemu || qemu::is_available(),
        "qemu-img and qemu-io are needed (or --without-qemu)"
    );
    let (scale, unit) = if args.faults {
        (Scale::Small, "faults")
    } else if args.lives {
        (Scale::Small, "deeds")
    } else {
        (Scale::Full, "comparisons")
    };
    let judge = |program: &Program, folder: &Path| {
        if args.faults {
            return faults(&engine, program, folder);
        }
        if args.lives {
            live(program.seed, DEEDS, folder)?;
            return Ok(DEEDS as u64);
        }
        match program.seed % 4 {
            _ if !with_qemu => run_in_memory(&engine, program)?,
            0 => run_by_qemu(&engine, program, folder)?,
            _ => run_beside_qemu(&engine, program, folder)?,
        }
        Ok(1)
    };
    let plan = Plan {
        seed: args.seed,
        programs: args.programs,
        jobs: args.jobs.unwrap_or_else(cores),
        max_failures: args.max_failures,
        // A life is told from its beginning.
        shrink: !args.no_shrink && !args.lives,
        make: |seed| Program::random(seed, scale, with_qemu),
        judge,
    };
    let summary = plan.run()?;
    Ok(if summary.print("soak", unit) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Lets everything fail that can, one at a time.
fn faults(engine: &dyn Engine, program: &Program, folder: &Path) -> Result<u64, Failure> {
    let files = in_memory(engine, &program.shape, Some(folder))?;
    let runs = FaultRuns::new(engine, program, &files)?;
    let mut met = 0;
    for case in runs.cases()? {
        met += u64::from(runs.run(case).map_err(|failure| failure.during(case))?);
    }
    Ok(met)
}

/// Programs to run at once unless told otherwise.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}
