//! One test: run, ended if it takes too long, and judged by what the suite says of it.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::list::Entry;
use super::workbench::Workbench;

/// Marks all that a test starts, so that what it leaves behind can be ended.
const MARK: &str = "QCOW2_IOTESTS_RUN";

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Pass,
    Fail,
    NotRun,
}

/// A test, and how it ended.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) ending: Ending,
    why: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ending = match self.ending {
            Ending::Pass => "pass",
            Ending::Fail => "fail",
            Ending::NotRun => "not run",
        };
        write!(f, "{ending:<8}{}", self.name)?;
        match self.why.as_str() {
            "" => Ok(()),
            why => write!(f, "  ({why})"),
        }
    }
}

/// Runs a test.
pub(super) fn run(bench: &Workbench, entry: &Entry, more: &[String], limit: Duration) -> Outcome {
    let judged = try_run(bench, entry, more, limit);
    let (ending, why) = judged.unwrap_or_else(|error| (Ending::Fail, format!("{error:#}")));
    Outcome {
        name: [entry.section.as_slice(), std::slice::from_ref(&entry.name)]
            .concat()
            .join(" "),
        ending,
        why,
    }
}

fn try_run(
    bench: &Workbench,
    entry: &Entry,
    more: &[String],
    limit: Duration,
) -> Result<(Ending, String)> {
    let key = [entry.section.concat(), entry.name.clone()].concat();
    let key: String = key
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let scratch = bench.scratch(&key)?;
    let log = bench.logs().join(format!("{key}.log"));
    let out = File::create(&log).with_context(|| log.display().to_string())?;
    let mark = format!("{}-{key}", std::process::id());
    let format = entry
        .section
        .iter()
        .any(|word| word == "-qcow2" || word == "-raw");
    let mut command = Command::new("./check");
    command
        .current_dir(bench.build())
        .args((!format).then_some("-qcow2"))
        .args(&entry.section)
        .args(more.iter().flat_map(|words| words.split_whitespace()))
        .arg(&entry.name)
        .env(MARK, &mark)
        .env("TEST_DIR", &scratch)
        .env("SOCK_DIR", bench.sockets(&key))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    for (variable, name) in [
        ("QEMU_PROG", "qemu-system-x86_64"),
        ("QEMU_IMG_PROG", "qemu-img"),
        ("QEMU_IO_PROG", "qemu-io"),
        ("QEMU_NBD_PROG", "qemu-nbd"),
        ("QSD_PROG", "qemu-storage-daemon"),
    ] {
        command.env(variable, bench.program(name));
    }
    let child = command.spawn().context("the suite could not start")?;
    let in_time = wait(child, limit)?;
    reap(&mark);
    if !in_time {
        return Ok((
            Ending::Fail,
            format!("it took more than {} s", limit.as_secs()),
        ));
    }
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let (ending, why) = judge(&entry.name, &text);
    if ending == Ending::Fail
        && let Some(lines) = entry.lines
        && prefix_agrees(bench.suite(), &scratch, &entry.name, lines)
    {
        return Ok((Ending::Pass, format!("first {lines} lines")));
    }
    if ending == Ending::Pass {
        // What failed may be looked at.
        fs::remove_dir_all(&scratch).ok();
    }
    Ok((ending, why))
}

/// Whether it ended by itself.
fn wait(mut child: Child, limit: Duration) -> Result<bool> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}

/// Ends what a test has left behind.
fn reap(mark: &str) {
    let wanted = format!("{MARK}={mark}");
    let Ok(processes) = fs::read_dir("/proc") else {
        return;
    };
    for entry in processes.flatten() {
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .and_then(|name| name.parse().ok())
            .and_then(Pid::from_raw)
        else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment
            .split(|byte| *byte == 0)
            .any(|word| word == wanted.as_bytes())
        {
            // It may be gone by now.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// What the suite says of a test in the last line that begins with its name.
fn judge(name: &str, text: &str) -> (Ending, String) {
    let lines = text.split(['\n', '\r']);
    let verdict = lines
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(' ').then(|| rest.trim_start())
        })
        .rfind(|rest| {
            ["pass", "fail", "not run"]
                .iter()
                .any(|word| rest.starts_with(word))
        });
    let Some(verdict) = verdict else {
        let last = text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it said nothing");
        return (Ending::Fail, format!("the suite stopped: {last}"));
    };
    let why = |word: &str| {
        // Behind the word stand times; the reason is what follows the last of them.
        let rest = verdict.strip_prefix(word).unwrap_or_default();
        let at = rest
            .find("output mismatch")
            .map(|_| "the output differs".to_owned());
        at.unwrap_or_else(|| {
            let words = rest.split_whitespace();
            let rest: Vec<_> = words
                .skip_while(|word| {
                    word.starts_with('[') || word.ends_with("..") || word.ends_with('s')
                })
                .collect();
            rest.join(" ")
        })
    };
    if verdict.starts_with("pass") {
        (Ending::Pass, String::new())
    } else if verdict.starts_with("not run") {
        (Ending::NotRun, why("not run"))
    } else {
        (Ending::Fail, why("fail"))
    }
}

/// Whether the first lines of what a test printed are as expected, but for blanks at their ends.
fn prefix_agrees(suite: &Path, scratch: &Path, name: &str, lines: usize) -> bool {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let expected = ["", "tests/"].iter().find_map(|folder| {
        let path = suite.join(format!("{folder}{name}.out"));
        read(&suite.join(format!("{folder}{name}.out.qcow2"))).or_else(|| read(&path))
    });
    let found = fs::read_dir(scratch)
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|entry| read(&entry.path().join(format!("{name}.out.bad"))));
    let (Some(expected), Some(found)) = (expected, found) else {
        return false;
    };
    let first = |text: &str| -> Vec<String> {
        text.lines()
            .take(lines)
            .map(|line| line.trim_end().to_owned())
            .collect()
    };
    found.lines().count() >= lines && first(&expected) == first(&found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_verdict_on_a_test_counts() {
        let text = "QEMU -- x\n001   ...        [12:00:00]\r001   pass       [12:00:00] [12:00:01]   1.2s\nPassed all 1 iotests\n";
        assert_eq!(judge("001", text), (Ending::Pass, String::new()));
        let text = "024   fail       [12:00:00] [12:00:01]   1.2s                 output mismatch (see x)\n--- a\n+++ b\n";
        assert_eq!(
            judge("024", text),
            (Ending::Fail, "the output differs".to_owned())
        );
        let text = "005   not run    [12:00:00] [12:00:01]   ...     not suitable here\n";
        assert_eq!(
            judge("005", text),
            (Ending::NotRun, "not suitable here".to_owned())
        );
        assert_eq!(judge("1", "10   pass\n").0, Ending::Fail);
        assert_eq!(judge("1", "").1, "the suite stopped: it said nothing");
    }
}
