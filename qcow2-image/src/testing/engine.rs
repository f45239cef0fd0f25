//! What the harness asks of an engine, so that it can also judge a wrong one.

use std::ops::Range;

use qcow2_check::{Code, Options, Report, Severity};
use qcow2_io::{Storage, StorageError, StorageErrorKind};

use crate::create::Preallocation;

use super::failure::Failure;
use super::files::Files;
use super::shape::Shape;

/// An operation that failed, as far as the harness wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The kind, where a storage gave one.
    pub kind: Option<StorageErrorKind>,
    /// The words.
    pub text: String,
}

impl Refusal {
    /// The refusal that an error is.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut kind = None;
        let mut next = Some(error);
        while let Some(error) = next {
            kind = kind.or_else(|| error.downcast_ref().map(StorageError::kind));
            next = error.source();
        }
        Self {
            kind,
            text: Failure::of("refused", error).to_string(),
        }
    }
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Self {
        Self::of(&error)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.text)
    }
}

/// An open disk.
pub trait Subject: Send + Sync {
    /// Its content.
    fn disk(&self) -> &dyn Storage;

    /// Gives whole clusters back, as QEMU does.
    ///
    /// # Errors
    ///
    /// As a discard.
    fn discard_whole(&self, range: Range<u64>) -> Result<(), Refusal>;

    /// Writes whole clusters in compressed form.
    ///
    /// # Errors
    ///
    /// As a write.
    fn pack(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal>;

    /// Changes the size.
    ///
    /// # Errors
    ///
    /// When the image can't have it.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), Refusal>;

    /// Ends its use in good order.
    ///
    /// # Errors
    ///
    /// When something could not be stored.
    fn close(self: Box<Self>) -> Result<(), Refusal>;
}

/// How far an image may be from perfect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// It was closed: nothing may be wrong.
    Closed,
    /// A fault or a crash came in between: space may be lost, and refcounts may be wrong as long as the dirty bit says so.
    Interrupted,
    /// As after a crash, and opened since: only space may be lost.
    Recovered,
}

/// Makes and opens images.
pub trait Engine: Send + Sync {
    /// Makes the image of a shape in its files.
    ///
    /// # Errors
    ///
    /// When that fails.
    fn create(&self, shape: &Shape, files: &Files) -> Result<(), Refusal>;

    /// Opens it.
    ///
    /// # Errors
    ///
    /// When that fails.
    fn open(
        &self,
        shape: &Shape,
        files: &Files,
        read_only: bool,
    ) -> Result<Box<dyn Subject>, Refusal>;

    /// Checks the image as it lies in its files.
    ///
    /// # Errors
    ///
    /// What is wrong beyond `tolerance`.
    fn check(&self, files: &Files, tolerance: Tolerance) -> Result<(), Failure> {
        judge(&files.image, tolerance)
    }
}

/// Asks the checker.
fn judge(image: &dyn Storage, tolerance: Tolerance) -> Result<(), Failure> {
    let options = Options {
        threads: 1,
        max_findings: 3,
        ..Options::default()
    };
    let report = qcow2_check::check(image, &options);
    let dirty = report.total(Code::FeatureDirty) > 0;
    let postponed = dirty && tolerance == Tolerance::Interrupted;
    let bad = |code: Code| match code.severity() {
        Severity::Note | Severity::Hazard => {
            code == Code::FeatureCorrupt || (dirty && code == Code::FeatureDirty && !postponed)
        }
        Severity::Leak => tolerance == Tolerance::Closed,
        Severity::Corruption => !(postponed && follows_from_refcounts(code)),
        Severity::Error => true,
    };
    let bad: Vec<Code> = report
        .totals
        .iter()
        .filter(|(code, count)| *count > 0 && bad(*code))
        .map(|(code, _)| *code)
        .collect();
    if bad.is_empty() && !report.fatal {
        return Ok(());
    }
    Err(Failure::new(words(&report, &bad)))
}

/// Whether a finding only says that refcounts are behind.
fn follows_from_refcounts(code: Code) -> bool {
    matches!(
        code,
        Code::RefcountLow | Code::RefcountMissing | Code::CopiedWrong
    )
}

fn words(report: &Report, codes: &[Code]) -> String {
    let findings: Vec<String> = report
        .findings
        .iter()
        .filter(|finding| codes.contains(&finding.code))
        .take(6)
        .map(|finding| {
            format!(
                "{} at {:?}: {}",
                finding.code, finding.place, finding.detail
            )
        })
        .collect();
    format!("the image is not sound: {codes:?}; {}", findings.join("; "))
}
