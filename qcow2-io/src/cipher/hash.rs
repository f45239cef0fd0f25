use std::fmt;
use std::str::FromStr;

use super::CipherError;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hash {
    /// MD5.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// Runs `$body` with the type of a hash under the name `$Digest`.
macro_rules! with_digest {
    ($hash:expr, $Digest:ident => $body:expr) => {{
        use $crate::cipher::Hash;
        match $hash {
            Hash::Md5 => {
                type $Digest = md5::Md5;
                $body
            }
            Hash::Sha1 => {
                type $Digest = sha1::Sha1;
                $body
            }
            Hash::Sha224 => {
                type $Digest = sha2::Sha224;
                $body
            }
            Hash::Sha256 => {
                type $Digest = sha2::Sha256;
                $body
            }
            Hash::Sha384 => {
                type $Digest = sha2::Sha384;
                $body
            }
            Hash::Sha512 => {
                type $Digest = sha2::Sha512;
                $body
            }
            Hash::Ripemd160 => {
                type $Digest = ripemd::Ripemd160;
                $body
            }
            Hash::Sm3 => {
                type $Digest = sm3::Sm3;
                $body
            }
        }
    }};
}
pub(super) use with_digest;

impl Hash {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// Bytes of a digest.
    pub fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }
}

/// As LUKS headers and QEMU's option `hash-alg` call it: `sha256`.
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Hash {
    type Err = CipherError;

    fn from_str(name: &str) -> Result<Self, CipherError> {
        let found = Self::ALL.into_iter().find(|it| it.name() == name);
        found.ok_or_else(|| CipherError::UnknownName {
            what: "hash",
            name: name.to_owned(),
        })
    }
}
