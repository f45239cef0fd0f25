//! `cargo xtask bench codec`: compressed and encrypted images beside `qemu-img convert`.
//!
//! `row` has what is measured and what is expected, `content` makes what is copied, `convert` is our side, a process of its own, and
//! `rival` is QEMU's. `table` shows the outcome.

mod content;
mod convert;
mod rival;
mod row;
mod table;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qcow2_io::codec::{Codec, Level};
use serde::Serialize;

use self::rival::Rival;
use self::row::{Files, ROWS, Row};
use super::measure::{self, median};
use super::place;
use crate::cargo::has_program;

pub(super) use convert::{Args as ConvertArgs, run as convert};

/// Copy between raw, compressed and encrypted images, side by side with qemu-img convert
///
/// Each row is one conversion of the same disk, by us and by QEMU in turn, in memory: whole processes, from start to end. QEMU
/// runs with the number of coroutines that is best for it. Times are medians; the ratio is the median of those of all turns. The program
/// is only as fast as it was built; `cargo xtask` builds with optimization.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this row; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Turns
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Size of the disk in MiB; up to five times as much room is needed
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,

    /// Compress with this level of ours, in rows that compress [default: that of the codec]
    #[arg(long, value_name = "N")]
    level: Option<i32>,

    /// Threads of ours [default: one for each processor]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,

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
    ours: Vec<f64>,
    rivals: Vec<f64>,
    /// Coroutines of the rival.
    coroutines: u32,
    ours_median: f64,
    rival_median: f64,
    /// The median of the ratios of all turns.
    ratio: f64,
    /// Least ratio expected.
    goal: f64,
    keeps_ratio: bool,
    /// Bytes of the files written, where it matters.
    sizes: Option<Sizes>,
}

/// Lengths of the files that were written; bytes.
#[derive(Debug, Serialize)]
struct Sizes {
    ours: u64,
    rivals: u64,
}

impl Sizes {
    /// Whether ours is no larger.
    fn is_kept(&self) -> bool {
        self.ours <= self.rivals
    }
}

/// Measures what was asked for.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let rows = selected(&args.only)?;
    if args.list {
        for row in &rows {
            println!("{:<16} >={:<5} {}", row.name, row.goal, row.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        has_program("qemu-img"),
        "qemu-img not found: there is nothing to compare with"
    );
    for codec in rows.iter().filter_map(|row| row.codec()) {
        level(args.level, codec)?;
    }
    if cfg!(debug_assertions) {
        println!("this program was built without optimization: the times say little");
    }
    let dir = args.dir.clone().unwrap_or_else(place::default_dir);
    let len = args.size << 20;
    let folder = place::folder(&dir, len.saturating_mul(5))?;
    let files = Files::make(folder.path(), len)?;
    let mut outcomes = Vec::new();
    println!("{}", table::heading());
    for row in rows {
        let outcome = measured(row, args, &files).with_context(|| row.name.to_owned())?;
        println!("{}", table::row(&outcome));
        outcomes.push(outcome);
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&outcomes)?;
        fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The level for a codec.
fn level(level: Option<i32>, codec: Codec) -> Result<Level> {
    Ok(match level {
        Some(level) => Level::new(codec, level)?,
        None => Level::default(),
    })
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
fn measured(row: &Row, args: &Args, files: &Files) -> Result<Outcome> {
    let source = row.source(files)?;
    let rival = Rival::best(row, &source, files)?;
    let own = env::current_exe().context("this program's own file")?;
    let ours = || {
        let mut command = Command::new(&own);
        command.args(["bench", "convert"]).args(row.own_args(files));
        if let (Some(level), Some(_)) = (args.level, row.codec()) {
            command.arg(format!("--level={level}"));
        }
        command.arg(format!("--threads={}", args.threads));
        command.arg(&source).arg(files.ours());
        timed(command, &files.ours())
    };
    let theirs = || timed(rival.command(row, &source, files), &files.rivals());
    // Both once, so that their files can be compared, and all is in the caches.
    let (_, _) = (ours()?, theirs()?);
    rival::compare(row, files)?;
    let mut times = (Vec::new(), Vec::new());
    for turn in 0..args.runs {
        if turn % 2 == 0 {
            times.0.push(ours()?);
            times.1.push(theirs()?);
        } else {
            times.1.push(theirs()?);
            times.0.push(ours()?);
        }
    }
    let sizes = Sizes {
        ours: fs::metadata(files.ours())?.len(),
        rivals: fs::metadata(files.rivals())?.len(),
    };
    for file in [files.ours(), files.rivals(), files.source_made()] {
        remove(&file)?;
    }
    let (ours, rivals) = times;
    let ratios: Vec<f64> = ours.iter().zip(&rivals).map(|(a, b)| b / a).collect();
    let ratio = median(&ratios);
    Ok(Outcome {
        name: row.name,
        coroutines: rival.coroutines,
        ours_median: median(&ours),
        rival_median: median(&rivals),
        ratio,
        goal: row.goal,
        keeps_ratio: ratio >= row.goal,
        sizes: row.writes_image().then_some(sizes),
        ours,
        rivals,
    })
}

/// Runs a process that writes a file, which is not there before; tells how many seconds it took.
fn timed(mut command: Command, file: &Path) -> Result<f64> {
    remove(file)?;
    let run = measure::run(&mut command, Duration::MAX)?;
    ensure!(run.exit == Some(0), "{command:?} failed");
    Ok(run.elapsed.as_secs_f64())
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
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
        assert_eq!(names(&[]).unwrap().len(), ROWS.len());
        assert_eq!(names(&["luks-read"]).unwrap(), ["luks-read"]);
        assert!(names(&["luks-reed"]).is_err());
    }

    #[test]
    fn a_file_that_is_no_larger_keeps_its_goal() {
        let sizes = |ours, rivals| Sizes { ours, rivals };
        assert!(sizes(5, 5).is_kept());
        assert!(!sizes(6, 5).is_kept());
    }
}
