//! `qcow2 create`: new images.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::chain::BackingFile;
use qcow2_image::create::Preallocation;
use qcow2_image::{Image, References};
use qcow2_io::Storage as _;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{ConsentArgs, Format, OutputArgs, PassphraseArgs, bytes};
use super::failure::Failure;
use super::fresh;
use super::new::{self, NewArgs};
use crate::audit::{self, Choice, shown};
use crate::words::size;

/// Make a new image
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 create disk.qcow2 20G
  qcow2 create --backing base.qcow2 --backing-format qcow2 overlay.qcow2
  qcow2 create --encrypt luks --new-passphrase-file key secret.qcow2 20G
  qcow2 create --preallocation full disk.raw 4G")]
pub(crate) struct Command {
    /// The new image
    image: PathBuf,

    /// Size of its disk, perhaps with k, M, G, T [default: that of the backing file]
    #[arg(value_parser = bytes)]
    size: Option<u64>,

    /// Format of the image [default: raw if its name ends in .raw, else qcow2]
    #[arg(short, long, value_enum)]
    format: Option<Format>,

    #[command(flatten)]
    new: NewArgs,

    #[command(flatten)]
    passphrases: PassphraseArgs,

    /// Which files that the backing file names may be opened: deny, same-directory (of either; the default), allow:PATH or all
    #[arg(long, value_name = "POLICY", value_parser = audit::parse_references)]
    references: Vec<Choice>,

    #[command(flatten)]
    consent: ConsentArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Created<'a> {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    file_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<&'a str>,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let policy = audit::references(&self.references).map_err(|error| Failure::of(&error))?;
        let backing = match self.new.backing.named() {
            Some((file, format)) => Some((file, self.backing(file, format, policy)?)),
            None => None,
        };
        let backing_size = backing.as_ref().map(|(_, file)| file.storage().len());
        let Some(size) = self.size.or(backing_size.transpose()?) else {
            return Err(
                Failure::new("the size is missing").hint("such as `qcow2 create disk.qcow2 20G`")
            );
        };
        let format = Format::of_new(self.format, &self.image);
        let file_size = if format == Format::Raw {
            self.new.check_raw()?;
            let mode = self
                .new
                .preallocation
                .map_or(Preallocation::Off, Into::into);
            let (file, fresh) = new::make_raw(&self.image, size, mode, self.consent)?;
            file.flush()?;
            fresh::keep(vec![fresh])?;
            file.len()?
        } else {
            let options = self.new.options(size)?;
            let open = new::blind(&self.new.backing);
            let (image, files) = self.new.make(&self.image, &options, self.consent, open)?;
            image.close()?;
            fresh::keep(files)?;
            std::fs::metadata(&self.image)?.len()
        };
        let created = Created {
            filename: name(&self.image),
            format: format.name(),
            virtual_size: size.next_multiple_of(512),
            file_size,
            backing_file: backing.as_ref().map(|(file, _)| *file),
        };
        answer.give(&created, || {
            let above = match created.backing_file {
                Some(name) => format!(" over {}", audit::clean(name)),
                None => String::new(),
            };
            format!(
                "{}: a {} disk in {}{above}\n",
                shown(&self.image),
                size::human(created.virtual_size),
                created.format
            )
        })?;
        Ok(0)
    }

    /// Opens the backing file, which must be what it is said to be.
    fn backing(
        &self,
        name: &str,
        format: Format,
        policy: References,
    ) -> Result<BackingFile, Failure> {
        let policy = new::backing_policy(&self.image, name, policy)
            .map_err(|failure| failure.about(&self.image))?;
        let mut options = Image::options()
            .read_only(true)
            .locked(true)
            .path(&self.image)
            .references(policy);
        for (layer, secret) in self.passphrases.read()? {
            options = options.layer_secret(layer, secret);
        }
        BackingFile::open(name, format.name(), &options)
            .map_err(|error| Failure::from(error).about(&self.image))
    }
}
