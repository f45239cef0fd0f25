//! What goes wrong, in words, and what to do next.

use std::error::Error;
use std::path::Path;

use qcow2_check::chain::{Refusal, Unresolved};
use qcow2_image::chain::ChainError;
use qcow2_image::copy::CopyError;
use qcow2_image::create::CreateError;
use qcow2_image::luks::LuksError;
use qcow2_image::{AmendError, ImageError};
use qcow2_io::cipher::SecretError;
use qcow2_io::{StorageError, StorageErrorKind};
use serde::Serialize;

use super::args::OutputArgs;
use crate::audit::json::to_ascii;
use crate::audit::{clean, in_words, shown};
use crate::{Console, complain};

/// A command that did not do what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Failure {
    /// What is wrong, where and why.
    error: String,
    /// What to do next.
    hints: Vec<String>,
    exit_code: u8,
}

impl Failure {
    /// A failure in these words.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            error: text.into(),
            hints: Vec::new(),
            exit_code: 1,
        }
    }

    /// A failure of code that has told it already.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        Self::new(format!("{error:#}"))
    }

    /// A file that can't be opened; whoever tells it names the file.
    pub(crate) fn opening(error: &StorageError) -> Self {
        let mut text = in_words(error);
        if let Some(rest) = text.strip_prefix("It can't") {
            text = format!("it can't{rest}");
        }
        of_storage(Self::new(text), error)
    }

    /// What to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        if !self.hints.contains(&hint) {
            self.hints.push(hint);
        }
        self
    }

    /// Another exit code than 1.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.exit_code = code;
        self
    }

    /// The file that it is about.
    pub(crate) fn about(mut self, path: &Path) -> Self {
        let name = shown(path);
        if !self.error.starts_with(&name) {
            self.error = format!("{name}: {}", self.error);
        }
        self
    }

    /// Tells it; gives the exit code.
    pub(crate) fn report(self, output: OutputArgs, console: &Console) -> u8 {
        console.flush();
        if output.json {
            // What is escaped in text is in JSON, too.
            complain!(console, "{}", to_ascii(&self).unwrap_or_default());
            return self.exit_code;
        }
        let label = console::style("error:").for_stderr().red().bold();
        complain!(console, "{label} {}", clean(&self.error));
        let label = console::style("hint:").for_stderr().cyan();
        for hint in &self.hints {
            complain!(console, "  {label} {}", clean(hint));
        }
        self.exit_code
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.ends_with(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        let mut failure = Self::new(text);
        let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            failure = advise(failure, error);
            cause = error.source();
        }
        failure
    }
}

/// Adds what is known to help. Errors that pass another one on don't have it as their cause, so it is looked for here.
fn advise(failure: Failure, error: &(dyn Error + 'static)) -> Failure {
    if let Some(error) = error.downcast_ref::<ImageError>() {
        return of_image(failure, error);
    }
    if let Some(error) = error.downcast_ref::<Unresolved>() {
        return of_reference(failure, error);
    }
    if let Some(error) = error.downcast_ref::<LuksError>() {
        return of_luks(failure, error);
    }
    if let Some(error) = error.downcast_ref::<StorageError>() {
        return of_storage(failure, error);
    }
    match error.downcast_ref::<ChainError>() {
        Some(ChainError::Image(error)) => return of_image(failure, error),
        Some(ChainError::TooSmall { .. }) => {
            return failure.hint("`qcow2 resize` makes the target larger");
        }
        Some(ChainError::NoLayer { .. }) => {
            return failure.hint("`qcow2 info --chain IMAGE` shows the layers");
        }
        _ => {}
    }
    match error.downcast_ref::<AmendError>() {
        Some(AmendError::Image(error)) => return of_image(failure, error),
        Some(AmendError::Luks(error)) => return of_luks(failure, error),
        Some(AmendError::Fixed { .. }) => {
            return failure.hint("`qcow2 convert IMAGE NEW` makes an image with other options");
        }
        _ => {}
    }
    if let Some(CopyError::TooSmall { .. }) = error.downcast_ref::<CopyError>() {
        return failure.hint("`qcow2 resize` makes the target larger");
    }
    if let Some(CreateError::SecretMissing) = error.downcast_ref::<CreateError>() {
        return failure.hint("--new-passphrase-file FILE gives it");
    }
    if let Some(SecretError::File { .. }) = error.downcast_ref::<SecretError>() {
        return failure.hint("a passphrase file has the passphrase and nothing else");
    }
    failure
}

fn of_image(failure: Failure, error: &ImageError) -> Failure {
    match error {
        ImageError::Storage(error) => of_storage(failure, error),
        ImageError::MarkedCorrupt | ImageError::Unrecoverable { .. } => failure
            .hint("`qcow2 audit IMAGE` tells what is wrong with it, `qcow2 repair IMAGE` mends it"),
        ImageError::Header(_) => failure.hint(
            "`qcow2 audit IMAGE` tells what is wrong with it; -f raw takes the file as plain bytes",
        ),
        ImageError::Metadata(_)
        | ImageError::Snapshots(_)
        | ImageError::SnapshotEntry { .. }
        | ImageError::SnapshotL1 { .. } => {
            failure.hint("`qcow2 audit IMAGE` tells what is wrong with it")
        }
        ImageError::SecretMissing { .. } => failure.hint(
            "--passphrase-file FILE or --passphrase-env VAR opens it; of a backing file, --passphrase-file 1=FILE",
        ),
        ImageError::NeedlessSecret => failure.hint("leave the passphrase out"),
        ImageError::Reference { source, .. } => of_reference(failure, source),
        ImageError::NoSnapshot { .. } => {
            failure.hint("`qcow2 snapshot list IMAGE` shows those that there are")
        }
        ImageError::NoBitmap { .. } => {
            failure.hint("`qcow2 bitmap list IMAGE` shows those that there are")
        }
        ImageError::BitmapUnusable { why, .. } if !why.contains("it is consistent") => failure.hint(
            "one that was not closed is made usable by `qcow2 bitmap recover`, a broken one can only be removed",
        ),
        ImageError::NoDataFile => {
            failure.hint("`qcow2 amend --data-file NAME IMAGE` tells the image its name")
        }
        ImageError::Unsupported { what } if what.contains("was not closed") => {
            failure.hint("`qcow2 repair IMAGE` brings it in order")
        }
        ImageError::InChain => failure.hint("a file can't be below itself"),
        _ => failure,
    }
}

fn of_reference(failure: Failure, error: &Unresolved) -> Failure {
    match error {
        Unresolved::Refused {
            refusal: Refusal::Denied | Refusal::Outside,
            ..
        } => failure.hint(
            "if you trust the image, --references allow:PATH or --references all lets it be opened",
        ),
        Unresolved::Refused {
            refusal: Refusal::Protocol,
            ..
        } => failure.hint("`qcow2 img` takes descriptions and protocols as qemu-img does"),
        Unresolved::Missing { .. } => {
            failure.hint("`qcow2 rebase --unsafe` gives the image another name to look for")
        }
        _ => failure,
    }
}

fn of_luks(failure: Failure, error: &LuksError) -> Failure {
    match error {
        LuksError::WrongPassphrase => failure
            .hint("all bytes of a passphrase file count, a line end among them: printf makes none"),
        LuksError::SlotActive { .. } | LuksError::LastSlot { .. } | LuksError::AllSlotsMatch => {
            failure.hint("--force does it all the same; what nobody can open is lost")
        }
        _ => failure,
    }
}

fn of_storage(failure: Failure, error: &StorageError) -> Failure {
    match error.kind() {
        StorageErrorKind::NoSpace => failure.hint("the file system is full"),
        StorageErrorKind::Locked => {
            failure.hint("another program uses the image; close it there first")
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use qcow2_io::Operation;

    use super::*;

    #[test]
    fn a_failure_names_its_causes_and_what_helps() {
        let missing = Unresolved::Refused {
            name: "/etc/passwd".to_owned(),
            refusal: Refusal::Outside,
        };
        let error = ImageError::Reference {
            what: "backing file",
            source: missing,
        };
        let failure = Failure::from(error).about(Path::new("a.qcow2"));
        assert!(failure.error.starts_with("a.qcow2: the backing file"));
        assert!(failure.error.contains("/etc/passwd"));
        assert_eq!(failure.hints.len(), 1, "{failure:?}");
        assert!(failure.hints[0].contains("--references"));
    }

    #[test]
    fn errors_that_are_passed_on_are_looked_into() {
        let full = StorageError::new(Operation::Write, StorageErrorKind::NoSpace);
        let failure = Failure::from(ChainError::Image(ImageError::Storage(full)));
        assert_eq!(failure.hints, ["the file system is full"]);
    }
}
