//! Processes, timed from start to end.

use std::env;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Names a file to which this program writes its peak memory when it ends.
const PEAK_FILE: &str = "QCOW2_XTASK_PEAK_FILE";

/// What came of a process.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) elapsed: Duration,
    /// Nothing when a signal ended it.
    pub(super) exit: Option<i32>,
    pub(super) stdout: Vec<u8>,
    /// It took longer than allowed and was killed.
    pub(super) timed_out: bool,
}

/// Runs a process, for as long as `limit` allows. What it says to stderr is left out.
pub(super) fn run(command: &mut Command, limit: Duration) -> Result<Run> {
    let name = command.get_program().to_owned();
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{} could not start", name.display()))?;
    let Some(mut pipe) = child.stdout.take() else {
        bail!("{} has no output", name.display());
    };
    let child = &Mutex::new(child);
    let (ended, has_ended) = mpsc::channel::<()>();
    let mut stdout = Vec::new();
    let timed_out = thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let late = has_ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                // One that ended just now needs no killing.
                _ = with(child, Child::kill);
            }
            late
        });
        let read = pipe.read_to_end(&mut stdout);
        let status = with(child, Child::wait);
        drop(ended);
        let late = watchdog.join().unwrap_or(false);
        read.and(status).map(|status| (late, status))
    });
    let elapsed = started.elapsed();
    let (timed_out, status) = timed_out.with_context(|| format!("{}", name.display()))?;
    Ok(Run {
        elapsed,
        exit: status.code(),
        stdout,
        timed_out,
    })
}

fn with<T>(child: &Mutex<Child>, work: impl FnOnce(&mut Child) -> T) -> T {
    work(&mut child.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs this program as `command` has it, and tells the most memory it had; bytes.
pub(super) fn peak_memory(command: &mut Command, dir: &Path) -> Result<u64> {
    let file = dir.join("peak");
    run(command.env(PEAK_FILE, &file), Duration::MAX)?;
    let text = fs::read_to_string(&file).context("peak memory is not known")?;
    Ok(text.parse()?)
}

/// Tells the peak memory of this process to who asked for it in the environment. For the end of the program.
pub(crate) fn note_peak() {
    let Some(file) = env::var_os(PEAK_FILE) else {
        return;
    };
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    if let Some(kib) = peak {
        // Who asked will miss the file.
        _ = fs::write(file, (kib * 1024).to_string());
    }
}

/// The middle one of some durations in seconds, or the mean of the two in the middle; 0 of none.
pub(super) fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(0.0);
    f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }

    #[test]
    fn a_process_that_takes_too_long_is_ended() {
        let endless = || Command::new("sleep").arg("600").spawn();
        if let Ok(mut child) = endless() {
            child.kill().unwrap();
            child.wait().unwrap();
        } else {
            eprintln!("skipped: sleep not found");
            return;
        }
        let run = run(Command::new("sleep").arg("600"), Duration::from_millis(1)).unwrap();
        assert!(run.timed_out);
        assert_eq!(run.exit, None);
    }

    #[test]
    fn output_and_exit_code_are_kept() {
        let script = "echo heard; exit 3";
        let Ok(run) = run(Command::new("sh").args(["-c", script]), Duration::MAX) else {
            eprintln!("skipped: sh not found");
            return;
        };
        assert_eq!((run.exit, run.timed_out), (Some(3), false));
        assert_eq!(run.stdout, b"heard\n");
    }
}
