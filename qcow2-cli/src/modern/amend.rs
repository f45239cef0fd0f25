//! `qcow2 amend`: other options for an image that is there.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::AmendOptions;
use qcow2_io::cipher::Secret;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{ConsentArgs, NewPassphraseArgs, OpenArgs, OutputArgs};
use super::failure::Failure;
use super::new::key_value;
use super::open::{self, Want};
use super::progress::Bar;
use crate::audit::shown;

/// Change the options of an image that is there
///
/// What is fixed for good, such as the size of clusters, needs a copy: `qcow2 convert`. The size changes by `qcow2 resize`, the
/// backing file by `qcow2 rebase`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 amend --compat v3 old.qcow2
  qcow2 amend --lazy-refcounts on disk.qcow2
  qcow2 amend --passphrase-file old --add-key --new-passphrase-file new secret.qcow2
  qcow2 amend --passphrase-file new --erase-key --old-passphrase-file old secret.qcow2")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// Version of the format
    #[arg(long, value_name = "v2|v3")]
    compat: Option<String>,

    /// Bits of a refcount: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS")]
    refcount_bits: Option<u64>,

    /// Whether refcounts may be written late
    #[arg(long, value_name = "on|off")]
    lazy_refcounts: Option<String>,

    /// Name of the external data file; the file itself stays where it is
    #[arg(long, value_name = "FILE")]
    data_file: Option<String>,

    /// That file need not be a valid raw disk any more
    #[arg(long)]
    no_data_file_raw: bool,

    /// Any of these as qemu-img names them; may be repeated
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE", value_parser = key_value)]
    options: Vec<(String, String)>,

    /// Add a passphrase that opens the image; needs one that does already, and the new one
    #[arg(long, conflicts_with = "erase_key")]
    add_key: bool,

    /// Erase the passphrase of --old-passphrase-file, or a key slot
    #[arg(long)]
    erase_key: bool,

    /// Which slot is meant
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..8))]
    key_slot: Option<u8>,

    #[command(flatten)]
    new: NewPassphraseArgs,

    /// The passphrase that is erased
    #[arg(long, value_name = "FILE", requires = "erase_key")]
    old_passphrase_file: Option<PathBuf>,

    /// The same, from an environment variable
    #[arg(
        long,
        value_name = "VAR",
        requires = "erase_key",
        conflicts_with = "old_passphrase_file"
    )]
    old_passphrase_env: Option<String>,

    /// Allow what can make the disk unreadable for good, such as erasing the last passphrase
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    consent: ConsentArgs,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Amended {
    filename: String,
    changed: Vec<String>,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let wanted = self.wanted();
        if wanted.is_empty() {
            return Err(Failure::new("nothing is to be changed")
                .hint("`qcow2 amend --help` tells what can be"));
        }
        let about = |failure: Failure| failure.about(&self.image);
        if self.erase_key {
            self.consent.ask(&format!(
                "erases a key of {}, which then opens it no more",
                shown(&self.image)
            ))?;
        }
        let want = Want {
            no_backing: true,
            ..Want::write()
        };
        let mut image = open::image(&self.image, &self.open, &want)?;
        let bar = Bar::new(self.output, "amending")?;
        let mut options = AmendOptions::new().force(self.force).monitor(&bar);
        for (key, value) in &wanted {
            options
                .set(key, value)
                .map_err(|error| about(error.into()))?;
        }
        if self.add_key {
            let secrets = self.open.passphrases.read()?;
            if let Some((_, secret)) = secrets.into_iter().find(|(layer, _)| *layer == 0) {
                options = options.secret(secret);
            }
        }
        if let Some(secret) = self.new.read()? {
            options = options.new_secret(secret);
        }
        if let Some(secret) = self.old()? {
            options = options.old_secret(secret);
        }
        image.amend(&options).map_err(|error| {
            about(error.into())
                .if_ended("IMAGE is sound and reads as before; the same command does it")
        })?;
        bar.end();
        image.close().map_err(|error| about(error.into()))?;
        let amended = Amended {
            filename: name(&self.image),
            changed: wanted.into_iter().map(|(key, _)| key).collect(),
        };
        answer.give(&amended, || {
            format!(
                "{}: changed {}\n",
                shown(&self.image),
                amended.changed.join(", ")
            )
        })?;
        Ok(0)
    }

    fn old(&self) -> Result<Option<Secret>, Failure> {
        Ok(
            match (&self.old_passphrase_file, &self.old_passphrase_env) {
                (Some(path), _) => Some(Secret::from_file(path)?),
                (None, Some(name)) => Some(Secret::from_env(name)?),
                (None, None) => None,
            },
        )
    }

    /// All changes by the names that qemu-img has for them.
    fn wanted(&self) -> Vec<(String, String)> {
        let mut wanted = Vec::new();
        let mut add = |key: &str, value: Option<String>| {
            wanted.extend(value.map(|value| (key.to_owned(), value)));
        };
        add("compat", self.compat.clone());
        add(
            "refcount_bits",
            self.refcount_bits.map(|bits| bits.to_string()),
        );
        add("lazy_refcounts", self.lazy_refcounts.clone());
        add("data_file", self.data_file.clone());
        add("data_file_raw", self.no_data_file_raw.then(|| "off".into()));
        add("encrypt.state", self.add_key.then(|| "active".into()));
        add("encrypt.state", self.erase_key.then(|| "inactive".into()));
        add(
            "encrypt.keyslot",
            self.key_slot.map(|slot| slot.to_string()),
        );
        wanted.extend(self.options.iter().cloned());
        wanted
    }
}
