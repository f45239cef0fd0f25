//! `qcow2 compare`: do two disks show the same?

use std::path::PathBuf;

use clap::Args;
use qcow2_image::compare::{CompareOptions, Difference, compare_chains};
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{Format, OutputArgs, PassphraseArgs, ReadArgs, ThreadsArgs};
use super::failure::Failure;
use super::open::{Disk, Want};
use super::progress::Bar;
use crate::audit::shown;

/// They are not the same.
const DIFFER: u8 = 1;
/// Something went wrong: it is not known whether they are.
pub(crate) const FAILED: u8 = 2;

/// Tell whether two disks show the same
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 they show the same, 1 they don't, 2 something went wrong.

Examples:
  qcow2 compare disk.raw disk.qcow2
  qcow2 compare --strict one.qcow2 other.qcow2"
)]
pub(crate) struct Command {
    /// One disk
    first: PathBuf,

    /// The other
    second: PathBuf,

    /// Lengths must be the same, and each place stored in the same way
    #[arg(short, long)]
    strict: bool,

    /// Format of the second disk [default: what its first bytes look like]
    #[arg(long, value_enum, value_name = "FORMAT")]
    second_format: Option<Format>,

    /// Passphrase of the second disk, if it is encrypted; --passphrase-file has that of the first
    #[arg(long, value_name = "FILE")]
    second_passphrase_file: Option<PathBuf>,

    /// The same, from an environment variable
    #[arg(long, value_name = "VAR", conflicts_with = "second_passphrase_file")]
    second_passphrase_env: Option<String>,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    read: ReadArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Compared {
    first: String,
    second: String,
    identical: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Told>,
    first_size: u64,
    second_size: u64,
    read_bytes: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        self.compare(answer).map_err(|failure| failure.code(FAILED))
    }

    fn compare(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let want = Want::read(&self.read);
        let first = Disk::open(&self.first, &self.read.open, &want)?;
        let mut other = self.read.open.clone();
        other.format = self.second_format;
        other.passphrases = PassphraseArgs::of(
            self.second_passphrase_file.as_deref(),
            self.second_passphrase_env.as_deref(),
        );
        let second = Disk::open(&self.second, &other, &want)?;
        let bar = Bar::new(self.output, "comparing")?;
        let options = CompareOptions::new()
            .strict(self.strict)
            .threads(self.threads.count())
            .monitor(&bar);
        let found = compare_chains(&first.chain(), &second.chain(), &options)?;
        bar.end();
        let compared = Compared {
            first: name(&self.first),
            second: name(&self.second),
            identical: found.difference.is_none(),
            difference: found.difference.map(Told::of),
            first_size: found.first_len,
            second_size: found.second_len,
            read_bytes: found.read_bytes,
        };
        answer.give(&compared, || {
            let names = format!("{} and {}", shown(&self.first), shown(&self.second));
            let zeros = if found.first_len == found.second_len {
                ""
            } else {
                "; what one has behind the end of the other is zeros"
            };
            match &compared.difference {
                None => format!("{names} show the same{zeros}\n"),
                Some(told) => format!("{names} differ: {}\n", told.words(&compared)),
            }
        })?;
        Ok(if compared.identical { 0 } else { DIFFER })
    }
}

impl Told {
    fn of(difference: Difference) -> Self {
        let (kind, offset) = match difference {
            Difference::Content { offset } => ("content", Some(offset)),
            Difference::Allocation { offset } => ("allocation", Some(offset)),
            Difference::Size => ("size", None),
            _ => ("other", None),
        };
        Self { kind, offset }
    }

    fn words(&self, compared: &Compared) -> String {
        let offset = self.offset.unwrap_or_default();
        match self.kind {
            "content" => format!("the first byte that is not the same is at {offset:#x}"),
            "allocation" => format!("from {offset:#x} on they are stored in different ways"),
            "size" => format!(
                "one has {} bytes, the other {}",
                compared.first_size, compared.second_size
            ),
            _ => "in some way".to_owned(),
        }
    }
}
