//! Images that are made: what can be chosen about them, and making them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use qcow2_check::chain::Resolver;
use qcow2_image::create::{CreateOptions, Preallocation, write_image};
use qcow2_image::{Image, ImageOptions, References};
use qcow2_io::cipher::Secret;
use qcow2_io::{File, Null, Storage, ZeroFlags};

use super::args::{BackingArgs, ConsentArgs, NewPassphraseArgs, OpenArgs, bytes};
use super::failure::Failure;
use super::fresh::Fresh;

/// Bytes that are written at a time to lay out a raw disk.
const PIECE: usize = 1 << 20;

/// What can be chosen about a new qcow2 image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "The new image")]
pub(crate) struct NewArgs {
    #[command(flatten)]
    pub(crate) backing: BackingArgs,

    /// Bytes of a cluster, 512 to 2M [default: 64k]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    cluster_size: Option<u64>,

    /// How much is laid out at once [default: off]
    #[arg(long, value_enum, value_name = "MODE")]
    pub(crate) preallocation: Option<PreallocationName>,

    /// How clusters are compressed if they are [default: zlib]
    #[arg(long, value_enum, value_name = "TYPE")]
    compression_type: Option<CompressionName>,

    /// Divide clusters into 32 subclusters, which are allocated one by one
    #[arg(long)]
    extended_l2: bool,

    /// Let refcounts be written late, under a mark that they are
    #[arg(long)]
    lazy_refcounts: bool,

    /// Bits of a refcount: 1 to 64 [default: 16]
    #[arg(long, value_name = "BITS")]
    refcount_bits: Option<u64>,

    /// Version of the format: v2 for very old readers [default: v3]
    #[arg(long, value_enum, value_name = "VERSION")]
    compat: Option<CompatName>,

    /// Keep the guest's data in a file of its own; a name that is meant from the image's directory
    #[arg(long, value_name = "FILE")]
    data_file: Option<String>,

    /// That file is a valid raw disk on its own
    #[arg(long, requires = "data_file")]
    data_file_raw: bool,

    /// Encrypt the guest's data; needs a new passphrase
    #[arg(long, value_enum, value_name = "HOW")]
    encrypt: Option<EncryptName>,

    #[command(flatten)]
    pub(crate) passphrase: NewPassphraseArgs,

    /// Any of these as qemu-img names them, such as encrypt.cipher-alg=aes-128; may be repeated
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE", value_parser = key_value)]
    options: Vec<(String, String)>,
}

/// How much is laid out at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PreallocationName {
    /// Nothing
    Off,
    /// The tables
    Metadata,
    /// Space for the data, too
    Falloc,
    /// Space for the data, with zeros written to it
    Full,
}

impl From<PreallocationName> for Preallocation {
    fn from(name: PreallocationName) -> Self {
        match name {
            PreallocationName::Off => Self::Off,
            PreallocationName::Metadata => Self::Metadata,
            PreallocationName::Falloc => Self::Falloc,
            PreallocationName::Full => Self::Full,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CompressionName {
    /// Read everywhere
    Zlib,
    /// Faster, and smaller
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CompatName {
    V2,
    V3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EncryptName {
    /// AES-256 with a key that passphrases open
    Luks,
    /// As very old images did; protects little
    Aes,
}

/// A pair of words with `=` between them.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl NewArgs {
    /// Options for a disk of `size` bytes.
    pub(crate) fn options(&self, size: u64) -> Result<CreateOptions, Failure> {
        self.options_with(size, self.passphrase.read()?)
    }

    /// The same where nothing is made: what the passphrase is makes no difference.
    pub(crate) fn options_to_measure(&self, size: u64) -> Result<CreateOptions, Failure> {
        let any = || self.encrypt.map(|_| Secret::new(b"any".to_vec()));
        self.options_with(size, self.passphrase.read()?.or_else(any))
    }

    fn options_with(&self, size: u64, secret: Option<Secret>) -> Result<CreateOptions, Failure> {
        let mut options = CreateOptions::new(size);
        let mut set = |key: &str, value: &str| options.set(key, value);
        if let Some(bytes) = self.cluster_size {
            set("cluster_size", &bytes.to_string())?;
        }
        if let Some(bits) = self.refcount_bits {
            set("refcount_bits", &bits.to_string())?;
        }
        if let Some(compat) = self.compat {
            set("compat", if compat == CompatName::V2 { "v2" } else { "v3" })?;
        }
        if let Some(kind) = self.compression_type {
            let zstd = kind == CompressionName::Zstd;
            set("compression_type", if zstd { "zstd" } else { "zlib" })?;
        }
        for (key, on) in [
            ("extended_l2", self.extended_l2),
            ("lazy_refcounts", self.lazy_refcounts),
            ("data_file_raw", self.data_file_raw),
        ] {
            if on {
                set(key, "on")?;
            }
        }
        if let Some(name) = &self.data_file {
            set("data_file", name)?;
        }
        if let Some(how) = self.encrypt {
            let luks = how == EncryptName::Luks;
            set("encrypt.format", if luks { "luks" } else { "aes" })?;
        }
        for (key, value) in &self.options {
            if key == "size" || key.starts_with("backing_") {
                return Err(Failure::new(format!("{key} is no option of -o here"))
                    .hint("the size is an argument, and --backing names the backing file"));
            }
            set(key, value)?;
        }
        if let Some(mode) = self.preallocation {
            options = options.preallocation(mode.into());
        }
        if let Some((name, format)) = self.backing.named() {
            options = options.backing_file(name, format.name());
        }
        if let Some(secret) = secret {
            options = options.secret(secret);
        }
        options.check()?;
        Ok(options)
    }

    /// Whether nothing was chosen; a passphrase is no choice.
    pub(crate) fn is_default(&self) -> bool {
        let plain = Self {
            passphrase: self.passphrase.clone(),
            ..Self::default()
        };
        *self == plain
    }

    /// Refuses what only qcow2 images have.
    pub(crate) fn check_raw(&self) -> Result<(), Failure> {
        let plain = Self {
            preallocation: self.preallocation,
            ..Self::default()
        };
        if *self != plain || self.preallocation == Some(PreallocationName::Metadata) {
            return Err(Failure::new(
                "a raw disk has no options but preallocation off, falloc and full",
            )
            .hint("-f qcow2, or -O qcow2 for a copy, makes an image"));
        }
        Ok(())
    }

    /// How the new image is opened that is to leave to its backing file what that has.
    pub(crate) fn open(&self, image: &Path, args: &OpenArgs) -> Result<ImageOptions, Failure> {
        let Some((name, _)) = self.backing.named() else {
            return Ok(Image::options());
        };
        let policy = backing_policy(image, name, args.policy()?)?;
        let mut options = Image::options().references(policy);
        for (layer, secret) in args.passphrases.read()? {
            if layer > 0 {
                options = options.layer_secret(layer, secret);
            }
        }
        Ok(options)
    }

    /// The name of the data file.
    fn data_path(image: &Path, options: &CreateOptions) -> Option<PathBuf> {
        let name = options.chosen_data_file()?;
        let name = String::from_utf8_lossy(name).into_owned();
        let folder = image.parent().unwrap_or(Path::new(""));
        Some(folder.join(name))
    }

    /// Makes a new image, and opens it for writing: its backing file as `open` says. The files are in their places once the caller
    /// keeps them.
    pub(crate) fn make(
        &self,
        path: &Path,
        options: &CreateOptions,
        consent: ConsentArgs,
        open: ImageOptions,
    ) -> Result<(Image, Vec<Fresh>), Failure> {
        consent.ask_to_replace(path)?;
        let data_path = Self::data_path(path, options);
        if let Some(data) = &data_path {
            consent.ask_to_replace(data)?;
        }
        // The data first: an image without it is none.
        let mut files = Vec::new();
        let data = match &data_path {
            Some(data) => {
                let (fresh, file) = Fresh::begin(data)?;
                files.push(fresh);
                Some(Arc::new(file))
            }
            None => None,
        };
        let (fresh, file) = Fresh::begin(path)?;
        files.push(fresh);
        let storage = data.as_deref().map(|file| file as &dyn Storage);
        write_image(&file, storage, options).map_err(|error| Failure::from(error).about(path))?;
        let mut open = open.path(path);
        if let Some(data) = data {
            open = open.data_file(data);
        }
        if let Some(secret) = self.passphrase.read()? {
            open = open.secret(secret);
        }
        let image = open
            .open_file(file)
            .map_err(|error| Failure::from(error).about(path))?;
        Ok((image, files))
    }
}

/// How the new image is opened whose backing file is not to be looked at.
pub(crate) fn blind(args: &BackingArgs) -> ImageOptions {
    match args.backing {
        Some(_) => Image::options().backing(Arc::new(Null::new())),
        None => Image::options().no_backing(),
    }
}

/// The backing file that was typed is the user's own word: it may lie anywhere. What it names may not.
pub(crate) fn backing_policy(
    image: &Path,
    name: &str,
    policy: References,
) -> Result<References, Failure> {
    let own = Resolver::new(References::All, image)
        .backing_file(image, name.as_bytes())
        .map_err(|source| qcow2_image::ImageError::Reference {
            what: "backing file",
            source,
        })?;
    let folder = |path: &Path| {
        path.parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
            .to_owned()
    };
    Ok(match policy {
        References::SameDirectory => {
            References::AllowList(vec![folder(image), folder(&own.canonical)])
        }
        References::Deny => References::AllowList(vec![own.canonical]),
        References::AllowList(mut list) => {
            list.push(own.canonical);
            References::AllowList(list)
        }
        other => other,
    })
}

/// Makes a raw disk; in its place it is once the caller keeps it.
pub(crate) fn make_raw(
    path: &Path,
    size: u64,
    preallocation: Preallocation,
    consent: ConsentArgs,
) -> Result<(File, Fresh), Failure> {
    consent.ask_to_replace(path)?;
    let (fresh, file) = Fresh::begin(path)?;
    let size = size.next_multiple_of(512);
    let made = file
        .set_len(size)
        .map_err(Failure::from)
        .and_then(|()| lay_out(&file, 0, size, preallocation));
    made.map_err(|failure| failure.about(path))?;
    Ok((file, fresh))
}

/// Lays out a part of a raw disk that reads as zeros.
pub(crate) fn lay_out(
    file: &dyn Storage,
    start: u64,
    end: u64,
    preallocation: Preallocation,
) -> Result<(), Failure> {
    match preallocation {
        Preallocation::Falloc if start < end => {
            file.write_zeroes(start..end, ZeroFlags::NONE)?;
        }
        Preallocation::Full => {
            let zeros = vec![0; PIECE];
            let mut at = start;
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
                file.write_at(zeros.get(..len).unwrap_or(&zeros), at)?;
                at += len as u64;
            }
            file.flush()?;
        }
        _ => {}
    }
    Ok(())
}
