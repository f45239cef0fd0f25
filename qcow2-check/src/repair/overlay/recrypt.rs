//! Encrypted data in the picture: what is copied is deciphered where it was, and enciphered where it goes.

use qcow2_format::{GuestOffset, HostOffset};
use qcow2_io::{Operation, Result, StorageError, StorageErrorKind};

use super::{Content, Overlay, PAGE};
use crate::repair::key::DataCipher;

impl Overlay<'_> {
    /// As [`copy`](Self::copy), for encrypted data that belongs at `guest` on the disk: it is what it was, at its new place. The cipher must
    /// be set.
    pub(in super::super) fn copy_encrypted(
        &self,
        layer: usize,
        from: u64,
        to: u64,
        len: u64,
        guest: u64,
    ) -> Result<()> {
        if !to.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.read_below(&self.state(), layer, &mut bytes, from)?;
            self.recrypt(from, to, guest, &mut bytes)?;
            return self.write(layer, to, &bytes);
        }
        self.put_pages(layer, to, len, |step| {
            Content::Recrypted(from + step, guest + step)
        });
        Ok(())
    }

    /// Whether [`copy_encrypted`](Self::copy_encrypted) may be called.
    pub(in super::super) fn has_cipher(&self) -> bool {
        self.cipher.get().is_some()
    }

    /// Sets the cipher of guest data; the first one counts.
    pub(in super::super) fn set_cipher(&self, cipher: Box<dyn DataCipher>) {
        self.cipher.get_or_init(|| cipher);
    }

    /// Enciphers bytes that lie at `from` for the place `to`.
    pub(super) fn recrypt(&self, from: u64, to: u64, guest: u64, bytes: &mut [u8]) -> Result<()> {
        let failed = |why: String| {
            StorageError::new(Operation::Read, StorageErrorKind::Unsupported)
                .at(from, PAGE)
                .with_detail(why)
        };
        let Some(cipher) = self.cipher.get() else {
            return Err(failed("the key is not at hand".to_owned()));
        };
        let guest = GuestOffset::new(guest);
        cipher
            .decrypt(guest, HostOffset::new(from), bytes)
            .and_then(|()| cipher.encrypt(guest, HostOffset::new(to), bytes))
            .map_err(|error| failed(error.to_string()))
    }

    /// Writes zeros as a guest reads them at `guest`: enciphered.
    pub(in super::super) fn write_encrypted_zeros(
        &self,
        layer: usize,
        to: u64,
        len: u64,
        guest: u64,
    ) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if let Some(cipher) = self.cipher.get() {
            let done = cipher.encrypt(GuestOffset::new(guest), HostOffset::new(to), &mut bytes);
            done.map_err(|error| {
                StorageError::new(Operation::Write, StorageErrorKind::Unsupported)
                    .at(to, len)
                    .with_detail(error.to_string())
            })?;
        }
        self.write(layer, to, &bytes)
    }
}
