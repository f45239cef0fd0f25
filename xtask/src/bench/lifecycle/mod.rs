//! `cargo xtask bench lifecycle`: whole operations on images, beside qemu-img or a plain copy.
//!
//! `row` has what is measured and what is expected, `scene` makes the images for it, `step` is our side, a process of its own, and
//! `rival` the other. `table` shows the outcome.

mod rival;
mod row;
mod scene;
mod step;
mod table;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::row::{ROWS, Rival, Row};
use self::scene::{Scene, Sizes};
use super::measure::{self, median};
use super::place;
use crate::cargo::has_program;

pub(super) use step::{Args as StepArgs, run as step};

/// Take snapshots, resize, map, measure, compare, convert, commit and rebase, side by side with qemu-img
///
/// Each row is one operation, done by us and by a rival in turn on images that were made anew, in memory: whole processes, from
/// start to end. The rival is qemu-img, and for conversions of uncompressed data cp as well. Times are medians; the ratio is
/// the median of those of all turns. The program is only as fast as it was built; `cargo xtask` builds with optimization.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this row; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Turns
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Size of the disks of which only the metadata counts, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,

    /// Size of the disk that is shrunk to a quarter, in GiB; the time that qemu-img takes grows with its square
    #[arg(long, value_name = "GIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=65536))]
    shrink_size: u64,

    /// Size of the disks whose data counts, in MiB; up to four times as much room is needed
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65536))]
    data_size: u64,

    /// Where the files are made [default: /dev/shm if there is one, else the temporary folder]
    #[arg(long)]
    dir: Option<PathBuf>,

    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Name the rows and what is expected of them
    #[arg(long)]
    list: bool,
}

/// What was measured in one row. Times are in seconds.
#[derive(Debug, Serialize)]
struct Outcome {
    name: &'static str,
    rival: &'static str,
    ours: Vec<f64>,
    rivals: Vec<f64>,
    ours_median: f64,
    rival_median: f64,
    /// The median of the ratios of all turns.
    ratio: f64,
    /// Least ratio expected.
    goal: f64,
    keeps_goal: bool,
}

/// Measures what was asked for.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let rows = selected(&args.only)?;
    if args.list {
        for row in &rows {
            println!("{:<22} >={:<5} {}", row.name, row.goal, row.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    for program in ["qemu-img", "cp"] {
        ensure!(
            has_program(program),
            "{program} not found: there is nothing to compare with"
        );
    }
    if cfg!(debug_assertions) {
        println!("this program was built without optimization: the times say little");
    }
    let dir = args.dir.clone().unwrap_or_else(place::default_dir);
    let sizes = Sizes {
        metadata: args.size << 30,
        shrink: args.shrink_size << 30,
        data: args.data_size << 20,
    };
    let mut outcomes = Vec::new();
    println!("{}", table::heading());
    for row in rows {
        let outcome = measured(row, args, &dir, sizes).with_context(|| row.name.to_owned())?;
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
    let unknown = only
        .iter()
        .find(|name| ROWS.iter().all(|row| row.name != **name));
    if let Some(unknown) = unknown {
        let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        bail!("no row is called {unknown}; there are {}", names.join(", "));
    }
    let is_wanted = |row: &&Row| only.is_empty() || only.iter().any(|name| name == row.name);
    Ok(ROWS.iter().filter(is_wanted).collect())
}

/// Runs both sides in turn, each time on new images.
fn measured(row: &Row, args: &Args, dir: &Path, sizes: Sizes) -> Result<Outcome> {
    let folder = place::folder(dir, row.needed(sizes))?;
    let own = env::current_exe().context("this program's own file")?;
    let (mut own_times, mut rivals, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let scene = Scene::make(row.stage, folder.path(), sizes)?;
    for turn in 0..args.runs {
        let ours = || timed(step::command(&own, row.step, &scene), row, None, &scene);
        let rival = || {
            let command = rival::command(row.rival, row.step, &scene);
            timed(command, row, Some(row.rival), &scene)
        };
        let times = if turn % 2 == 0 {
            let ours = ours()?;
            [ours, rival()?]
        } else {
            let rival = rival()?;
            [ours()?, rival]
        };
        let [own_time, rival_time] = times;
        own_times.push(own_time);
        rivals.push(rival_time);
        ratios.push(rival_time / own_time);
    }
    let ratio = median(&ratios);
    Ok(Outcome {
        name: row.name,
        rival: row.rival.name(),
        ours_median: median(&own_times),
        rival_median: median(&rivals),
        ours: own_times,
        rivals,
        ratio,
        goal: row.goal,
        keeps_goal: ratio >= row.goal,
    })
}

/// Sets the scene, and tells how long a process takes in it, in seconds.
fn timed(mut command: Command, row: &Row, rival: Option<Rival>, scene: &Scene) -> Result<f64> {
    scene.set()?;
    let run = measure::run(&mut command, Duration::MAX)?;
    ensure!(run.exit == Some(0), "{command:?} failed");
    scene.check(row.step, rival)?;
    Ok(run.elapsed.as_secs_f64())
}
