//! Many programs on all cores, each judged by a function.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use qcow2_image::testing::{Failure, Program, catch, shrink, silence_panics};

/// How often a failing program is run to make it smaller.
const SHRINK_RUNS: usize = 400;

/// After this long a program counts as one that hangs, and is named.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that failed.
pub(crate) struct Failed {
    seed: u64,
    failure: Failure,
    /// As small as it got, and what it says then.
    small: Option<(Program, Failure)>,
}

/// What is to be run.
pub(crate) struct Plan<M, J> {
    /// The first seed; the others follow.
    pub(crate) seed: u64,
    /// How many.
    pub(crate) programs: u64,
    /// At once.
    pub(crate) jobs: usize,
    /// Ends after so many failures.
    pub(crate) max_failures: usize,
    /// Whether to make failing programs small.
    pub(crate) shrink: bool,
    /// The program of a seed.
    pub(crate) make: M,
    /// Judges a program, in an empty folder. Gives a count of what was looked at.
    pub(crate) judge: J,
}

/// What came of it.
pub(crate) struct Summary {
    pub(crate) programs: u64,
    pub(crate) counted: u64,
    pub(crate) failed: Vec<Failed>,
    pub(crate) time: Duration,
}

impl<M, J> Plan<M, J>
where
    M: Fn(u64) -> Program + Sync,
    J: Fn(&Program, &Path) -> std::result::Result<u64, Failure> + Sync,
{
    /// Runs all of them.
    pub(crate) fn run(&self) -> Result<Summary> {
        // A panic is told with its program.
        silence_panics();
        let start = Instant::now();
        let next = AtomicU64::new(0);
        let done = AtomicU64::new(0);
        let counted = AtomicU64::new(0);
        let failed = Mutex::new(Vec::new());
        let running: Vec<Mutex<Option<(u64, Instant)>>> =
            (0..self.jobs).map(|_| Mutex::new(None)).collect();
        let bar = bar(self.programs);
        let is_over = || {
            done.load(Ordering::Relaxed) >= self.programs
                || lock(&failed).len() >= self.max_failures
        };
        let folders = (0..self.jobs)
            .map(|_| scratch())
            .collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for (slot, folder) in running.iter().zip(&folders) {
                let (next, done, counted) = (&next, &done, &counted);
                let (failed, bar) = (&failed, &bar);
                scope.spawn(move || {
                    while lock(failed).len() < self.max_failures {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= self.programs {
                            break;
                        }
                        let seed = self.seed.wrapping_add(number);
                        *lock(slot) = Some((seed, Instant::now()));
                        match self.one(seed, folder.path()) {
                            Ok(count) => _ = counted.fetch_add(count, Ordering::Relaxed),
                            Err(one) => {
                                let words = one.words();
                                bar.suspend(|| println!("{words}"));
                                lock(failed).push(*one);
                            }
                        }
                        *lock(slot) = None;
                        done.fetch_add(1, Ordering::Relaxed);
                        bar.inc(1);
                    }
                });
            }
            scope.spawn(|| watch(&running, &bar, is_over));
        });
        bar.finish_and_clear();
        Ok(Summary {
            programs: done.into_inner(),
            counted: counted.into_inner(),
            failed: failed.into_inner().expect("no worker panics with the lock"),
            time: start.elapsed(),
        })
    }

    fn one(&self, seed: u64, folder: &Path) -> std::result::Result<u64, Box<Failed>> {
        let judge = |program: &Program| {
            empty(folder)?;
            catch(|| (self.judge)(program, folder))
        };
        let program = (self.make)(seed);
        let failure = match judge(&program) {
            Ok(count) => return Ok(count),
            Err(failure) => failure,
        };
        let small = self.shrink.then(|| {
            let small = shrink(&program, SHRINK_RUNS, |program| judge(program).is_err());
            let failure = judge(&small).err().unwrap_or_else(|| failure.clone());
            (small, failure)
        });
        Err(Box::new(Failed {
            seed,
            failure,
            small,
        }))
    }
}

impl Failed {
    /// All that is known about it.
    pub(crate) fn words(&self) -> String {
        let mut words = format!("seed {}: {}", self.seed, self.failure);
        if let Some((program, failure)) = &self.small {
            _ = write!(words, "\n  shrunk: {failure}\n  {:?}", program.shape);
            for (number, action) in program.actions.iter().enumerate() {
                _ = write!(words, "\n  {number}: {action:?}");
            }
        }
        words
    }
}

impl Summary {
    /// The last words of a command; tells whether all is well.
    pub(crate) fn print(&self, what: &str, unit: &str) -> bool {
        println!(
            "{what}: {} programs, {} {unit}, {} failures, {:.1} s",
            self.programs,
            self.counted,
            self.failed.len(),
            self.time.as_secs_f64(),
        );
        if !self.failed.is_empty() {
            let mut seeds: Vec<u64> = self.failed.iter().map(|failed| failed.seed).collect();
            seeds.sort_unstable();
            println!("failed seeds: {seeds:?}");
        }
        self.failed.is_empty()
    }
}

/// Names programs that take very long, each once.
fn watch(running: &[Mutex<Option<(u64, Instant)>>], bar: &ProgressBar, is_over: impl Fn() -> bool) {
    let mut named = Vec::new();
    let mut told = Instant::now();
    while !is_over() {
        // Where nobody sees the bar.
        if bar.is_hidden() && told.elapsed() > PATIENCE / 4 {
            told = Instant::now();
            println!(
                "{} of {} programs",
                bar.position(),
                bar.length().unwrap_or(0)
            );
        }
        thread::sleep(Duration::from_millis(200));
        for slot in running {
            if let Some((seed, since)) = *lock(slot)
                && since.elapsed() > PATIENCE
                && !named.contains(&seed)
            {
                named.push(seed);
                bar.suspend(|| println!("seed {seed} has been running for a minute"));
            }
        }
    }
}

fn bar(programs: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} {pos}/{len} {wide_bar} {eta} left");
    let bar = ProgressBar::new(programs);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A folder in memory, where the system has a place for that.
fn scratch() -> Result<tempfile::TempDir> {
    let shared = PathBuf::from("/dev/shm");
    let named = || tempfile::Builder::new().prefix("qcow2-soak-").to_owned();
    named()
        .tempdir_in(shared)
        .or_else(|_| named().tempdir())
        .context("no folder for temporary files")
}

fn empty(folder: &Path) -> std::result::Result<(), Failure> {
    let told = |error: std::io::Error| Failure::of("the temporary folder", &error);
    for entry in fs::read_dir(folder).map_err(told)? {
        fs::remove_file(entry.map_err(told)?.path()).map_err(told)?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no worker panics with the lock")
}
