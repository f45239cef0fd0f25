//! `cargo xtask bench check`: `qemu-img check` and `check-image` on large images, and a mere reader beside them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qcow2_io::{FileOptions, Storage as _};
use serde::Serialize;
use serde_json::Value;

use super::case::{Budget, CASES, Case};
use super::measure::{self, median};
use super::place;
use super::table::{self, seconds};
use crate::cargo::has_program;

/// A run of QEMU's that takes longer is not repeated.
const QEMU_ONCE: Duration = Duration::from_secs(60);
/// Memory that a check may use beside what the clusters call for.
const FIXED_BYTES: u64 = 32 << 20;
/// The counts in which both programs must agree; one that is left out is 0.
const COUNTS: [&str; 8] = [
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
];

/// Check large images, side by side with qemu-img check
///
/// Writes one image after the other, metadata only, and measures whole processes in turn: qemu-img check, our
/// check-image, and a process that just reads the same metadata. Exit codes and counts must agree. Medians and ratios of this
/// one run are shown, with the budgets beside them. The program is only as fast as it was built; `cargo xtask` builds
/// with optimization.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this image; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Runs of each program on each image
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// Where the images are made, one at a time [default: /dev/shm if there is one, else the temporary folder]
    #[arg(long)]
    dir: Option<PathBuf>,

    /// End a run of qemu-img after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    qemu_limit: u64,

    /// Write all times to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Name the images and their budgets
    #[arg(long)]
    list: bool,
}

/// What was measured on one image. Times are in seconds.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) name: &'static str,
    pub(super) qemu: Vec<f64>,
    /// QEMU was ended before its time: its time and the ratio are lower bounds.
    pub(super) qemu_timed_out: bool,
    pub(super) ours: Vec<f64>,
    pub(super) read: Vec<f64>,
    /// Bytes of metadata that the reader read.
    pub(super) metadata_bytes: u64,
    pub(super) qemu_median: f64,
    pub(super) ours_median: f64,
    pub(super) read_median: f64,
    pub(super) ratio: f64,
    pub(super) times_reading: f64,
    pub(super) peak_bytes: u64,
    pub(super) peak_budget_bytes: u64,
    pub(super) budget: Budget,
}

impl Outcome {
    pub(super) fn keeps_ratio(&self) -> bool {
        self.ratio >= self.budget.faster_than_qemu
    }

    pub(super) fn keeps_reading(&self) -> bool {
        self.budget
            .times_reading
            .is_none_or(|most| self.times_reading <= most)
    }

    pub(super) fn keeps_memory(&self) -> bool {
        self.peak_bytes <= self.peak_budget_bytes
    }
}

/// Measures what was asked for.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let cases = selected(&args.only)?;
    if args.list {
        for case in &cases {
            let reading = match case.budget.times_reading {
                Some(most) => format!(", within {most} times just reading"),
                None => String::new(),
            };
            let ratio = case.budget.faster_than_qemu;
            println!("{:<20} {ratio} times qemu-img check{reading}", case.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        has_program("qemu-img"),
        "qemu-img not found: there is nothing to compare with"
    );
    if cfg!(debug_assertions) {
        println!("this program was built without optimization: the times say little");
    }
    let dir = args.dir.clone().unwrap_or_else(place::default_dir);
    let mut outcomes = Vec::new();
    println!("{}", table::heading());
    for case in cases {
        let outcome = measured(case, args, &dir).with_context(|| case.name.to_owned())?;
        println!("{}", table::row(&outcome));
        outcomes.push(outcome);
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&outcomes)?;
        fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn selected(only: &[String]) -> Result<Vec<&'static Case>> {
    if let Some(unknown) = only
        .iter()
        .find(|name| CASES.iter().all(|case| case.name != **name))
    {
        let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        bail!(
            "no image is called {unknown}; there are {}",
            names.join(", ")
        );
    }
    Ok(CASES
        .iter()
        .filter(|case| only.is_empty() || only.iter().any(|name| name == case.name))
        .collect())
}

/// Makes one image, measures, and leaves nothing behind.
fn measured(case: &Case, args: &Args, dir: &Path) -> Result<Outcome> {
    let dir = place::folder(dir, case.disk_bytes())?;
    let image = dir.path().join("image.qcow2");
    let started = Instant::now();
    {
        let options = FileOptions::new().write(true).create_new(true);
        let file = options.open(&image)?;
        case.write(&file)?;
        file.flush()?;
    }
    eprintln!(
        "{}: written in {}",
        case.name,
        seconds(started.elapsed().as_secs_f64())
    );

    let programs = Programs {
        own: env::current_exe().context("this program's own file")?,
        image,
    };
    let peak_bytes = measure::peak_memory(&mut programs.ours(), dir.path())?;
    let samples = Samples::take(&programs, args)?;
    let (qemu_median, ours_median) = (median(&samples.qemu), median(&samples.ours));
    let read_median = median(&samples.read);
    let clusters = samples.image_end >> case.cluster_bits();
    Ok(Outcome {
        name: case.name,
        qemu_timed_out: samples.qemu_timed_out,
        metadata_bytes: samples.metadata_bytes,
        qemu_median,
        ours_median,
        read_median,
        ratio: qemu_median / ours_median,
        times_reading: ours_median / read_median,
        peak_bytes,
        peak_budget_bytes: clusters / 4 + 8 * case.shared_clusters() + FIXED_BYTES,
        budget: case.budget,
        qemu: samples.qemu,
        ours: samples.ours,
        read: samples.read,
    })
}

/// The three processes that are measured.
struct Programs {
    own: PathBuf,
    image: PathBuf,
}

impl Programs {
    fn qemu(&self) -> Command {
        let mut command = Command::new("qemu-img");
        command
            .args(["check", "-f", "qcow2", "--output=json"])
            .arg(&self.image);
        command
    }

    fn ours(&self) -> Command {
        let mut command = Command::new(&self.own);
        command
            .args(["check-image", "--quiet", "--format", "json"])
            .arg(&self.image);
        command
    }

    fn read(&self) -> Command {
        let mut command = Command::new(&self.own);
        command.args(["bench", "read"]).arg(&self.image);
        command
    }
}

/// All times, in seconds.
#[derive(Default)]
struct Samples {
    qemu: Vec<f64>,
    qemu_timed_out: bool,
    ours: Vec<f64>,
    read: Vec<f64>,
    metadata_bytes: u64,
    /// The image's end as both programs tell it.
    image_end: u64,
}

impl Samples {
    /// Runs the programs in turn.
    fn take(programs: &Programs, args: &Args) -> Result<Self> {
        let limit = Duration::from_secs(args.qemu_limit);
        let mut samples = Self::default();
        let mut repeat_qemu = true;
        let mut expected = None;
        for _ in 0..args.runs {
            if repeat_qemu {
                let run = measure::run(&mut programs.qemu(), limit)?;
                samples.qemu.push(run.elapsed.as_secs_f64());
                samples.qemu_timed_out = run.timed_out;
                repeat_qemu = !run.timed_out && run.elapsed < QEMU_ONCE;
                if run.timed_out {
                    eprintln!("qemu-img was ended after {} s", limit.as_secs());
                } else if !repeat_qemu {
                    let took = seconds(run.elapsed.as_secs_f64());
                    eprintln!("qemu-img took {took} and is not run again");
                }
                if !run.timed_out {
                    expected = Some(judgement(&run)?);
                }
            }
            let run = measure::run(&mut programs.ours(), Duration::MAX)?;
            samples.ours.push(run.elapsed.as_secs_f64());
            let (exit, counts) = judgement(&run)?;
            if let Some(expected) = &expected {
                let (qemu_exit, qemu_counts) = expected;
                ensure!(
                    exit == *qemu_exit && counts == *qemu_counts,
                    "qemu-img exits with {qemu_exit} and counts {qemu_counts:?}; we exit with {exit} and count {counts:?}"
                );
            }
            let end = COUNTS.iter().position(|name| *name == "image-end-offset");
            let end = end.and_then(|index| counts.get(index));
            samples.image_end = end.copied().unwrap_or_default();

            let run = measure::run(&mut programs.read(), Duration::MAX)?;
            samples.read.push(run.elapsed.as_secs_f64());
            ensure!(run.exit == Some(0), "the reader failed");
            samples.metadata_bytes = String::from_utf8_lossy(&run.stdout).trim().parse()?;
        }
        Ok(samples)
    }
}

/// Exit code and [`COUNTS`] of a check.
fn judgement(run: &measure::Run) -> Result<(i32, Vec<u64>)> {
    let exit = run.exit.context("a check was ended by a signal")?;
    let json: Value = serde_json::from_slice(&run.stdout)
        .with_context(|| format!("a check that exited with {exit} told no counts"))?;
    let count = |name: &&str| json.get(*name).map_or(Some(0), Value::as_u64);
    let counts = COUNTS.iter().map(count).collect::<Option<_>>();
    Ok((exit, counts.context("a count is no number")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_selects_its_image_and_an_unknown_one_is_refused() {
        let names = |only: &[&str]| {
            let only: Vec<_> = only.iter().map(ToString::to_string).collect();
            selected(&only).map(|cases| cases.iter().map(|case| case.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), CASES.len());
        assert_eq!(names(&["random-16g"]).unwrap(), ["random-16g"]);
        assert!(names(&["random-17g"]).is_err());
    }

    #[test]
    fn counts_left_out_are_zero() {
        let run = |stdout: &str| measure::Run {
            elapsed: Duration::ZERO,
            exit: Some(3),
            stdout: stdout.into(),
            timed_out: false,
        };
        let (exit, counts) = judgement(&run(r#"{"check-errors": 0, "leaks": 2}"#)).unwrap();
        assert_eq!((exit, counts), (3, vec![0, 0, 2, 0, 0, 0, 0, 0]));
        assert!(judgement(&run("")).is_err());
        assert!(judgement(&run(r#"{"leaks": "2"}"#)).is_err());
    }
}
