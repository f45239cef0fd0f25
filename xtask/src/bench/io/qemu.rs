//! `qemu-img bench`, the rival.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bench::measure;

/// What `qemu-img bench` has under way at once by default.
pub(super) const DEPTH: u32 = 64;

/// Requests at regular distances, starting over behind the end of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bench {
    pub(super) write: bool,
    /// Requests in all.
    pub(super) count: u32,
    /// Bytes of each.
    pub(super) size: usize,
    /// From one to the next; bytes.
    pub(super) step: u64,
    /// How many QEMU has under way at once.
    pub(super) depth: u32,
}

impl Bench {
    /// Runs it with QEMU's defaults: write-back, its cache sizes, a pool of threads. Requests per second, as QEMU takes the
    /// time: neither opening nor closing counts.
    pub(super) fn rate(&self, image: &Path) -> Result<f64> {
        let mut command = Command::new("qemu-img");
        command.args(["bench", "-f", "qcow2"]);
        if self.write {
            command.args(["-w", "--pattern", "1"]);
        }
        command
            .args(["-c", &self.count.to_string()])
            .args(["-d", &self.depth.to_string()])
            .args(["-s", &self.size.to_string()])
            .args(["-S", &self.step.to_string()])
            .arg(image);
        let run = measure::run(&mut command, Duration::MAX)?;
        ensure!(run.exit == Some(0), "qemu-img bench failed");
        let took = seconds(&String::from_utf8_lossy(&run.stdout))
            .context("qemu-img bench tells no time")?;
        Ok(f64::from(self.count) / took)
    }

    /// Where the requests go on a disk of `len` bytes.
    pub(super) fn offsets(&self, len: u64) -> impl Iterator<Item = u64> {
        let (step, count) = (self.step, u64::from(self.count));
        (0..count).map(move |request| request * step % len)
    }
}

/// The time in the last line of the output.
fn seconds(stdout: &str) -> Option<f64> {
    let line = stdout.lines().last()?;
    let number = line
        .strip_prefix("Run completed in ")?
        .strip_suffix(" seconds.")?;
    number.parse().ok().filter(|seconds| *seconds > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_found() {
        let stdout = "Sending 9 read requests\nRun completed in 1.250 seconds.\n";
        assert_eq!(seconds(stdout), Some(1.25));
        assert_eq!(seconds("Run completed in 0.000 seconds.\n"), None);
        assert_eq!(seconds("Sending 9 read requests\n"), None);
        assert_eq!(seconds(""), None);
    }

    #[test]
    fn offsets_start_over_behind_the_end() {
        let bench = Bench {
            write: false,
            count: 4,
            size: 1,
            step: 3,
            depth: 1,
        };
        assert_eq!(bench.offsets(8).collect::<Vec<_>>(), [0, 3, 6, 1]);
    }
}
