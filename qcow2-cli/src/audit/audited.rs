//! One image and all that was learned about it.

use std::path::PathBuf;
use std::time::Duration;

use qcow2_check::{Report, Severity, Verdict};
use serde::Serialize;

use super::facts::Facts;

/// What a hazard costs with `--deny-hazards`: the same as a corruption.
const HAZARD_EXIT_CODE: u8 = 2;

/// An image that was audited, or could not be.
#[derive(Debug)]
pub(crate) struct Audited {
    /// The name as the user, the folder or the chain gave it.
    pub(crate) name: PathBuf,
    /// Whether it starts as a qcow2 image does.
    pub(crate) is_qcow2: bool,
    pub(crate) facts: Option<Facts>,
    /// Empty where there is an error.
    pub(crate) report: Report,
    /// Why there is no report.
    pub(crate) error: Option<String>,
    pub(crate) elapsed: Duration,
    /// How it was read beside a writer.
    pub(crate) reading: Option<Reading>,
    /// What lies below it, if that was asked for.
    pub(crate) below: Option<Below>,
}

/// How an image was read beside a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Reading {
    /// How often it was checked.
    pub(crate) passes: usize,
    /// Whether the last two passes found the same.
    pub(crate) settled: bool,
    /// Findings that were seen in some of the passes only, and are left out.
    pub(crate) transient: u64,
}

/// What a layer of a chain refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Below {
    /// 0 for the image itself, 1 for its backing file, and so on.
    pub(crate) depth: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backing: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_file: Option<Target>,
}

/// A file that an image names, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Target {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathName>,
    /// One word: `followed`, `present`, `missing`, `loop`, `deep`, `refused`, `unnamed`.
    pub(crate) outcome: &'static str,
    /// The same in words.
    pub(crate) note: String,
}

/// A path as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PathName(pub(crate) PathBuf);

impl Serialize for PathName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_string_lossy())
    }
}

impl Audited {
    pub(crate) fn failed(name: PathBuf, is_qcow2: bool, error: String) -> Self {
        Self {
            name,
            is_qcow2,
            facts: None,
            report: Report::default(),
            error: Some(error),
            elapsed: Duration::ZERO,
            reading: None,
            below: None,
        }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        if self.error.is_some() {
            Verdict::Incomplete
        } else {
            self.report.verdict()
        }
    }

    pub(crate) fn hazards(&self) -> u64 {
        self.report.total_of(Severity::Hazard)
    }

    /// The exit code this image asks for.
    pub(crate) fn exit_code(&self, deny_hazards: bool) -> u8 {
        let code = self.verdict().exit_code();
        if deny_hazards && self.hazards() > 0 {
            worst(code, HAZARD_EXIT_CODE)
        } else {
            code
        }
    }
}

/// The worse of two exit codes: what could not be checked, corruption, leaks, nothing.
pub(crate) fn worst(a: u8, b: u8) -> u8 {
    let rank = |code| match code {
        0 => 0,
        3 => 1,
        2 => 2,
        _ => 3,
    };
    if rank(a) >= rank(b) { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_exit_code_is_no_maximum() {
        let over = |codes: &[u8]| codes.iter().copied().fold(0, worst);
        assert_eq!(over(&[0, 3, 0]), 3);
        assert_eq!(over(&[3, 2, 0]), 2);
        assert_eq!(over(&[3, 2, 1]), 1);
        assert_eq!(over(&[]), 0);
    }
}
