//! Audits and repairs for people and programs: is an image sound, what is wrong with it, what is dangerous about it, and what mends it?
//!
//! `inputs` finds the images, `audited` holds what was learned of one, `report` and `json` tell it; `run` puts them together. `progress`
//! shows how far a check is and lets the user end it, `online` makes several passes beside a writer agree, `chain` follows backing
//! files. `repair` plans, asks, mends and goes back; `plan` tells what it is about to do.
//!
//! Whoever calls this reads its own command line, and says in [`Typed`] how its commands are typed.

mod audited;
mod chain;
mod explain;
pub(crate) mod facts;
mod inputs;
pub(crate) mod json;
mod online;
mod owner;
mod plan;
mod progress;
pub mod repair;
mod report;
mod run;
mod salvage;
mod switches;
mod text;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use qcow2_check::{Code, Options};
use qcow2_io::{File, FileOptions, StorageError, StorageErrorKind};

pub use crate::modern::PassphraseArgs;
pub use chain::{Choice, parse as parse_references, references};
pub use inputs::{Inputs, expand};
pub use owner::parse_offset;
pub use progress::Interrupt;
pub(crate) use progress::Progress;
pub use run::{Settings, run};
pub use switches::Switches;
pub use text::{Look, Typed, shown};
pub(crate) use text::{clean, plural};

use crate::words::system;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Human,
    /// For programs.
    Json,
    /// For the page of all codes.
    Markdown,
}

/// What a code means; all codes for `list`, and for nothing.
///
/// # Errors
///
/// There is no such code; the message names some that are close.
pub fn explanation(code: &str, form: Form, look: Look) -> Result<String> {
    let all = code.is_empty() || code.eq_ignore_ascii_case("list");
    match form {
        Form::Markdown => Ok(explain::markdown()),
        Form::Human if all => Ok(explain::list(look)),
        Form::Json if all => explain::list_json(),
        Form::Json => match Code::from_id(code) {
            Some(code) => explain::json(code),
            None => explain::one(code, look),
        },
        Form::Human => explain::one(code, look),
    }
}

/// Who owns the cluster at an offset of the image file.
///
/// # Errors
///
/// The image can't be opened or looked into, or the offset lies behind its end.
pub fn owner_of(
    path: &Path,
    offset: u64,
    online: bool,
    threads: usize,
    form: Form,
    look: Look,
) -> Result<String> {
    let file = open(path, online).map_err(|error| anyhow!("{}: {error}", shown(path)))?;
    let options = Options {
        threads,
        ..Options::default()
    };
    let json = form == Form::Json;
    owner::answer(path, &file, offset, &options, json, look)
        .map_err(|error| error.context(shown(path)))
}

/// Prints on standard output, at once.
///
/// # Errors
///
/// Nobody reads it.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("standard output takes no more")
}

/// Opens an image for reading, locked as QEMU does; beside a writer only if that was asked for. In words on failure.
fn open(path: &Path, online: bool) -> Result<File, String> {
    FileOptions::new()
        .force_share(online)
        .open(path)
        .map_err(|error| {
            let advice = if error.kind() == StorageErrorKind::Locked {
                "; --online checks it beside the writer"
            } else {
                ""
            };
            let words = in_words(&error);
            let words = words.replacen("it can't", "It can't", 1);
            format!("{words}{advice}")
        })
}

/// Why a file can't be opened, harmless to print. Whoever tells it names the file.
pub(crate) fn in_words(error: &StorageError) -> String {
    let mut text = error.to_string();
    if let Some(path) = error.path() {
        let known = format!("{} in '{}' failed", error.operation(), path.display());
        if let Some(rest) = text.strip_prefix(&known) {
            text = format!("it can't be opened{rest}");
        }
    }
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    clean(&system::without_number(&text))
}

/// A file that can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {words}", shown(.path))]
pub(crate) struct NotOpened {
    pub(crate) path: PathBuf,
    words: String,
    pub(crate) kind: StorageErrorKind,
}

impl NotOpened {
    fn new(path: &Path, error: &StorageError) -> Self {
        Self {
            path: path.to_owned(),
            words: in_words(error),
            kind: error.kind(),
        }
    }
}
