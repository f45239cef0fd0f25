use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{env, fmt};

use base64ct::{Base64, Encoding};
use zeroize::{Zeroize, Zeroizing};

/// A passphrase or key: bytes that nobody sees and that are overwritten when dropped.
///
/// All bytes count, as in a `secret` object of QEMU: a newline at the end of a file is part of the secret.
///
/// There is no `Clone`, no `PartialEq`, and a `Debug` that shows nothing.
pub struct Secret(Zeroizing<Vec<u8>>);

/// Why there is no secret. Never shows a part of one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file can't be read.
    #[error("the secret in {} can't be read", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A stream can't be read.
    #[error("the secret can't be read")]
    Read {
        /// Why.
        source: io::Error,
    },
    /// There is no such environment variable.
    #[error("the environment variable {name:?}, which should hold a secret, is not set")]
    NotSet {
        /// Its name.
        name: String,
    },
    /// It is longer than any secret should be.
    #[error("the secret is longer than {limit} bytes")]
    TooLong {
        /// Bytes it may have.
        limit: usize,
    },
    /// It should be text in Base64 and isn't.
    #[error("the secret is not valid Base64")]
    NotBase64,
}

impl Secret {
    /// Bytes of the longest secret that is read from anywhere.
    pub const MAX_LEN: usize = 64 * 1024;

    /// Takes bytes that are at hand.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The content of a file.
    ///
    /// # Errors
    ///
    /// [`File`](SecretError::File), [`TooLong`](SecretError::TooLong).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, SecretError> {
        let path = path.as_ref();
        let read = File::open(path).and_then(read_all);
        let bytes = read.map_err(|source| SecretError::File {
            path: path.to_owned(),
            source,
        })?;
        Self::bounded(bytes)
    }

    /// The value of an environment variable. It stays in the environment, where child processes find it too.
    ///
    /// # Errors
    ///
    /// [`NotSet`](SecretError::NotSet), [`TooLong`](SecretError::TooLong).
    pub fn from_env(name: &str) -> Result<Self, SecretError> {
        // A name that can't be set makes `var_os` give nothing, as one that isn't set.
        let value = env::var_os(name).map(OsString::into_vec);
        let bytes = value.ok_or_else(|| SecretError::NotSet {
            name: name.to_owned(),
        })?;
        Self::bounded(Zeroizing::new(bytes))
    }

    /// All that a stream gives until it ends: standard input, a descriptor.
    ///
    /// # Errors
    ///
    /// [`Read`](SecretError::Read), [`TooLong`](SecretError::TooLong).
    pub fn from_reader(reader: impl Read) -> Result<Self, SecretError> {
        let bytes = read_all(reader).map_err(|source| SecretError::Read { source })?;
        Self::bounded(bytes)
    }

    /// The bytes that this secret says in Base64, with padding; white space doesn't count.
    ///
    /// # Errors
    ///
    /// [`NotBase64`](SecretError::NotBase64).
    pub fn decode_base64(self) -> Result<Self, SecretError> {
        let mut text = self.0;
        text.retain(|byte| !byte.is_ascii_whitespace());
        let mut bytes = Zeroizing::new(vec![0; text.len()]);
        let len = match Base64::decode(&*text, &mut bytes) {
            Ok(decoded) => decoded.len(),
            Err(_) => return Err(SecretError::NotBase64),
        };
        bytes.truncate(len);
        Ok(Self(bytes))
    }

    /// The bytes. Whoever copies them overwrites the copy.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether QEMU would take this for a passphrase: UTF-8 without NUL bytes. It can't open what any other encrypts.
    pub fn is_text(&self) -> bool {
        std::str::from_utf8(&self.0).is_ok() && !self.0.contains(&0)
    }

    fn bounded(bytes: Zeroizing<Vec<u8>>) -> Result<Self, SecretError> {
        if bytes.len() > Self::MAX_LEN {
            return Err(SecretError::TooLong {
                limit: Self::MAX_LEN,
            });
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Up to one byte more than a secret may have, into memory that never moves: a growing vector leaves copies behind.
fn read_all(mut reader: impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; Secret::MAX_LEN + 1]);
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if let Some(rest) = bytes.get_mut(filled..) {
        rest.zeroize();
    }
    bytes.truncate(filled);
    Ok(bytes)
}
