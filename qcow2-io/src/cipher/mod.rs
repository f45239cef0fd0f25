//! How encrypted clusters are enciphered, and how keys come from passphrases.
//!
//! Primitives only: block ciphers over 512-byte sectors, PBKDF2, the anti-forensic splitter of LUKS, and [`Secret`] for what
//! nobody may see. What a LUKS header or a qcow2 header says about them is other crates' knowledge.
//!
//! Keys and passphrases are overwritten when dropped, and no `Debug`, `Display` or error shows one.

mod algorithm;
mod error;
mod hash;
mod iv;
mod key;
mod modes;
mod secret;
mod sector;
mod split;
#[cfg(test)]
mod tests;
mod twofish;
mod xts;

pub use algorithm::{Algorithm, Mode};
pub use error::CipherError;
pub use hash::Hash;
pub use iv::IvGenerator;
pub use key::{MIN_ITERATIONS, calibrate, derive_key, random};
pub use secret::{Secret, SecretError};
pub use sector::{SECTOR_LEN, SectorCipher};
pub use split::{merge_key, split_key};
/// Bytes that are overwritten when dropped.
pub use zeroize::Zeroizing;
