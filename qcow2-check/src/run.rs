//! One run of the checker: its options, its threads, and where findings go.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::report::{Collector, Counts};
use crate::threads::Threads;
use crate::{Code, Finding, Place, Severity};

/// A part of the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Phase {
    /// Header, snapshot table, bitmap directory, L1 tables.
    Tables,
    /// The reference walk over all L2 tables.
    References,
    /// Refcount blocks against references.
    Refcounts,
    /// Exact places of what the other phases only counted.
    Details,
    /// Decoding compressed clusters, where that was asked for. Begins anew for every few million of them.
    Content,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tables => "tables",
            Self::References => "references",
            Self::Refcounts => "refcounts",
            Self::Details => "details",
            Self::Content => "content",
        })
    }
}

/// Watches a check, and may end it. Called from any of the check's threads.
pub trait Monitor: Sync {
    /// A phase begins that will read about `bytes` bytes.
    fn phase(&self, phase: Phase, bytes: u64) {
        _ = (phase, bytes);
    }

    /// `bytes` bytes have been read since the check began.
    fn progress(&self, bytes: u64) {
        _ = bytes;
    }

    /// A finding that will be in the report; each as soon as its place in the order is known.
    fn finding(&self, finding: &Finding) {
        _ = finding;
    }

    /// Whether the check should end as soon as it can. Its report tells of the part done, and that it was cancelled.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// How to check.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Threads to work with; 0 means one for each core. Without the feature `parallel` it is always the caller's alone.
    pub threads: usize,
    /// Findings kept of each kind. All are counted; this bounds the memory a totally broken image takes.
    pub max_findings: usize,
    /// Who watches.
    pub monitor: Option<&'a dyn Monitor>,
    /// Whether [`check`](crate::check) and [`audit`](crate::audit) decode every compressed cluster, which takes as long as
    /// decoding all of the disk does. Whether this build can is a matter of its features `zlib` and `zstd`.
    pub deep: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            threads: 0,
            max_findings: 100,
            monitor: None,
            deep: false,
        }
    }
}

impl fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("threads", &self.threads)
            .field("max_findings", &self.max_findings)
            .field("deep", &self.deep)
            .finish_non_exhaustive()
    }
}

/// A check under way.
pub(crate) struct Run<'a> {
    threads: Threads<'a>,
    options: &'a Options<'a>,
    found: Mutex<Collector>,
    counts: Mutex<Counts>,
    as_written: bool,
}

impl<'a> Run<'a> {
    /// Runs `work` with threads at hand, and waits until they have ended. `None` if they can't be started.
    pub(crate) fn start<T>(options: &Options<'_>, work: impl FnOnce(Run<'_>) -> T) -> Option<T> {
        Threads::start(options.threads, |threads| work(Run::new(options, threads)))
    }

    fn new(options: &'a Options<'a>, threads: Threads<'a>) -> Self {
        Self {
            threads,
            options,
            found: Mutex::new(Collector::new(options.max_findings)),
            counts: Mutex::new(Counts::default()),
            as_written: false,
        }
    }

    /// A check of what is left of a snapshot table that goes beyond the limits, if what does so is left out.
    pub(crate) fn reading_as_written(mut self) -> Self {
        self.as_written = true;
        self
    }

    pub(crate) fn reads_as_written(&self) -> bool {
        self.as_written
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Runs `work` once on each thread, and gives all results.
    pub(crate) fn on_each_thread<T: Send>(&self, work: impl Fn() -> T + Sync) -> Vec<T> {
        self.threads.each(work)
    }

    /// Whether compressed clusters are to be decoded.
    pub(crate) fn is_deep(&self) -> bool {
        self.options.deep
    }

    pub(crate) fn limit(&self) -> usize {
        self.options.max_findings
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.options.monitor.is_some_and(Monitor::is_cancelled)
    }

    pub(crate) fn phase(&self, phase: Phase, bytes: u64) {
        if let Some(monitor) = self.options.monitor {
            monitor.phase(phase, bytes);
        }
    }

    pub(crate) fn progress(&self, bytes: u64) {
        if let Some(monitor) = self.options.monitor {
            monitor.progress(bytes);
        }
    }

    /// Counts as QEMU counts, and keeps a finding.
    pub(crate) fn find(&self, finding: Finding) {
        self.count(finding.code, finding.count);
        self.tell(finding);
    }

    /// Counts as QEMU counts, and keeps a finding that is made only if it is kept: where hostile images have millions.
    pub(crate) fn find_with(&self, code: Code, tell: impl FnOnce() -> (Place, String)) {
        self.count(code, 1);
        if self.found().wants(code) {
            let (place, detail) = tell();
            self.tell(Finding::new(code, place, detail));
        } else {
            self.found().pass_over(code, 1);
        }
    }

    fn count(&self, code: Code, count: u64) {
        if code.counted_by_qemu() {
            let mut counts = self.counts();
            let of = match code.severity() {
                Severity::Error => &mut counts.check_errors,
                Severity::Leak => &mut counts.leaks,
                _ => &mut counts.corruptions,
            };
            *of = of.saturating_add(count);
        }
    }

    /// Keeps a finding that is counted elsewhere, or that QEMU does not count.
    pub(crate) fn tell(&self, finding: Finding) {
        if let Some(monitor) = self.options.monitor {
            let copy = finding.clone();
            if self.found().add(finding) {
                monitor.finding(&copy);
            }
        } else {
            self.found().add(finding);
        }
    }

    /// Takes over the findings of a unit of work, whose counts are added elsewhere.
    pub(crate) fn append(&self, found: Collector) {
        self.found().append(found, |finding| {
            if let Some(monitor) = self.options.monitor {
                monitor.finding(finding);
            }
        });
    }

    /// How many findings of a kind there are up to now.
    pub(crate) fn total(&self, code: Code) -> u64 {
        self.found().total(code)
    }

    /// How many findings of a severity there are up to now.
    pub(crate) fn total_of(&self, severity: Severity) -> u64 {
        Code::ALL
            .iter()
            .filter(|code| code.severity() == severity)
            .fold(0, |sum, code| sum.saturating_add(self.total(*code)))
    }

    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self) -> MutexGuard<'_, Collector> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn finish(self) -> (Counts, Collector) {
        (
            self.counts
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
            self.found
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}
