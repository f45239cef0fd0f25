//! `cargo xtask crash`: programs, and the image as a crash at any moment may leave it.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use qcow2_image::Rules;
use qcow2_image::testing::{Program, RealEngine, Scale, crash_states, in_memory, qemu};

use crate::soak::cores;
use crate::soak::programs::Plan;

/// Rules that can be broken, as `--break` names them.
const RULES: [&str; 6] = [
    "refcount-before-pointer",
    "data-before-pointer",
    "release-after-pointer",
    "root-last",
    "flush-is-complete",
    "dirty-bit-first",
];

/// Look at images as a crash may leave them
///
/// Random programs run on recorded storages. At each moment a crash keeps what was flushed and any part of the rest, torn at
/// 512 bytes. In every such state the image must be free of corruption, open, and hold what a flush acknowledged. With
/// --break, the engine leaves out one of its rules of crash safety: then failures are what is expected.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many states
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    states: u64,

    /// How many states of each program, at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    per_program: u64,

    /// The first program's seed; the others follow it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// How many programs run at once; one for each core if left out
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,

    /// End after so many failures
    #[arg(long, value_name = "N", default_value_t = 10)]
    max_failures: usize,

    /// Print failing programs as they are
    #[arg(long)]
    no_shrink: bool,

    /// The rule to leave out
    #[arg(long = "break", value_name = "RULE", value_parser = RULES)]
    broken: Option<String>,
}

/// Looks at the states; the exit code is a failure when one is wrong, or when none is though a rule was left out.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let engine = RealEngine {
        rules: rules(args.broken.as_deref())?,
    };
    let with_qemu = qemu::is_available();
    let left = AtomicU64::new(args.states);
    let plan = Plan {
        seed: args.seed,
        // Few programs have fewer states than were asked for.
        programs: args.states.div_ceil(args.per_program).saturating_mul(2),
        jobs: args.jobs.unwrap_or_else(cores),
        max_failures: args.max_failures,
        shrink: !args.no_shrink,
        make: |seed| Program::random(seed, Scale::Small, with_qemu),
        judge: |program: &Program, folder: &Path| {
            let wanted = args.per_program.min(left.load(Ordering::Relaxed));
            if wanted == 0 {
                return Ok(0);
            }
            let files = in_memory(&engine, &program.shape, Some(folder))?;
            let states = usize::try_from(wanted).unwrap_or(usize::MAX);
            let count = crash_states(&engine, program, &files, states)? as u64;
            let take = |left: u64| Some(left.saturating_sub(count));
            _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
            Ok(count)
        },
    };
    let summary = plan.run()?;
    let sound = summary.print("crash", "states");
    Ok(if sound == args.broken.is_none() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All rules but the one of this name.
fn rules(broken: Option<&str>) -> Result<Rules> {
    let mut rules = Rules::ALL;
    let Some(name) = broken else {
        return Ok(rules);
    };
    let rule = match name {
        "refcount-before-pointer" => &mut rules.refcount_before_pointer,
        "data-before-pointer" => &mut rules.data_before_pointer,
        "release-after-pointer" => &mut rules.release_after_pointer,
        "root-last" => &mut rules.root_last,
        "flush-is-complete" => &mut rules.flush_is_complete,
        "dirty-bit-first" => &mut rules.dirty_bit_first,
        _ => bail!("no rule is called {name}"),
    };
    *rule = false;
    Ok(rules)
}
