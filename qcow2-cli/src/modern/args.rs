//! What commands share on their command lines.

use std::ffi::OsStr;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use qcow2_format::header::CompressionType;
use qcow2_image::{References, SnapshotKey};
use qcow2_io::cipher::{Secret, SecretError};
use qcow2_io::codec::{Codec, Level};

use super::failure::Failure;
use crate::audit::{self, Choice};
use crate::words::size;

/// Layers of a chain that passphrases can be given for, counted from 0.
const LAYERS_MAX: usize = 1000;

/// How a command answers.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Answer in JSON, for programs; docs/json.md describes it. Errors are JSON on standard error then
    #[arg(long)]
    pub(crate) json: bool,

    /// Say nothing unless something is wrong
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Show no progress; without a terminal there is none anyway
    #[arg(long)]
    pub(crate) no_progress: bool,
}

impl OutputArgs {
    /// Whether progress is to be shown, if there is a terminal to show it on.
    pub(crate) fn progress(self) -> bool {
        !self.quiet && !self.no_progress
    }
}

/// Formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A qcow2 image
    Qcow2,
    /// Plain bytes
    Raw,
}

impl Format {
    /// What a new file is to be: what was asked for, or else what its name says.
    pub(crate) fn of_new(wanted: Option<Self>, path: &Path) -> Self {
        let is_raw = |end: &OsStr| end.eq_ignore_ascii_case("raw");
        match wanted {
            Some(format) => format,
            None if path.extension().is_some_and(is_raw) => Self::Raw,
            None => Self::Qcow2,
        }
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// How an image is opened.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Opening the image")]
pub(crate) struct OpenArgs {
    /// Format of the image [default: what its first bytes look like]
    #[arg(short, long, value_enum)]
    pub(crate) format: Option<Format>,

    #[command(flatten)]
    pub(crate) passphrases: PassphraseArgs,

    /// Which files that the image names may be opened: deny, same-directory (of the image, and below; the default), allow:PATH (a
    /// file or folder, may be repeated) or all
    #[arg(long, value_name = "POLICY", value_parser = audit::parse_references)]
    pub(crate) references: Vec<Choice>,
}

/// What opens encrypted images.
#[derive(Clone, Debug, Default, Args)]
pub struct PassphraseArgs {
    /// Passphrase of the encrypted image: all bytes of FILE, a line end among them. N= in front says of which layer of the chain
    /// (1: the backing file); may be repeated
    #[arg(long, value_name = "[N=]FILE", value_parser = layered)]
    passphrase_file: Vec<Layered>,

    /// The same, from an environment variable
    #[arg(long, value_name = "[N=]VAR", value_parser = layered)]
    passphrase_env: Vec<Layered>,
}

/// A word, and the layer that it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layered {
    layer: usize,
    word: String,
}

fn layered(text: &str) -> Result<Layered, String> {
    let (layer, word) = match text.split_once('=') {
        Some((layer, word))
            if !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            let layer = layer.parse().ok().filter(|layer| *layer < LAYERS_MAX);
            let layer = layer.ok_or_else(|| format!("there is no layer {text}"))?;
            (layer, word)
        }
        _ => (0, text),
    };
    Ok(Layered {
        layer,
        word: word.to_owned(),
    })
}

impl PassphraseArgs {
    /// Of an image alone, without its chain.
    pub(crate) fn of(file: Option<&Path>, env: Option<&str>) -> Self {
        let list = |word: Option<String>| word.map(|word| Layered { layer: 0, word });
        Self {
            passphrase_file: list(file.map(|file| file.to_string_lossy().into_owned()))
                .into_iter()
                .collect(),
            passphrase_env: list(env.map(str::to_owned)).into_iter().collect(),
        }
    }

    /// All passphrases, with the layers they are for.
    ///
    /// # Errors
    ///
    /// A file that can't be read, a variable that is not set, and a passphrase that is too long.
    pub fn secrets(&self) -> Result<Vec<(usize, Arc<Secret>)>, SecretError> {
        let files = self.passphrase_file.iter();
        let files = files.map(|Layered { layer, word }| (*layer, Secret::from_file(word)));
        let vars = self.passphrase_env.iter();
        let vars = vars.map(|Layered { layer, word }| (*layer, Secret::from_env(word)));
        files
            .chain(vars)
            .map(|(layer, secret)| Ok((layer, Arc::new(secret?))))
            .collect()
    }

    /// The same, for a command.
    pub(crate) fn read(&self) -> Result<Vec<(usize, Arc<Secret>)>, Failure> {
        Ok(self.secrets()?)
    }
}

impl OpenArgs {
    /// The policy that all `--references` make.
    pub(crate) fn policy(&self) -> Result<References, Failure> {
        audit::references(&self.references).map_err(|error| Failure::of(&error))
    }
}

/// How an image is opened that is only read.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ReadArgs {
    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// Read beside a program that writes; what is read may be changing
    #[arg(short = 'U', long, help_heading = "Opening the image")]
    pub(crate) force_share: bool,

    /// IMAGE is a list of options of nodes, as qemu-img has them: driver=qcow2,file.filename=disk.qcow2. Without this, json:{...}
    /// is taken for such a description, too
    #[arg(long, help_heading = "Opening the image")]
    pub(crate) image_opts: bool,
}

/// Leave to lose data.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ConsentArgs {
    /// Don't ask before data is lost
    #[arg(short, long)]
    pub(crate) yes: bool,
}

impl ConsentArgs {
    /// Makes sure that it is wanted: `what` completes "this ...".
    pub(crate) fn ask(self, what: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(
                Failure::new(format!("this {what}, and nobody is there to be asked"))
                    .hint("--yes does it without asking"),
            );
        }
        let mut err = io::stderr().lock();
        _ = write!(err, "This {what}. Go on? [y/N] ");
        _ = err.flush();
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
            Ok(())
        } else {
            Err(Failure::new("nothing was changed"))
        }
    }

    /// Makes sure that a file may be written anew.
    pub(crate) fn ask_to_replace(self, path: &Path) -> Result<(), Failure> {
        if path.try_exists().unwrap_or(true) {
            self.ask(&format!("replaces {}", audit::shown(path)))?;
        }
        Ok(())
    }
}

/// Long work.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ThreadsArgs {
    /// Threads to work with; 0 means one for each processor
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=1024))]
    threads: u64,
}

impl ThreadsArgs {
    /// Their number.
    pub(crate) fn count(self) -> usize {
        usize::try_from(self.threads).unwrap_or(0)
    }
}

/// How fast, so that others get on, too.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct RateArgs {
    /// Read no more than so many bytes a second; 0 means no limit
    #[arg(short, long = "rate-limit", visible_alias = "rate", value_name = "BYTES", value_parser = bytes, default_value = "0", hide_default_value = true)]
    pub(crate) rate: u64,
}

/// Compression.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct CompressArgs {
    /// Compress what is stored
    #[arg(short, long)]
    pub(crate) compress: bool,

    /// How hard: 1 to 9 for zlib, 1 to 22 for zstd
    #[arg(long, value_name = "LEVEL", requires = "compress")]
    compress_level: Option<i32>,
}

impl CompressArgs {
    /// The level, if anything is to be compressed into an image that compresses so.
    pub(crate) fn level(self, kind: CompressionType) -> Result<Option<Level>, Failure> {
        let codec = match kind {
            CompressionType::Zlib => Codec::Zlib,
            CompressionType::Zstd => Codec::Zstd,
        };
        Ok(match self.compress_level {
            _ if !self.compress => None,
            None => Some(Level::default()),
            Some(level) => Some(Level::new(codec, level)?),
        })
    }
}

/// A backing file for an image that is made or changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct BackingArgs {
    /// What the image does not have itself comes from FILE, a name that is meant from the image's directory
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub(crate) backing: Option<String>,

    /// Format of that file
    #[arg(
        short = 'F',
        long,
        value_enum,
        value_name = "FORMAT",
        requires = "backing"
    )]
    pub(crate) backing_format: Option<Format>,
}

impl BackingArgs {
    /// Name and format.
    pub(crate) fn named(&self) -> Option<(&str, Format)> {
        self.backing.as_deref().zip(self.backing_format)
    }
}

/// The passphrase of what is encrypted anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct NewPassphraseArgs {
    /// The new passphrase: all bytes of FILE, a line end among them
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_env")]
    new_passphrase_file: Option<PathBuf>,

    /// The same, from an environment variable
    #[arg(long, value_name = "VAR")]
    new_passphrase_env: Option<String>,
}

impl NewPassphraseArgs {
    /// The same, for an image that is there.
    pub(crate) fn as_passphrase(&self) -> PassphraseArgs {
        PassphraseArgs::of(
            self.new_passphrase_file.as_deref(),
            self.new_passphrase_env.as_deref(),
        )
    }

    /// The passphrase, if one is given.
    pub(crate) fn read(&self) -> Result<Option<Secret>, Failure> {
        Ok(
            match (&self.new_passphrase_file, &self.new_passphrase_env) {
                (Some(path), _) => Some(Secret::from_file(path)?),
                (None, Some(name)) => Some(Secret::from_env(name)?),
                (None, None) => None,
            },
        )
    }
}

/// A number of bytes: `64k`, `1.5G`, `0x10000`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    size::parse(text)
        .map_err(|error| format!("{error}: expected is a number, perhaps with k, M, G, T, P or E"))
}

/// A snapshot by its id or else its name.
pub(crate) fn snapshot(text: &str) -> Result<SnapshotKey, String> {
    if text.is_empty() {
        return Err("an id or a name of a snapshot".to_owned());
    }
    Ok(SnapshotKey::any(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_says_which_layer_it_opens() {
        let found = |text| layered(text).map(|found| (found.layer, found.word)).ok();
        assert_eq!(found("key"), Some((0, "key".to_owned())));
        assert_eq!(found("2=key"), Some((2, "key".to_owned())));
        assert_eq!(found("a=b"), Some((0, "a=b".to_owned())));
        assert_eq!(found("=b"), Some((0, "=b".to_owned())));
        assert_eq!(found("99999999999999999999=b"), None);
    }

    #[test]
    fn numbers_of_bytes_are_refused_in_words() {
        assert_eq!(bytes("1.5G"), Ok(3 << 29));
        assert!(bytes("1X").unwrap_err().contains("not a number of bytes"));
    }
}
