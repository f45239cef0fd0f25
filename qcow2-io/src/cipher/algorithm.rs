use std::fmt;
use std::str::FromStr;

use super::CipherError;

/// A block cipher with its key length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// AES with keys of 128 bits.
    Aes128,
    /// AES with keys of 192 bits.
    Aes192,
    /// AES with keys of 256 bits.
    Aes256,
    /// Serpent with keys of 128 bits.
    Serpent128,
    /// Serpent with keys of 192 bits.
    Serpent192,
    /// Serpent with keys of 256 bits.
    Serpent256,
    /// Twofish with keys of 128 bits.
    Twofish128,
    /// Twofish with keys of 192 bits.
    Twofish192,
    /// Twofish with keys of 256 bits.
    Twofish256,
    /// CAST-128 with keys of 128 bits; its blocks have 8 bytes.
    Cast5,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
        Self::Cast5,
    ];

    /// Bytes of the cipher's own key. A mode may need two: [`Mode::key_len`].
    pub fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Serpent128 | Self::Twofish128 | Self::Cast5 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// Bytes of a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::Cast5 => 8,
            _ => 16,
        }
    }

    /// The name in a LUKS header, which leaves the key length to another field.
    pub fn luks_name(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "aes",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// The algorithm that a LUKS header means: its cipher name, and a key length that counts both halves of an XTS key.
    ///
    /// # Errors
    ///
    /// [`UnknownName`](CipherError::UnknownName), or [`NoSuchKeyLength`](CipherError::NoSuchKeyLength) when the cipher is
    /// known.
    pub fn from_luks(name: &str, mode: Mode, key_len: usize) -> Result<Self, CipherError> {
        let mut variants = Self::ALL
            .into_iter()
            .filter(|it| it.luks_name() == name)
            .peekable();
        if variants.peek().is_none() {
            return Err(CipherError::UnknownName {
                what: "cipher",
                name: name.to_owned(),
            });
        }
        variants
            .find(|it| mode.key_len(*it) == key_len)
            .ok_or_else(|| CipherError::NoSuchKeyLength {
                name: name.to_owned(),
                mode,
                len: key_len,
            })
    }

    /// The variant of the same cipher with keys of `len` bytes.
    pub(super) fn with_key_len(self, len: usize) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|it| it.luks_name() == self.luks_name() && it.key_len() == len)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
            Self::Cast5 => "cast5-128",
        }
    }
}

/// As QEMU's option `cipher-alg` calls it: `aes-256`.
impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = CipherError;

    fn from_str(name: &str) -> Result<Self, CipherError> {
        let found = Self::ALL.into_iter().find(|it| it.name() == name);
        found.ok_or_else(|| CipherError::UnknownName {
            what: "cipher",
            name: name.to_owned(),
        })
    }
}

/// How a block cipher is put to the blocks of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// XEX with ciphertext stealing, which whole sectors never need. Takes two keys.
    Xts,
    /// Cipher block chaining, from a new IV in each sector.
    Cbc,
    /// A counter that starts at the IV in each sector. Whoever sees a sector twice, before and after it was rewritten, sees
    /// the difference of its content.
    Ctr,
    /// Every block by itself, without an IV. Shows which blocks are equal.
    Ecb,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Xts, Self::Cbc, Self::Ctr, Self::Ecb];

    /// Bytes of key that this mode needs for `algorithm`.
    pub fn key_len(self, algorithm: Algorithm) -> usize {
        match self {
            Self::Xts => 2 * algorithm.key_len(),
            _ => algorithm.key_len(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ctr => "ctr",
            Self::Ecb => "ecb",
        }
    }
}

/// As LUKS headers and QEMU's option `cipher-mode` call it: `xts`.
impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = CipherError;

    fn from_str(name: &str) -> Result<Self, CipherError> {
        let found = Self::ALL.into_iter().find(|it| it.name() == name);
        found.ok_or_else(|| CipherError::UnknownName {
            what: "cipher mode",
            name: name.to_owned(),
        })
    }
}
