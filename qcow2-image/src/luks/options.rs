use std::time::Duration;

use qcow2_format::LuksHeader;
use qcow2_io::cipher::{Algorithm, Hash, IvGenerator, Mode};

use super::suite::Suite;
use super::{KeyCost, LuksError};

/// What can be chosen about a new LUKS area. The defaults are those of `qemu-img create`: AES-256 in XTS mode, vectors by
/// `plain64`, SHA-256, two seconds.
///
/// Nothing is judged before the area is [created](super::create) or [measured](Self::area_len).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct LuksOptions {
    algorithm: Algorithm,
    mode: Mode,
    vectors: Vectors,
    /// Hash of the vectors; `None` is SHA-256 for those that need one. Others store it and ignore it.
    vectors_hash: Option<Hash>,
    hash: Hash,
    cost: KeyCost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    Plain,
    Plain64,
    Essiv,
}

impl Default for LuksOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl LuksOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self {
            algorithm: Algorithm::Aes256,
            mode: Mode::Xts,
            vectors: Vectors::Plain64,
            vectors_hash: None,
            hash: Hash::Sha256,
            cost: KeyCost::default(),
        }
    }

    /// What data is encrypted with.
    pub fn algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// How it is put to the blocks of a sector.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Where initialization vectors come from.
    pub fn iv_generator(mut self, generator: IvGenerator) -> Self {
        (self.vectors, self.vectors_hash) = match generator {
            IvGenerator::Plain => (Vectors::Plain, None),
            IvGenerator::Essiv(hash) => (Vectors::Essiv, Some(hash)),
            _ => (Vectors::Plain64, None),
        };
        self
    }

    /// What keys are derived with.
    pub fn hash(mut self, hash: Hash) -> Self {
        self.hash = hash;
        self
    }

    /// How much work a passphrase shall be to try.
    pub fn cost(mut self, cost: KeyCost) -> Self {
        self.cost = cost;
        self
    }

    /// Sets an option as `qemu-img create -o encrypt.key=value` does.
    ///
    /// Keys: `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`. The time is in
    /// milliseconds: decimal, hexadecimal after `0x`, or octal after `0`.
    ///
    /// # Errors
    ///
    /// An unknown key, or a value that the key doesn't know; nothing is changed then.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), LuksError> {
        match key {
            "cipher-alg" => self.algorithm = value.parse()?,
            "cipher-mode" => self.mode = value.parse()?,
            "ivgen-alg" => {
                self.vectors = match value {
                    "plain" => Vectors::Plain,
                    "plain64" => Vectors::Plain64,
                    "essiv" => Vectors::Essiv,
                    _ => {
                        return Err(LuksError::UnknownVectors {
                            value: value.to_owned(),
                        });
                    }
                }
            }
            "ivgen-hash-alg" => self.vectors_hash = Some(value.parse()?),
            "hash-alg" => self.hash = value.parse()?,
            "iter-time" => {
                let time = number(value).ok_or_else(|| LuksError::NotATime {
                    value: value.to_owned(),
                })?;
                self.cost = KeyCost::Time(Duration::from_millis(time));
            }
            _ => {
                return Err(LuksError::UnknownOption {
                    option: key.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Bytes of the area, a multiple of 4096.
    ///
    /// # Errors
    ///
    /// Options that don't go together: XTS with blocks of 8 bytes, ESSIV with a hash whose digest is no key of the cipher, keys
    /// of 192 bits in another mode than XTS (their key material fills no sectors; QEMU aborts).
    pub fn area_len(&self) -> Result<u64, LuksError> {
        Ok(LuksHeader::area_len(self.suite()?.key_len_bytes())?)
    }

    pub(super) fn key_cost(&self) -> KeyCost {
        self.cost
    }

    /// The algorithms, if they go together.
    pub(super) fn suite(&self) -> Result<Suite, LuksError> {
        let suite = Suite {
            algorithm: self.algorithm,
            mode: self.mode,
            iv_generator: match self.vectors {
                Vectors::Plain => IvGenerator::Plain,
                Vectors::Plain64 => IvGenerator::Plain64,
                Vectors::Essiv => IvGenerator::Essiv(self.vectors_hash.unwrap_or(Hash::Sha256)),
            },
            hash: self.hash,
        };
        suite.check()?;
        Ok(suite)
    }

    /// Mode and vectors as the header has them.
    pub(super) fn cipher_mode(&self) -> String {
        let mode = self.mode;
        match (self.vectors, self.vectors_hash) {
            (Vectors::Plain, None) => format!("{mode}-plain"),
            (Vectors::Plain64, None) => format!("{mode}-plain64"),
            (Vectors::Plain, Some(hash)) => format!("{mode}-plain:{hash}"),
            (Vectors::Plain64, Some(hash)) => format!("{mode}-plain64:{hash}"),
            (Vectors::Essiv, hash) => format!("{mode}-essiv:{}", hash.unwrap_or(Hash::Sha256)),
        }
    }
}

fn number(value: &str) -> Option<u64> {
    let (digits, radix) = match (value.strip_prefix("0x"), value.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(octal)) if !octal.is_empty() => (octal, 8),
        _ => (value, 10),
    };
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_qemu_reads_numbers() {
        for (text, time) in [
            ("0", Some(0)),
            ("10", Some(10)),
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("", None),
            ("-1", None),
            ("+1", None),
            ("1.5", None),
            ("10k", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(number(text), time, "{text}");
        }
    }

    #[test]
    fn a_refused_value_changes_nothing() {
        let mut options = LuksOptions::new();
        for (key, value) in [
            ("cipher-alg", "des"),
            ("cipher-alg", "AES-256"),
            ("cipher-mode", "gcm"),
            ("ivgen-alg", "benbi"),
            ("ivgen-alg", "essiv:sha256"),
            ("ivgen-hash-alg", "sha3"),
            ("hash-alg", ""),
            ("iter-time", "soon"),
            ("key-secret", "s"),
        ] {
            assert!(options.set(key, value).is_err(), "{key}={value}");
        }
        assert_eq!(options, LuksOptions::new());
    }
}
