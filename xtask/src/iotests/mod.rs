//! `cargo xtask iotests`: QEMU's own block tests, run on the program.
//!
//! `list` reads which tests there are, `workbench` makes the folders and stand-ins that the suite wants, `one` runs a test and tells how it ended.

mod list;
mod one;
mod workbench;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::one::{Ending, Outcome};
use self::workbench::Workbench;
use crate::cargo::{cargo, has_program, workspace_root};

/// The tests that are run if no list is given.
const LIST: &str = include_str!("list.txt");

/// Run QEMU's own block tests on the program
///
/// The suite comes with QEMU's source, of which an unpacked tree is needed; nothing in it is changed. The program is built, and goes by
/// the names qemu-img and qemu-io. Scratch images, logs and differences stay in target/iotests.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An unpacked source tree of QEMU
    #[arg(long, value_name = "DIR")]
    qemu_source: PathBuf,

    /// A list of tests [default: those that need nothing but the two programs]
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,

    /// Use this program instead of ours as qemu-img
    #[arg(long, value_name = "PROGRAM")]
    img: Option<PathBuf>,

    /// Use this program instead of ours as qemu-io
    #[arg(long, value_name = "PROGRAM")]
    io: Option<PathBuf>,

    /// Arguments for the suite, such as `-o compat=0.10`; may be given several times
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    suite: Vec<String>,

    /// Tests at a time
    #[arg(short, long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,

    /// Seconds that a test may take
    #[arg(long, default_value_t = 300)]
    seconds: u64,

    /// Only these tests of the list
    tests: Vec<String>,
}

/// Runs the tests, and tells how each ended.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let suite = args.qemu_source.join("tests/qemu-iotests");
    ensure!(
        suite.join("check").is_file(),
        "{} has no tests/qemu-iotests/check: is it an unpacked source tree of QEMU?",
        args.qemu_source.display()
    );
    ensure!(
        has_program("python3"),
        "python3 not found: the suite needs it"
    );
    let text = match &args.list {
        None => LIST.to_owned(),
        Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
    };
    let entries = list::selected(list::parse(&text), &args.tests);
    if entries.is_empty() {
        bail!("no test of the list is called so");
    }
    let program = built()?;
    let bench = Workbench::new(
        &workspace_root().join("target/iotests"),
        &suite,
        args.img.as_deref().unwrap_or(&program),
        args.io.as_deref().unwrap_or(&program),
    )?;
    let limit = Duration::from_secs(args.seconds);
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| {
                while let Some(entry) = entries.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = one::run(&bench, entry, &args.suite, limit);
                    println!("{outcome}");
                    if let Ok(mut all) = outcomes.lock() {
                        all.push(outcome);
                    }
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap_or_default();
    outcomes.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(summary(&outcomes, &bench))
}

/// Builds the program, and tells where it is.
fn built() -> Result<PathBuf> {
    let status = cargo()
        .args(["build", "--release", "--package", "qcow2-cli"])
        .status()
        .context("cargo could not start")?;
    ensure!(status.success(), "the program does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from);
    Ok(target.join("release/qcow2"))
}

fn summary(outcomes: &[Outcome], bench: &Workbench) -> ExitCode {
    let passed = outcomes
        .iter()
        .filter(|outcome| outcome.ending == Ending::Pass);
    let passed = passed.count();
    if passed < outcomes.len() {
        println!("\nnot passed:");
        for outcome in outcomes
            .iter()
            .filter(|outcome| outcome.ending != Ending::Pass)
        {
            println!("  {outcome}");
        }
        println!("logs: {}", bench.logs().display());
    }
    println!("passed {passed} of {}", outcomes.len());
    if passed == outcomes.len() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
