use std::fmt;
use std::str::FromStr;

use super::{CipherError, Hash};

/// Where the initialization vector of a sector comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IvGenerator {
    /// The low 32 bits of the sector number, little-endian, then zeros: starts over every 2 TiB.
    Plain,
    /// The sector number in 64 bits, little-endian, then zeros.
    Plain64,
    /// The sector number as by [`Plain64`](Self::Plain64), enciphered under the hash of the key.
    Essiv(Hash),
}

/// As it stands in a LUKS header: `plain64`, `essiv:sha256`.
impl fmt::Display for IvGenerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("plain"),
            Self::Plain64 => f.write_str("plain64"),
            Self::Essiv(hash) => write!(f, "essiv:{hash}"),
        }
    }
}

/// Reads what a LUKS header says. A hash after `plain` or `plain64` must be known, and means nothing.
impl FromStr for IvGenerator {
    type Err = CipherError;

    fn from_str(text: &str) -> Result<Self, CipherError> {
        let (name, hash) = match text.split_once(':') {
            Some((name, hash)) => (name, Some(hash.parse()?)),
            None => (text, None),
        };
        match (name, hash) {
            ("plain", _) => Ok(Self::Plain),
            ("plain64", _) => Ok(Self::Plain64),
            ("essiv", Some(hash)) => Ok(Self::Essiv(hash)),
            ("essiv", None) => Err(CipherError::EssivWithoutHash),
            _ => Err(CipherError::UnknownName {
                what: "IV generator",
                name: name.to_owned(),
            }),
        }
    }
}
