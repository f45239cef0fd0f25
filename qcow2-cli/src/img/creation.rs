//! `-o`: what can be chosen about a new image, by format.

use std::fmt::Write as _;

use qcow2_image::create::{CreateError, CreateOptions, Preallocation};

use super::Failure;
use crate::node;
use crate::words::{keyval, outside, size};
use crate::{Console, Objects, say};

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Switch,
    Number,
    Size,
}

/// An option: name, kind, what it is for, and the value that is shown where none was given.
type Option_ = (&'static str, Kind, &'static str, Option<&'static str>);

/// Those of qcow2, in the order in which they are shown.
const QCOW2: &[Option_] = &[
    (
        "encryption",
        Kind::Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        None,
    ),
    (
        "encrypt.format",
        Kind::Text,
        "Encrypt the image, format choices: 'aes', 'luks'",
        None,
    ),
    (
        "encrypt.key-secret",
        Kind::Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
        None,
    ),
    (
        "encrypt.cipher-alg",
        Kind::Text,
        "Name of encryption cipher algorithm",
        None,
    ),
    (
        "encrypt.cipher-mode",
        Kind::Text,
        "Name of encryption cipher mode",
        None,
    ),
    (
        "encrypt.ivgen-alg",
        Kind::Text,
        "Name of IV generator algorithm",
        None,
    ),
    (
        "encrypt.ivgen-hash-alg",
        Kind::Text,
        "Name of IV generator hash algorithm",
        None,
    ),
    (
        "encrypt.hash-alg",
        Kind::Text,
        "Name of encryption hash algorithm",
        None,
    ),
    (
        "encrypt.iter-time",
        Kind::Number,
        "Time to spend in PBKDF in milliseconds",
        None,
    ),
    (
        "cluster_size",
        Kind::Size,
        "qcow2 cluster size",
        Some("65536"),
    ),
    (
        "extended_l2",
        Kind::Switch,
        "Extended L2 tables",
        Some("off"),
    ),
    (
        "preallocation",
        Kind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        None,
    ),
    (
        "compression_type",
        Kind::Text,
        "Compression method used for image cluster compression",
        Some("zlib"),
    ),
    ("size", Kind::Size, "Virtual disk size", None),
    (
        "compat",
        Kind::Text,
        "Compatibility level (v2 [0.10] or v3 [1.1])",
        None,
    ),
    (
        "backing_file",
        Kind::Text,
        "File name of a base image",
        None,
    ),
    (
        "backing_fmt",
        Kind::Text,
        "Image format of the base image",
        None,
    ),
    (
        "data_file",
        Kind::Text,
        "File name of an external data file",
        None,
    ),
    (
        "data_file_raw",
        Kind::Switch,
        "The external data file must stay valid as a raw image",
        None,
    ),
    (
        "lazy_refcounts",
        Kind::Switch,
        "Postpone refcount updates",
        Some("off"),
    ),
    (
        "refcount_bits",
        Kind::Number,
        "Width of a reference count entry in bits",
        Some("16"),
    ),
];
/// Those of raw images.
const RAW: &[Option_] = &[("size", Kind::Size, "Virtual disk size", None)];
/// Those of LUKS volumes.
const LUKS: &[Option_] = &[
    ("size", Kind::Size, "Virtual disk size", None),
    (
        "key-secret",
        Kind::Text,
        "ID of the secret that provides the keyslot key",
        None,
    ),
    (
        "cipher-alg",
        Kind::Text,
        "Name of encryption cipher algorithm",
        None,
    ),
    (
        "cipher-mode",
        Kind::Text,
        "Name of encryption cipher mode",
        None,
    ),
    (
        "ivgen-alg",
        Kind::Text,
        "Name of IV generator algorithm",
        None,
    ),
    (
        "ivgen-hash-alg",
        Kind::Text,
        "Name of IV generator hash algorithm",
        None,
    ),
    (
        "hash-alg",
        Kind::Text,
        "Name of encryption hash algorithm",
        None,
    ),
    (
        "iter-time",
        Kind::Number,
        "Time to spend in PBKDF in milliseconds",
        None,
    ),
];
/// Those of the file that an image lies in.
const FILE: &[Option_] = &[
    (
        "nocow",
        Kind::Switch,
        "Turn off copy-on-write (valid only on btrfs)",
        None,
    ),
    (
        "preallocation",
        Kind::Text,
        "Preallocation mode (allowed values: off, falloc, full)",
        None,
    ),
    (
        "extent_size_hint",
        Kind::Size,
        "Extent size hint for the image file, 0 to disable",
        None,
    ),
];

/// Formats that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// qcow2 images.
    Qcow2,
    /// Plain bytes.
    Raw,
    /// An encrypted volume.
    Luks,
}

/// Formats that images of exist, but that nothing is made in.
const READ_ONLY_FORMATS: &[&str] = &["bochs", "cloop", "dmg"];

impl Format {
    /// The format of that name.
    pub(crate) fn from_name(name: &str) -> Result<Self, String> {
        Ok(match name {
            "qcow2" => Self::Qcow2,
            "raw" => Self::Raw,
            "luks" => Self::Luks,
            name if READ_ONLY_FORMATS.contains(&name) => {
                return Err(format!(
                    "Format driver '{name}' does not support image creation"
                ));
            }
            name => return Err(format!("Unknown file format '{name}'")),
        })
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Luks => "luks",
        }
    }

    fn own(self) -> &'static [Option_] {
        match self {
            Self::Qcow2 => QCOW2,
            Self::Raw => RAW,
            Self::Luks => LUKS,
        }
    }

    /// All options: the format's, then those of the file that are not the format's already.
    fn all(self) -> impl Iterator<Item = &'static Option_> {
        let own = self.own();
        own.iter().chain(
            FILE.iter()
                .filter(|(name, ..)| own.iter().all(|(known, ..)| known != name)),
        )
    }
}

/// Whether a list of options asks for help: `help` or `?` stands in it for an option.
pub(crate) fn asks_for_help(list: &str) -> bool {
    let list = list.replace(",,", "\0");
    list.split(',').any(|word| word == "help" || word == "?")
}

/// Lists of which the last counts: whether they can be joined. A list that begins or ends with a lone comma can't.
pub(crate) fn is_list(list: &str) -> bool {
    if list.is_empty() || list.starts_with(',') {
        return false;
    }
    let commas = list.bytes().rev().take_while(|&byte| byte == b',').count();
    commas % 2 == 0
}

/// Shows what can be chosen.
pub(crate) fn help(format: Format, with_file: bool, console: &Console) {
    let mut lines: Vec<&Option_> = if with_file {
        format.all().collect()
    } else {
        format.own().iter().collect()
    };
    lines.sort_by_key(|(name, ..)| *name);
    if with_file {
        say!(console, "Supported options:");
    } else {
        say!(console, "Supported {} options:", format.name());
    }
    for (name, kind, what, _) in lines {
        let kind = match kind {
            Kind::Text => "str",
            Kind::Switch => "bool (on/off)",
            Kind::Number => "num",
            Kind::Size => "size",
        };
        say!(console, "  {:<22} - {what}", format!("{name}=<{kind}>"));
    }
    if !with_file {
        say!(console);
        say!(console, "The protocol level may support further options.");
        say!(
            console,
            "Specify the target filename to include those options."
        );
    }
}

/// The chosen options of a new image, in words.
#[derive(Clone, Debug)]
pub(crate) struct Creation {
    pub(crate) format: Format,
    values: Vec<(&'static str, String)>,
}

/// An option that is refused: the text, and lines below.
pub(crate) type Refusal = (String, Vec<String>);

/// Whether it is a plain number below zero.
fn is_negative(value: &str) -> bool {
    let digits = value.strip_prefix('-').unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// What to say of a value that is no number of bytes.
pub(crate) fn no_size(key: &str) -> Refusal {
    (
        format!("Parameter '{key}' expects a non-negative number below 2^64"),
        vec![
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-".to_owned(),
            "and exabytes, respectively.".to_owned(),
        ],
    )
}

impl Creation {
    /// Nothing chosen.
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            values: Vec::new(),
        }
    }

    /// Takes over a list; what comes later counts.
    pub(crate) fn add_list(&mut self, list: &str) -> Result<(), Refusal> {
        for (key, value) in keyval::parse(list, None) {
            self.set(&key, &value)?;
        }
        Ok(())
    }

    /// Takes over one option. The kind of its value is checked, not the value.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        let plain = |text: String| (text, Vec::new());
        let Some((name, kind, ..)) = self.format.all().find(|(name, ..)| *name == key) else {
            return Err(plain(format!("Invalid parameter '{key}'")));
        };
        let value = match kind {
            Kind::Text => value.to_owned(),
            Kind::Switch => match value {
                "on" | "yes" | "true" | "y" => "on".to_owned(),
                "off" | "no" | "false" | "n" => "off".to_owned(),
                _ => return Err(plain(format!("Parameter '{key}' expects 'on' or 'off'"))),
            },
            Kind::Number => {
                let number = value.strip_prefix('-').unwrap_or(value);
                let parsed = match number.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).ok(),
                    None => number.parse().ok(),
                };
                if parsed.is_none() {
                    return Err(plain(format!("Parameter '{key}' expects a number")));
                }
                value.to_owned()
            }
            Kind::Size => match size::parse(value) {
                Ok(bytes) => bytes.to_string(),
                Err(_) if is_negative(value) => {
                    return Err(plain(format!(
                        "Value '{value}' is out of range for parameter '{key}'"
                    )));
                }
                Err(size::SizeError::Range) => {
                    return Err(plain(format!(
                        "Value '{value}' is out of range for parameter '{key}'"
                    )));
                }
                Err(size::SizeError::Invalid) => return Err(no_size(key)),
            },
        };
        self.values.retain(|(found, _)| found != name);
        self.values.push((name, value));
        Ok(())
    }

    /// What was chosen for an option.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let mut values = self.values.iter();
        values
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.as_str())
    }

    /// The line that announces the new image: ` key=value` for each option, defaults among them.
    pub(crate) fn line(&self) -> String {
        let mut line = String::new();
        for (name, _, _, default) in self.format.all() {
            if let Some(value) = self.get(name).or(*default) {
                _ = write!(line, " {name}={}", keyval::escape(value));
            }
        }
        line
    }

    /// The options of a qcow2 image, as far as the format has them.
    pub(crate) fn to_options(&self, objects: &Objects) -> Result<CreateOptions, String> {
        let mut options = CreateOptions::default();
        let aes = self.get("encryption") == Some("on");
        let encrypted = aes || self.get("encrypt.format").is_some();
        if !encrypted
            && self
                .values
                .iter()
                .any(|(name, _)| name.starts_with("encrypt."))
        {
            return Err("Parameter 'encrypt.format' is missing".to_owned());
        }
        for (key, value) in &self.values {
            match *key {
                "encrypt.key-secret" | "nocow" | "extent_size_hint" => {}
                "data_file" | "backing_file" | "backing_fmt" if value.is_empty() => {}
                "refcount_bits" if value.starts_with('-') => {
                    return Err(text_of(&CreateError::RefcountBits { found: u64::MAX }));
                }
                key => options.set(key, value).map_err(|error| text_of(&error))?,
            }
        }
        // Names as they came, whatever they are made of.
        let named = |key| self.get(key).filter(|value| !value.is_empty());
        if let (Some(name), Some(format)) = (named("backing_file"), named("backing_fmt")) {
            options = options.backing_file(outside::bytes(name), format);
        }
        if let Some(name) = named("data_file") {
            options = options.data_file(outside::bytes(&node::without_protocol(name)));
        }
        if encrypted {
            let id = self
                .get("encrypt.key-secret")
                .ok_or("Parameter 'encrypt.key-secret' is required for cipher")?;
            let secret = objects.secret(id).map_err(|error| error.0)?;
            options = options.secret(secret);
        }
        Ok(options)
    }

    /// How a plain file is laid out.
    pub(crate) fn preallocation(&self) -> Result<Preallocation, String> {
        match self.get("preallocation") {
            None | Some("off") => Ok(Preallocation::Off),
            Some("falloc") => Ok(Preallocation::Falloc),
            Some("full") => Ok(Preallocation::Full),
            Some("metadata") => Err("Unsupported preallocation mode 'metadata'".to_owned()),
            Some(other) => Err(format!(
                "Parameter 'preallocation' does not accept value '{other}'"
            )),
        }
    }
}

/// Why an image can't be made, in the usual words.
pub(crate) fn text_of(error: &CreateError) -> String {
    let newer = "with compatibility level 1.1 and above (use version=v3 or greater)";
    match error {
        CreateError::UnknownValue { option, value, .. } => {
            let option = match *option {
                "compat" => "version",
                "compression_type" => "compression-type",
                "encrypt.format" => "format",
                other => other,
            };
            format!("Parameter '{option}' does not accept value '{value}'")
        }
        CreateError::ClusterSize { .. } => {
            "Cluster size must be a power of two between 512 and 2048k".to_owned()
        }
        CreateError::ExtendedClusterSize { .. } => {
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
                .to_owned()
        }
        CreateError::RefcountBits { .. } => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        CreateError::NeedsVersion3 { option, .. } => match *option {
            "lazy_refcounts" => format!("Lazy refcounts only supported {newer}"),
            "refcount_bits" => {
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)"
                    .to_owned()
            }
            "extended_l2" => format!("Extended L2 entries are only supported {newer}"),
            "compression_type" => format!("Non-zlib compression type is only supported {newer}"),
            _ => format!("External data files are only supported {newer}"),
        },
        CreateError::SizeTooLarge { .. } => {
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
                .to_owned()
        }
        CreateError::BackingFileMissing => {
            "Backing format cannot be used without backing file".to_owned()
        }
        CreateError::PreallocatedOverlay { .. } => {
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .to_owned()
        }
        CreateError::RawWithoutDataFile => "data-file-raw requires data-file".to_owned(),
        CreateError::RawWithBackingFile => {
            "Backing file and data-file-raw cannot be used at the same time".to_owned()
        }
        CreateError::NameTooLong { .. } => "Backing file name too long".to_owned(),
        CreateError::Luks(error) => luks_text(error),
        other => {
            let mut text = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            text
        }
    }
}

fn luks_text(error: &qcow2_image::luks::LuksError) -> String {
    use qcow2_image::luks::LuksError;
    match error {
        LuksError::UnknownVectors { value } => {
            format!("Parameter 'ivgen-alg' does not accept value '{value}'")
        }
        other => other.to_string(),
    }
}

/// A refusal as a failure of the program, with the file it is about.
pub(crate) fn refused(name: &str, (text, hints): Refusal) -> Failure {
    hints
        .into_iter()
        .fold(Failure::new(format_args!("{name}: {text}")), Failure::hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_asked_for_by_a_word_of_its_own() {
        for list in ["help", "?", "a=b,help", "help,a=b", "a,?,b"] {
            assert!(asks_for_help(list), "{list}");
        }
        for list in ["", "a=help", "backing_file=x,,help", "helper", "help=on"] {
            assert!(!asks_for_help(list), "{list}");
        }
    }

    #[test]
    fn the_line_has_what_was_chosen_and_the_defaults_in_a_fixed_order() {
        let mut creation = Creation::new(Format::Qcow2);
        creation
            .add_list("size=1M,compat=v3,cluster_size=4k,cluster_size=8k")
            .unwrap();
        creation.set("backing_file", "a,b").unwrap();
        assert_eq!(
            creation.line(),
            " cluster_size=8192 extended_l2=off compression_type=zlib size=1048576 compat=v3 \
             backing_file=a,,b lazy_refcounts=off refcount_bits=16"
        );
        assert_eq!(
            creation.set("foo", "1").unwrap_err().0,
            "Invalid parameter 'foo'"
        );
        assert!(creation.set("lazy_refcounts", "maybe").is_err());
    }
}
