//! The key that a [repair](qcow2_check::repair) moves encrypted clusters with.

use std::sync::Arc;

use qcow2_check::repair::{DataCipher, Key, KeyError};
use qcow2_format::header::Header;
use qcow2_format::{GuestOffset, HostOffset};
use qcow2_io::Storage;
use qcow2_io::cipher::Secret;

use crate::ImageError;
use crate::crypt::Crypt;
use crate::luks::WorkLimit;
use crate::unlock::unlock_with;

/// A passphrase, for [`RepairOptions::key`](qcow2_check::repair::RepairOptions::key).
///
/// It is tried when something encrypted has to be moved, on what the repair has made of the image by then.
#[derive(Debug)]
pub struct RepairKey {
    secret: Arc<Secret>,
    work: WorkLimit,
}

impl RepairKey {
    /// The passphrase of a LUKS image, or of a legacy one: those can't tell whether it is right.
    pub fn new(secret: Arc<Secret>) -> Self {
        Self {
            secret,
            work: WorkLimit::default(),
        }
    }

    /// How much work opening the key may be.
    #[must_use]
    pub fn work(mut self, limit: WorkLimit) -> Self {
        self.work = limit;
        self
    }
}

impl Key for RepairKey {
    fn open(&self, image: &dyn Storage, header: &Header) -> Result<Box<dyn DataCipher>, KeyError> {
        let crypt = unlock_with(image, header, &self.secret, self.work)?;
        Ok(Box::new(crypt.ok_or(ImageError::NeedlessSecret)?))
    }
}

impl DataCipher for Crypt {
    fn decrypt(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        sectors: &mut [u8],
    ) -> Result<(), KeyError> {
        Ok(Self::decrypt(self, guest.get(), host.get(), sectors)?)
    }

    fn encrypt(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        sectors: &mut [u8],
    ) -> Result<(), KeyError> {
        Ok(Self::encrypt(self, guest.get(), host.get(), sectors)?)
    }
}
