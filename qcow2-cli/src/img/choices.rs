//! What can be chosen about a new image, by format.

use crate::{Console, say};

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Switch,
    Number,
    Size,
}

/// An option: name, kind, what it is for, and the value that is shown where none was given.
pub(super) type Option_ = (&'static str, Kind, &'static str, Option<&'static str>);

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

    pub(super) fn own(self) -> &'static [Option_] {
        match self {
            Self::Qcow2 => QCOW2,
            Self::Raw => RAW,
            Self::Luks => LUKS,
        }
    }

    /// All options: the format's, then those of the file that are not the format's already.
    pub(super) fn all(self) -> impl Iterator<Item = &'static Option_> {
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
}
