//! What a check gives: counts as `qemu-img check` has them, and findings.

use crate::{Code, Finding, Place, Severity};

/// Counts with the meaning they have in `qemu-img check --output=json`; only what QEMU would count is in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct Counts {
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Corruptions.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub corruptions: u64,
    /// Clusters whose refcount is too high.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub leaks: u64,
    /// First byte behind the last cluster that has a refcount or a reference.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub total_clusters: u64,
    /// Clusters that the active tree maps, VM state among them.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub allocated_clusters: u64,
    /// Allocated clusters that don't follow their predecessor in the file.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "is_zero"))]
    pub compressed_clusters: u64,
}

#[cfg(feature = "serde")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The result of a check in one word; ordered from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Verdict {
    /// Nothing is wrong.
    Sound,
    /// Space is lost, nothing else.
    Leaks,
    /// Something is corrupt.
    Corrupt,
    /// The check could not be completed.
    Incomplete,
}

impl Verdict {
    /// The exit code `qemu-img check` has for it.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Sound => 0,
            Self::Leaks => 3,
            Self::Corrupt => 2,
            Self::Incomplete => 1,
        }
    }
}

/// What a check gives.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Counts as QEMU has them.
    pub counts: Counts,
    /// Findings kept, in an order that depends on the image only.
    pub findings: Vec<Finding>,
    /// How many there were of each kind, kept or not, in the order of the catalogue.
    pub totals: Vec<(Code, u64)>,
    /// Whether QEMU would have stopped before counting: it prints no counts then and exits with 1.
    pub fatal: bool,
    /// Whether the check was cancelled; all else tells of the part done.
    pub cancelled: bool,
    /// Whether the reference walk met nothing that could hide references. Only then is a leak surely a leak.
    pub complete: bool,
    /// Bytes of metadata read, and of compressed clusters if they were decoded.
    pub bytes_read: u64,
    /// Distinct pieces of compressed data decoded; `None` unless that was asked for.
    pub decoded: Option<u64>,
}

impl Report {
    /// How many findings of this kind there were.
    pub fn total(&self, code: Code) -> u64 {
        self.totals
            .iter()
            .find(|(c, _)| *c == code)
            .map_or(0, |(_, n)| *n)
    }

    /// How many findings there were of this severity.
    pub fn total_of(&self, severity: Severity) -> u64 {
        self.totals
            .iter()
            .filter(|(code, _)| code.severity() == severity)
            .fold(0, |sum, (_, n)| sum.saturating_add(*n))
    }

    /// Findings of this severity that QEMU's checker has no eye for.
    pub fn beyond_qemu(&self, severity: Severity) -> u64 {
        self.totals
            .iter()
            .filter(|(code, _)| code.severity() == severity && !code.counted_by_qemu())
            .fold(0, |sum, (_, n)| sum.saturating_add(*n))
    }

    /// The verdict `qemu-img check` would give on what it counts.
    pub const fn qemu_verdict(&self) -> Verdict {
        if self.fatal || self.counts.check_errors > 0 {
            Verdict::Incomplete
        } else if self.counts.corruptions > 0 {
            Verdict::Corrupt
        } else if self.counts.leaks > 0 {
            Verdict::Leaks
        } else {
            Verdict::Sound
        }
    }

    /// The verdict: QEMU's, or a worse one where a finding goes beyond it.
    pub fn verdict(&self) -> Verdict {
        let own = if self.cancelled || self.total_of(Severity::Error) > 0 {
            Verdict::Incomplete
        } else if self.total_of(Severity::Corruption) > 0 {
            Verdict::Corrupt
        } else if self.total_of(Severity::Leak) > 0 {
            Verdict::Leaks
        } else {
            Verdict::Sound
        };
        own.max(self.qemu_verdict())
    }
}

/// Takes findings in, keeps the first ones of each kind, counts them all.
#[derive(Debug)]
pub(crate) struct Collector {
    kept: Vec<Finding>,
    kept_of: Vec<usize>,
    totals: Vec<u64>,
    limit: usize,
}

impl Collector {
    pub(crate) fn new(limit: usize) -> Self {
        let kinds = Code::ALL.len();
        Self {
            kept: Vec::new(),
            kept_of: vec![0; kinds],
            totals: vec![0; kinds],
            limit,
        }
    }

    /// Counts `count` findings of a kind, and makes and keeps one that stands for them unless there are `limit` of its kind.
    pub(crate) fn add_with(
        &mut self,
        code: Code,
        count: u64,
        tell: impl FnOnce() -> (Place, String),
    ) {
        if self.wants(code) {
            let (place, detail) = tell();
            self.add(Finding::new(code, place, detail).times(count));
        } else {
            self.pass_over(code, count);
        }
    }

    /// Whether one more finding of a kind would be kept.
    pub(crate) fn wants(&self, code: Code) -> bool {
        let kept = self.kept_of.get(code as usize);
        kept.is_some_and(|kept| *kept < self.limit)
    }

    /// Counts findings that are not kept.
    pub(crate) fn pass_over(&mut self, code: Code, count: u64) {
        if let Some(total) = self.totals.get_mut(code as usize) {
            *total = total.saturating_add(count);
        }
    }

    /// Counts a finding and keeps it unless there are `limit` of its kind. Tells whether it was kept.
    pub(crate) fn add(&mut self, finding: Finding) -> bool {
        let kind = finding.code as usize;
        if let Some(total) = self.totals.get_mut(kind) {
            *total = total.saturating_add(finding.count);
        }
        match self.kept_of.get_mut(kind) {
            Some(kept) if *kept < self.limit => {
                *kept = kept.saturating_add(1);
                self.kept.push(finding);
                true
            }
            _ => false,
        }
    }

    /// Takes over what another collector has, behind what is here. Calls `kept` for each finding that stays.
    pub(crate) fn append(&mut self, other: Self, mut kept: impl FnMut(&Finding)) {
        let mut counted = vec![0_u64; self.totals.len()];
        for finding in other.kept {
            let kind = finding.code as usize;
            if let Some(n) = counted.get_mut(kind) {
                *n = n.saturating_add(finding.count);
            }
            let copy = finding.clone();
            if self.add(finding) {
                kept(&copy);
            }
        }
        // What the other one had counted without keeping it.
        for ((mine, theirs), counted) in self.totals.iter_mut().zip(other.totals).zip(counted) {
            *mine = mine.saturating_add(theirs.saturating_sub(counted));
        }
    }

    pub(crate) fn total(&self, code: Code) -> u64 {
        self.totals.get(code as usize).copied().unwrap_or(0)
    }

    pub(crate) fn finish(self) -> (Vec<Finding>, Vec<(Code, u64)>) {
        let totals = Code::ALL
            .iter()
            .copied()
            .zip(self.totals)
            .filter(|(_, n)| *n > 0)
            .collect();
        (self.kept, totals)
    }
}
