//! `cargo xtask test`: doctests, schedules, then every test of the workspace, and what did not run.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cargo::{cargo, has_program, has_subcommand, workspace_root};

/// Programs that some tests compare this project with.
const QEMU_TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

/// When set, a test that needs one of [`QEMU_TOOLS`] fails without it; when not, it says so and passes.
const REQUIRE_QEMU: &str = "QCOW2_REQUIRE_QEMU";

/// The part of a test's path that marks it as needing [`QEMU_TOOLS`].
const NEEDS_QEMU: &str = "qemu";

/// Run every test of the workspace
///
/// Doctests come first, then schedules of threads that a deterministic scheduler explores, then all others, with cargo-nextest where it is installed and with `cargo test` elsewhere. Both
/// run to the end, and what failed is named. Tests that compare with QEMU skip themselves where its tools are missing;
/// with QCOW2_REQUIRE_QEMU=1 in the environment (or CI set) they fail instead.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Arguments for the test runner, such as a test's name or `-p qcow2-io`; doctests are left out then
    #[arg(last = true)]
    extra: Vec<String>,
}

/// Runs all steps, whatever the ones before gave, and names those that failed.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let nextest = has_subcommand("nextest");
    if !nextest {
        println!(
            "cargo-nextest is not installed, so this is cargo test: one binary after the other"
        );
    }
    let missing: Vec<_> = QEMU_TOOLS
        .into_iter()
        .filter(|tool| !has_program(tool))
        .collect();
    if !missing.is_empty() {
        report_missing(&missing);
    }

    let mut failed = Vec::new();
    let mut step = |name, command: &mut Command| -> Result<()> {
        let status = command
            .status()
            .with_context(|| format!("{name} could not start"))?;
        if !status.success() {
            failed.push(name);
        }
        Ok(())
    };
    if args.extra.is_empty() {
        step(
            "doctests",
            cargo().args([
                "test",
                "--doc",
                "--quiet",
                "--workspace",
                "--all-features",
                "--no-fail-fast",
            ]),
        )?;
    }
    if args.extra.is_empty() {
        step("schedules", &mut schedules())?;
    }
    // Last, so that the runner's summary is the last thing on the screen.
    step("tests", &mut runner(nextest, &args.extra))?;

    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// The command that explores schedules. It builds with locks of its own, in a folder of its own, so that the other builds stay.
fn schedules() -> Command {
    let mut flags = env::var_os("RUSTFLAGS").unwrap_or_default();
    flags.push(" --cfg shuttle");
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let mut command = cargo();
    command
        .args(["test", "--quiet", "--no-fail-fast", "--test", "shuttle"])
        .args([
            "-p",
            "qcow2-cache",
            "-p",
            "qcow2-alloc",
            "-p",
            "qcow2-image",
        ])
        .arg("--target-dir")
        .arg(target.join("shuttle"))
        .env("RUSTFLAGS", flags);
    command
}

/// The command that runs all but the doctests.
fn runner(nextest: bool, extra: &[String]) -> Command {
    let mut command = cargo();
    if nextest {
        command.args(["nextest", "run", "--all-features", "--no-fail-fast"]);
    } else {
        command.args(["test", "--all-features", "--no-fail-fast"]);
        command.args(["--lib", "--bins", "--tests", "--examples"]);
    }
    if !extra
        .iter()
        .any(|arg| arg.starts_with("-p") || arg.starts_with("--package"))
    {
        command.arg("--workspace");
    }
    if env::var_os("CI").is_some() && env::var_os(REQUIRE_QEMU).is_none() {
        command.env(REQUIRE_QEMU, "1");
    }
    command.args(extra);
    command
}

/// Says what is missing and what that costs.
fn report_missing(tools: &[&str]) {
    let tools = tools.join(" and ");
    let count = count_tests_that_need_qemu().map_or_else(String::new, |count| format!("{count} "));
    println!("{tools} missing: {count}tests that compare with QEMU skip themselves");
    println!("(Debian and Ubuntu have the tools in the package qemu-utils)");
}

/// How many tests have [`NEEDS_QEMU`] in their path; nothing where the list can't be had, such as when tests don't build.
fn count_tests_that_need_qemu() -> Option<usize> {
    let listing = cargo()
        .args(["test", "--quiet", "--workspace", "--all-features"])
        .args(["--lib", "--bins", "--tests", "--", "--list", NEEDS_QEMU])
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let names = String::from_utf8_lossy(&listing.stdout);
    Some(
        names
            .lines()
            .filter(|line| line.ends_with(": test"))
            .count(),
    )
}
