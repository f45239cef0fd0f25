//! `cargo xtask bench io`: the virtual disk beside plain files and `qemu-img bench`.
//!
//! `row` has what is measured and what is expected. `in_place`, `batch`, `cold`, `first`, `open` and `scale` measure it, by means of `work`
//! (requests on any number of threads), `clock` (which time counts), `disk` (what they go to) and `qemu`. `samples` takes turns, `table` shows
//! the outcome.

mod batch;
mod clock;
mod cold;
mod disk;
mod first;
mod in_place;
mod open;
mod qemu;
mod row;
mod samples;
mod scale;
mod table;
mod work;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::clock::Clock;
use self::row::{Goal, ROWS, Row};
use self::samples::Samples;
use super::measure::median;
use super::place;
use crate::cargo::has_program;

/// Read and write images, side by side with plain files and qemu-img bench
///
/// Each row is one kind of request, made by us and by a rival in turn, on files of the same content in memory. The rates
/// are medians; the ratio is the median of those of all turns, with the middle half of them beside it: where that is wide, the machine
/// was busy. The program is only as fast as it was built; `cargo xtask` builds with optimization.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this row; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Turns against qemu-img; those that take milliseconds are repeated more often
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Where the files are made, up to 3 GiB at a time [default: /dev/shm if there is one, else the temporary folder]
    #[arg(long)]
    dir: Option<PathBuf>,

    /// Where files are made that are to lie on a disk [default: the temporary folder]
    #[arg(long, value_name = "DIR")]
    disk_dir: Option<PathBuf>,

    /// Count what the threads spend on processors instead of the time that goes by, except in rows with qemu-img or a helper thread: for busy machines
    #[arg(long)]
    cpu_time: bool,

    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Name the rows and what is expected of them
    #[arg(long)]
    list: bool,
}

/// Where and how often a row is measured.
struct Setting {
    /// An empty folder for the files, in memory.
    dir: PathBuf,
    /// A folder on a disk.
    disk_dir: PathBuf,
    /// Turns for what takes seconds.
    runs: u32,
    /// For rows without QEMU and helper threads, whose time is that of the clock on the wall.
    clock: Clock,
}

impl Setting {
    /// Turns for what takes milliseconds.
    fn short_runs(&self) -> u32 {
        self.runs * 8
    }
}

/// What was measured in one row.
#[derive(Debug, Serialize)]
struct Outcome {
    name: &'static str,
    rival: Option<&'static str>,
    #[serde(flatten)]
    samples: Samples,
    ours_median: f64,
    rival_median: Option<f64>,
    /// The median of the ratios of all turns.
    ratio: Option<f64>,
    goal: Goal,
    is_kept: Option<bool>,
}

impl Outcome {
    fn new(row: &Row, samples: Samples) -> Self {
        let ours_median = median(&samples.ours);
        let ratio = (!samples.rival.is_empty()).then(|| median(&samples.ratios()));
        Self {
            name: row.name,
            rival: row.rival,
            ours_median,
            rival_median: ratio.map(|_| median(&samples.rival)),
            ratio,
            is_kept: row.goal.is_kept(ratio, ours_median),
            goal: row.goal,
            samples,
        }
    }
}

/// Measures what was asked for.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let rows = selected(&args.only)?;
    if args.list {
        for row in &rows {
            println!("{:<20} {:<12} {}", row.name, row.goal.to_string(), row.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        rows.iter().all(|row| !row.needs_qemu()) || has_program("qemu-img"),
        "qemu-img not found: select rows that don't need it (--list, --only)"
    );
    if cfg!(debug_assertions) {
        println!("this program was built without optimization: the rates say little");
    }
    let dir = args.dir.clone().unwrap_or_else(place::default_dir);
    let disk_dir = args.disk_dir.clone().unwrap_or_else(env::temp_dir);
    let mut outcomes = Vec::new();
    println!("{}", table::heading());
    for row in rows {
        let outcome = measured(row, args, &dir, &disk_dir).with_context(|| row.name.to_owned())?;
        println!("{}", table::row(&outcome));
        outcomes.push(outcome);
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&outcomes)?;
        fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn selected(only: &[String]) -> Result<Vec<&'static Row>> {
    if let Some(unknown) = only
        .iter()
        .find(|name| ROWS.iter().all(|row| row.name != **name))
    {
        let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        bail!("no row is called {unknown}; there are {}", names.join(", "));
    }
    Ok(ROWS
        .iter()
        .filter(|row| only.is_empty() || only.iter().any(|name| name == row.name))
        .collect())
}

/// Measures one row, and leaves nothing behind.
fn measured(row: &Row, args: &Args, dir: &Path, disk_dir: &Path) -> Result<Outcome> {
    let folder = place::folder(dir, row.dir_bytes)?;
    let on_disk = place::folder(disk_dir, row.disk_bytes)?;
    let setting = Setting {
        dir: folder.path().to_owned(),
        disk_dir: on_disk.path().to_owned(),
        runs: args.runs,
        clock: if args.cpu_time {
            Clock::Cpu
        } else {
            Clock::Wall
        },
    };
    let samples = (row.measure)(&setting)?;
    Ok(Outcome::new(row, samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_selects_its_row_and_an_unknown_one_is_refused() {
        let names = |only: &[&str]| {
            let only: Vec<_> = only.iter().map(ToString::to_string).collect();
            selected(&only).map(|rows| rows.iter().map(|row| row.name).collect::<Vec<_>>())
        };
        let mut all = names(&[]).unwrap();
        assert_eq!(names(&["read-4k"]).unwrap(), ["read-4k"]);
        assert!(names(&["read-5k"]).is_err());
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), ROWS.len());
    }
}
