//! `cargo xtask fuzz`: seeds the corpora, runs libFuzzer on the targets, and keeps what breaks them.

mod corpus;
mod outcome;

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use qcow2_fuzz::{TARGETS, Target};

use crate::cargo::{cargo, has_program, has_subcommand};
use outcome::Outcome;

/// An input that takes more memory than this is a finding. libFuzzer's own limit is twice that.
const MEMORY_LIMIT_MIB: u32 = 1024;

/// An input that takes longer than this is a finding.
const INPUT_LIMIT_S: u32 = 10;

/// How many of a target's last lines are shown when it broke.
const LINES_SHOWN: usize = 60;

/// Fuzz the decoders and the checker
///
/// Runs one target, or all of them one after the other, for the given time each, and reports executions, coverage and
/// crashes. The stable toolchain is enough. Inputs that crash, hang or eat memory are saved in fuzz/regressions/, where
/// every later `cargo xtask test` replays them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The target to run; all of them if left out
    target: Option<String>,

    /// How long each target runs; seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    time: u64,

    /// How many targets run at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,

    /// List the targets, each with what it does
    #[arg(long)]
    list: bool,

    /// Don't fuzz: shrink the corpus, and every saved input that still breaks its target
    #[arg(long)]
    minimize: bool,

    /// What the compiler instruments for: `none` is faster, `address` also sees a single absurd allocation
    #[arg(long, default_value = "address", value_parser = ["address", "none"])]
    sanitizer: String,
}

/// Lists, minimizes or fuzzes; the exit code is a failure when a target broke.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let targets = select(args.target.as_deref())?;
    if args.list {
        for target in targets {
            println!("{:<16}{}", target.name, target.about);
        }
        return Ok(ExitCode::SUCCESS);
    }

    install()?;
    let fuzzer = Fuzzer {
        sanitizer: &args.sanitizer,
    };
    fuzzer.build(args.target.as_deref())?;
    for target in &targets {
        let count = corpus::write_seeds(target)?;
        println!("{}: {count} seeds", target.name);
    }
    if args.minimize {
        for target in &targets {
            fuzzer.minimize(target)?;
        }
        return Ok(ExitCode::SUCCESS);
    }

    let outcomes = fuzzer.fuzz_all(&targets, args.time, args.jobs)?;
    print!("{}", outcome::table(&outcomes));
    let broken = outcomes
        .iter()
        .any(|outcome| !outcome.reproducers.is_empty() || outcome.failure.is_some());
    Ok(if broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The target of that name, or all.
fn select(name: Option<&str>) -> Result<Vec<Target>> {
    let Some(name) = name else {
        return Ok(TARGETS.to_vec());
    };
    let target = TARGETS.into_iter().find(|target| target.name == name);
    target.map(|target| vec![target]).ok_or_else(|| {
        let known: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        anyhow!(
            "no fuzz target is called {name}; there are {}",
            known.join(", ")
        )
    })
}

/// Makes sure that cargo-fuzz and a C++ compiler are there.
fn install() -> Result<()> {
    ensure!(
        ["c++", "g++", "clang++"].into_iter().any(has_program),
        "libFuzzer needs a C++ compiler, and there is none (Debian and Ubuntu have one in the package g++)"
    );
    if has_subcommand("fuzz") {
        return Ok(());
    }
    println!("cargo-fuzz is missing: installing it with `cargo install cargo-fuzz --locked`");
    let status = cargo()
        .args(["install", "cargo-fuzz", "--locked"])
        .status()?;
    ensure!(status.success(), "cargo-fuzz could not be installed");
    Ok(())
}

/// cargo-fuzz with the settings that all its calls share.
struct Fuzzer<'a> {
    sanitizer: &'a str,
}

impl Fuzzer<'_> {
    /// `cargo fuzz VERB`, ready for the target's name and what follows it.
    fn cargo_fuzz(&self, verb: &str) -> Command {
        let mut command = cargo();
        command
            .args(["fuzz", verb, "--fuzz-dir", "fuzz"])
            // A folder for each: what one sanitizer compiled is of no use to another.
            .arg(format!("--target-dir=target/fuzz/{}", self.sanitizer))
            .arg(format!("--sanitizer={}", self.sanitizer))
            // Instrumentation needs compiler flags that only this opens on a stable toolchain.
            .env("RUSTC_BOOTSTRAP", "1")
            .stdin(Stdio::null());
        command
    }

    /// Builds one target or all, so that building doesn't count as fuzzing time.
    fn build(&self, target: Option<&str>) -> Result<()> {
        let status = self.cargo_fuzz("build").args(target).status()?;
        ensure!(status.success(), "the fuzz targets do not build");
        Ok(())
    }

    /// Fuzzes the targets for `seconds` each, `jobs` at once; the outcomes come in the targets' order.
    fn fuzz_all(&self, targets: &[Target], seconds: u64, jobs: u16) -> Result<Vec<Outcome>> {
        let next = AtomicUsize::new(0);
        let outcomes = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    while let Some((index, target)) = pick(targets, &next) {
                        let outcome = self.fuzz(target, seconds);
                        outcomes
                            .lock()
                            .expect("no worker panics with the lock")
                            .push((index, outcome));
                    }
                });
            }
        });
        let mut outcomes = outcomes
            .into_inner()
            .expect("no worker panics with the lock");
        outcomes.sort_by_key(|(index, _)| *index);
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }

    /// Fuzzes one target and saves what broke it.
    fn fuzz(&self, target: &Target, seconds: u64) -> Result<Outcome> {
        let before = corpus::artifacts(target)?;
        let mut child = self
            .cargo_fuzz("run")
            .arg(target.name)
            .arg(corpus::folder(target))
            .arg("--")
            .args(limits(target))
            .arg(format!("-max_total_time={seconds}"))
            .arg("-print_final_stats=1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cargo fuzz could not start")?;

        println!("{}: fuzzing for {seconds} s", target.name);
        let bar = spinner(target.name);
        let mut outcome = Outcome::new(target.name);
        let mut tail = VecDeque::with_capacity(LINES_SHOWN);
        let mut epilogue = false;
        let lines = BufReader::new(child.stderr.take().context("the fuzzer has no output")?);
        for line in lines.split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            // Behind this line cargo-fuzz repeats what libFuzzer said.
            epilogue |= line.starts_with('─');
            if outcome.read_line(&line) {
                bar.set_message(line);
            } else if !epilogue {
                if tail.len() == LINES_SHOWN {
                    tail.pop_front();
                }
                tail.push_back(line);
            }
        }
        bar.finish_and_clear();

        let status = child.wait()?;
        let made: Vec<_> = corpus::artifacts(target)?
            .into_iter()
            .filter(|path| !before.contains(path))
            .collect();
        for path in &made {
            outcome
                .reproducers
                .push(corpus::save_reproducer(target, path)?);
        }
        if !status.success() {
            for line in &tail {
                eprintln!("{}: {line}", target.name);
            }
            if made.is_empty() {
                outcome.failure = Some(status.to_string());
            }
        }
        Ok(outcome)
    }

    /// Shrinks the corpus to inputs that each add coverage, and each saved reproducer to a smaller one that still breaks.
    fn minimize(&self, target: &Target) -> Result<()> {
        let before = corpus::count(target)?;
        let status = self
            .cargo_fuzz("cmin")
            .arg(target.name)
            .arg(corpus::folder(target))
            .arg("--")
            .args(limits(target))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(
            status.success(),
            "{}: the corpus could not be minimized",
            target.name
        );
        println!(
            "{}: corpus of {before} inputs, now {}",
            target.name,
            corpus::count(target)?
        );

        for path in corpus::reproducers(target)? {
            if self.survives(target, &path)? {
                println!(
                    "{}: {} breaks it no more and stays as it is",
                    target.name,
                    path.display()
                );
                continue;
            }
            self.shrink(target, &path)?;
        }
        Ok(())
    }

    /// Whether one input runs to its end.
    fn survives(&self, target: &Target, input: &Path) -> Result<bool> {
        let mut command = self.cargo_fuzz("run");
        command
            .arg(target.name)
            .arg(input)
            .arg("--")
            .args(limits(target));
        Ok(command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?
            .success())
    }

    /// Replaces a reproducer with the smallest one that libFuzzer finds.
    fn shrink(&self, target: &Target, input: &Path) -> Result<()> {
        let before = corpus::artifacts(target)?;
        // Its exit code says how the last, smallest input failed, not whether shrinking went well.
        self.cargo_fuzz("tmin")
            .arg(target.name)
            .arg(input)
            .arg("--")
            .args(limits(target))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        let mut smaller: Vec<(u64, PathBuf)> = Vec::new();
        for path in corpus::artifacts(target)?
            .into_iter()
            .filter(|path| !before.contains(path))
        {
            smaller.push((path.metadata()?.len(), path));
        }
        let len_bytes = input.metadata()?.len();
        match smaller.into_iter().min() {
            Some((len, path)) if len < len_bytes => {
                if self.survives(target, &path)? {
                    bail!("{}: {} does not break it", target.name, path.display());
                }
                let saved = corpus::save_reproducer(target, &path)?;
                if saved.file_name() != input.file_name() {
                    fs::remove_file(input)?;
                }
                println!(
                    "{}: {len_bytes} bytes, now {len}: {}",
                    target.name,
                    saved.display()
                );
            }
            _ => println!(
                "{}: {} is as small as it gets",
                target.name,
                input.display()
            ),
        }
        Ok(())
    }
}

/// libFuzzer's limits for one input.
fn limits(target: &Target) -> [String; 4] {
    [
        format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"),
        format!("-timeout={INPUT_LIMIT_S}"),
        // Threads that have been waited for may still be taking their thread-local storage down, which looks like a leak.
        "-detect_leaks=0".to_owned(),
        format!("-max_len={}", target.max_len_bytes),
    ]
}

/// The next target that nobody has taken.
fn pick<'t>(targets: &'t [Target], next: &AtomicUsize) -> Option<(usize, &'t Target)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    targets.get(index).map(|target| (index, target))
}

/// What the fuzzer last said, on a terminal; nothing elsewhere.
fn spinner(name: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {elapsed} {wide_msg}")
        .expect("the template is valid");
    let bar = ProgressBar::new_spinner()
        .with_style(style)
        .with_prefix(name);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
