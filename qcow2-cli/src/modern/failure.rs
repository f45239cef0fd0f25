//! What goes wrong, in words, and what to do next.

use std::error::Error;
use std::io;
use std::path::Path;

use qcow2_check::chain::{Refusal, Unresolved};
use qcow2_image::chain::ChainError;
use qcow2_image::compare::CompareError;
use qcow2_image::copy::CopyError;
use qcow2_image::create::CreateError;
use qcow2_image::luks::LuksError;
use qcow2_image::{AmendError, ImageError};
use qcow2_io::cipher::SecretError;
use qcow2_io::{Operation, StorageError, StorageErrorKind};
use rustix::io::Errno;
use serde::Serialize;

use super::args::OutputArgs;
use crate::audit::json::to_ascii;
use crate::audit::{NotOpened, clean, in_words, shown};
use crate::words::system::{self, without_number};
use crate::{Console, complain};

/// What somebody is told who has ended work on a new file.
pub(crate) const NOTHING_MADE: &str =
    "nothing of the new file is left, and a file that it was to replace is as it was";

/// A command that did not do what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Failure {
    /// What is wrong, where and why.
    error: String,
    /// What to do next.
    hints: Vec<String>,
    exit_code: u8,
    /// The file that hints mean by `IMAGE`.
    #[serde(skip)]
    image: Option<String>,
    /// The user wanted no more of it.
    #[serde(skip)]
    ended: bool,
    /// Nobody is there to hear of it.
    #[serde(skip)]
    is_silent: bool,
}

impl Failure {
    /// A failure in these words.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            error: text.into(),
            hints: Vec::new(),
            exit_code: 1,
            image: None,
            ended: false,
            is_silent: false,
        }
    }

    /// A failure of code that has told it already.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        let mut failure = Self::new(without_number(&format!("{error:#}")));
        failure.is_silent = error.chain().any(|cause| {
            let cause = cause.downcast_ref::<io::Error>();
            cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
        });
        match error.downcast_ref::<NotOpened>() {
            Some(cause) => of_kind(failure, cause.kind).about(&cause.path),
            None => failure,
        }
    }

    /// The end of an answer that nobody reads any more.
    pub(crate) fn unread() -> Self {
        Self {
            is_silent: true,
            exit_code: 0,
            ..Self::new("")
        }
    }

    /// A file that can't be opened; whoever tells it names the file.
    pub(crate) fn opening(error: &StorageError) -> Self {
        of_storage(Self::new(in_words(error)), error)
    }

    /// A file that can't be made in a folder.
    pub(crate) fn making(error: &io::Error, folder: &Path) -> Self {
        // The folder is named here, and not the name that was tried in it.
        let text = match system::errno(error) {
            // That's what is said where it isn't known.
            Errno::IO => error.kind().to_string(),
            errno => system::text(errno),
        };
        let mut failure = Self::new(format!("no file can be made in {}: {text}", shown(folder)));
        failure.image = Some(typed(folder));
        of_storage(
            failure,
            &StorageError::from_io(Operation::Open, error.kind()),
        )
    }

    /// What to do next. `IMAGE` in it becomes the name of the file that it is [about](Self::about).
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        if !self.hints.contains(&hint) {
            self.hints.push(hint);
        }
        self
    }

    /// How things are, and how to go on, if the user has ended it.
    pub(crate) fn if_ended(self, hint: impl Into<String>) -> Self {
        if self.ended { self.hint(hint) } else { self }
    }

    /// Another exit code than 1.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.exit_code = code;
        self
    }

    /// The file that it is about.
    pub(crate) fn about(mut self, path: &Path) -> Self {
        let name = shown(path);
        self.image.get_or_insert_with(|| typed(path));
        if !self.error.starts_with(&name) {
            self.error = format!("{name}: {}", self.error);
        }
        self
    }

    /// Tells it; gives the exit code.
    pub(crate) fn report(mut self, output: OutputArgs, console: &Console) -> u8 {
        console.flush();
        if self.is_silent {
            return self.exit_code;
        }
        if let Some(image) = &self.image {
            for hint in &mut self.hints {
                *hint = hint.replace("IMAGE", image);
            }
        }
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
        let mut failure = Self::new(without_number(&text));
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
    if let Some(error) = error.downcast_ref::<Box<ImageError>>() {
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
        Some(ChainError::Image(error) | ChainError::Emptying(error)) => {
            return of_image(failure, error);
        }
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
    let cancelled = matches!(error.downcast_ref(), Some(CopyError::Cancelled))
        || matches!(error.downcast_ref(), Some(ChainError::Cancelled))
        || matches!(error.downcast_ref(), Some(AmendError::Cancelled))
        || matches!(error.downcast_ref(), Some(CompareError::Cancelled));
    if cancelled {
        let ended = true;
        return Failure { ended, ..failure };
    }
    if let Some(CreateError::SecretMissing) = error.downcast_ref::<CreateError>() {
        return failure.hint("--new-passphrase-file FILE gives it");
    }
    if let Some(SecretError::File { .. }) = error.downcast_ref::<SecretError>() {
        return failure.hint("a passphrase file has the passphrase and nothing else");
    }
    failure
}

fn of_image(mut failure: Failure, error: &ImageError) -> Failure {
    if let ImageError::Referenced { path, .. } = error {
        failure.image = Some(typed(path));
    }
    let failure = of_kind(failure, error.kind());
    match error {
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
    let is_folder = std::error::Error::source(error)
        .and_then(|cause| cause.downcast_ref::<io::Error>())
        .is_some_and(|cause| cause.kind() == io::ErrorKind::IsADirectory)
        || error.to_string().ends_with("it is a directory");
    if is_folder {
        return failure.hint("`qcow2 audit IMAGE` looks at all images in it");
    }
    of_kind(failure, error.kind())
}

fn of_kind(failure: Failure, kind: StorageErrorKind) -> Failure {
    match kind {
        StorageErrorKind::NoSpace => failure.hint(
            "the file system is full, or a quota is: make room, or put the new file elsewhere; `qcow2 measure` tells how much a copy needs",
        ),
        StorageErrorKind::Locked => {
            failure.hint("another program uses the image; close it there first")
        }
        StorageErrorKind::PermissionDenied => failure.hint(
            "you may not do that to it: `ls -ld IMAGE` shows who may; a copy that is yours can be changed",
        ),
        StorageErrorKind::ReadOnly => {
            failure.hint("what can't be written there can be copied elsewhere with `qcow2 convert`")
        }
        _ => failure,
    }
}

/// A path as a shell takes it.
fn typed(path: &Path) -> String {
    let name = shown(path);
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !name.is_empty() && name.chars().all(plain) {
        return name;
    }
    format!("'{}'", name.replace('\'', r"'\''"))
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
        assert_eq!(failure.hints.len(), 1, "{failure:?}");
        assert!(failure.hints[0].starts_with("the file system is full"));
    }
}
