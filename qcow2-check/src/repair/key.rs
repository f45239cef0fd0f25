//! The key of encrypted data, for what has to be moved.
//!
//! Sectors are numbered for the cipher: in a LUKS image by where they lie in the file, in a legacy one by where they belong on the disk. So
//! what a LUKS image has can't be moved as it is. This crate knows no ciphers; who has the key implements [`Key`].

use std::error::Error;
use std::fmt;

use qcow2_format::header::Header;
use qcow2_format::{GuestOffset, HostOffset};
use qcow2_io::Storage;

/// Why a key can't be had, or a cipher not used.
pub type KeyError = Box<dyn Error + Send + Sync>;

/// Gives the cipher of an image's guest data.
pub trait Key: Sync {
    /// Opens the cipher. `image` is the image as far as it is repaired by now, `header` its header.
    ///
    /// Called once a plan, and only if something encrypted has to be moved.
    ///
    /// # Errors
    ///
    /// The key does not fit, or the image's key material is damaged. Then there is no plan.
    fn open(&self, image: &dyn Storage, header: &Header) -> Result<Box<dyn DataCipher>, KeyError>;
}

/// Ciphers guest data, in place. Buffers are whole sectors of 512 bytes, offsets are multiples of that.
pub trait DataCipher: fmt::Debug + Send + Sync {
    /// Deciphers what lies at `host` and belongs at `guest`.
    ///
    /// # Errors
    ///
    /// The cipher can't count that far.
    fn decrypt(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        sectors: &mut [u8],
    ) -> Result<(), KeyError>;

    /// Enciphers what will lie at `host` and belongs at `guest`.
    ///
    /// # Errors
    ///
    /// The cipher can't count that far.
    fn encrypt(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        sectors: &mut [u8],
    ) -> Result<(), KeyError>;
}
