//! `cargo xtask bench repair`: leaked clusters, freed by `qemu-img check -r leaks` and by `check-image --repair leaks`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qcow2_check::synth;
use qcow2_io::FileOptions;
use serde::Serialize;

use super::measure::{self, median};
use super::place;
use super::table::seconds;
use crate::cargo::has_program;

const CLUSTER_BITS: u32 = 16;
/// What the file takes for each cluster: its refcount, twice with the undo file.
const BYTES_PER_CLUSTER: u64 = 4;
/// A run of QEMU's that takes longer is not repeated.
const QEMU_ONCE: Duration = Duration::from_secs(30);
/// How many times as fast a repair should be.
const BUDGET: f64 = 10.0;

/// Free leaked clusters, side by side with qemu-img check -r leaks
///
/// Writes an image of leaked clusters anew for each run and measures whole processes in turn. Ours writes an undo file
/// besides. Both must end well, and both checkers must call what is left clean.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leaked clusters; QEMU takes minutes for ten million
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    clusters: u64,

    /// Runs of each program
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// Where the image is made [default: /dev/shm if there is one, else the temporary folder]
    #[arg(long)]
    dir: Option<PathBuf>,

    /// End a run of qemu-img after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    qemu_limit: u64,

    /// Write all times to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was measured; seconds.
#[derive(Debug, Serialize)]
struct Outcome {
    clusters: u64,
    qemu: Vec<f64>,
    /// QEMU was ended before its time: its time and the ratio are lower bounds.
    qemu_timed_out: bool,
    ours: Vec<f64>,
    ratio: f64,
    peak_bytes: u64,
}

/// Measures.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        has_program("qemu-img"),
        "qemu-img not found: there is nothing to compare with"
    );
    if cfg!(debug_assertions) {
        println!("this program was built without optimization: the times say little");
    }
    let outcome = measured(args)?;
    let bound = if outcome.qemu_timed_out {
        "more than "
    } else {
        ""
    };
    println!(
        "{} leaked clusters: qemu-img {bound}{}, ours {}, {bound}{:.1} times as fast (goal: {BUDGET}), {} MiB of memory",
        outcome.clusters,
        seconds(median(&outcome.qemu)),
        seconds(median(&outcome.ours)),
        outcome.ratio,
        outcome.peak_bytes >> 20,
    );
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&outcome)?;
        fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measured(args: &Args) -> Result<Outcome> {
    let dir = args.dir.clone().unwrap_or_else(place::default_dir);
    let needed = args.clusters * BYTES_PER_CLUSTER + (16 << 20);
    let dir = place::folder(&dir, needed)?;
    let (image, undo) = (dir.path().join("image.qcow2"), dir.path().join("undo"));
    let own = env::current_exe().context("this program's own file")?;
    let ours = || {
        let mut command = Command::new(&own);
        command
            .args(["check-image", "--repair", "leaks", "--yes", "--quiet"])
            .arg("--undo-file")
            .args([&undo, &image]);
        command
    };
    let mut qemu = Command::new("qemu-img");
    qemu.args(["check", "-q", "-f", "qcow2", "-r", "leaks"])
        .arg(&image);

    write(args.clusters, &image, &undo)?;
    let peak_bytes = measure::peak_memory(&mut ours(), dir.path())?;
    let mut outcome = Outcome {
        clusters: args.clusters,
        qemu: Vec::new(),
        qemu_timed_out: false,
        ours: Vec::new(),
        ratio: 0.0,
        peak_bytes,
    };
    let limit = Duration::from_secs(args.qemu_limit);
    let mut repeat_qemu = true;
    for _ in 0..args.runs {
        write(args.clusters, &image, &undo)?;
        let run = measure::run(&mut ours(), Duration::MAX)?;
        ensure!(run.exit == Some(0), "our repair ends with {:?}", run.exit);
        outcome.ours.push(run.elapsed.as_secs_f64());
        ensure_clean(&image, &own)?;
        if repeat_qemu {
            write(args.clusters, &image, &undo)?;
            let run = measure::run(&mut qemu, limit)?;
            ensure!(
                run.timed_out || run.exit == Some(0),
                "QEMU's repair ends with {:?}",
                run.exit
            );
            outcome.qemu.push(run.elapsed.as_secs_f64());
            outcome.qemu_timed_out = run.timed_out;
            repeat_qemu = !run.timed_out && run.elapsed < QEMU_ONCE;
        }
    }
    outcome.ratio = median(&outcome.qemu) / median(&outcome.ours);
    Ok(outcome)
}

/// Writes the image, and does away with what the run before has left.
fn write(clusters: u64, image: &Path, undo: &Path) -> Result<()> {
    for path in [image, undo] {
        if path.exists() {
            fs::remove_file(path)?;
        }
    }
    let options = FileOptions::new().write(true).create_new(true);
    synth::leaked(&options.open(image)?, clusters, CLUSTER_BITS)?;
    Ok(())
}

fn ensure_clean(image: &Path, own: &Path) -> Result<()> {
    let mut theirs = Command::new("qemu-img");
    theirs.args(["check", "-q", "-f", "qcow2"]).arg(image);
    let mut ours = Command::new(own);
    ours.args(["check-image", "--quiet"]).arg(image);
    for command in [&mut theirs, &mut ours] {
        let run = measure::run(command, Duration::MAX)?;
        ensure!(run.exit == Some(0), "what our repair leaves is not clean");
    }
    Ok(())
}
