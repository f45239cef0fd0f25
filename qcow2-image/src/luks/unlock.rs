use std::fmt;

use qcow2_format::LuksHeader;
use qcow2_io::Storage;
use qcow2_io::cipher::{Secret, SectorCipher};

use super::area::Area;
use super::suite::{Key, Suite, active};
use super::{LuksArea, LuksError, WorkLimit};

/// What the right passphrase gives. Overwritten when dropped.
pub struct Unlocked {
    cipher: SectorCipher,
    slot: u8,
    suite: Suite,
    master: Key,
    /// Digest and salt: what the header tells the master key by.
    mark: ([u8; 20], [u8; 32]),
}

impl Unlocked {
    pub(super) fn new(
        suite: Suite,
        header: &LuksHeader,
        slot: u8,
        master: Key,
    ) -> Result<Self, LuksError> {
        Ok(Self {
            cipher: suite.cipher(&master)?,
            slot,
            suite,
            master,
            mark: mark(header),
        })
    }

    /// What guest data is encrypted with. Sectors are numbered by where they lie in the file that stores them.
    pub fn cipher(&self) -> &SectorCipher {
        &self.cipher
    }

    /// The same, without the master key that new key slots are made from.
    pub fn into_cipher(self) -> SectorCipher {
        self.cipher
    }

    /// The slot that was opened, 0 to 7.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The master key, if it is that of this header.
    pub(super) fn master_of(&self, suite: Suite, header: &LuksHeader) -> Result<&[u8], LuksError> {
        if self.suite != suite || self.mark != mark(header) {
            return Err(LuksError::OtherKey);
        }
        Ok(&self.master)
    }
}

impl fmt::Debug for Unlocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unlocked")
            .field("slot", &self.slot)
            .field("suite", &self.suite)
            .finish_non_exhaustive()
    }
}

fn mark(header: &LuksHeader) -> ([u8; 20], [u8; 32]) {
    (*header.master_key_digest(), *header.master_key_salt())
}

/// Opens an area by the first active slot that the passphrase fits.
///
/// Takes as long as the header asks for, within `limit`. Nothing is written.
///
/// # Errors
///
/// A header that is damaged, or unknown to this crate; key material outside area or file; more work than `limit` allows; no
/// active slot; [`WrongPassphrase`](LuksError::WrongPassphrase); a storage that fails.
pub fn unlock(
    storage: &dyn Storage,
    area: LuksArea,
    passphrase: &Secret,
    limit: WorkLimit,
) -> Result<Unlocked, LuksError> {
    let area = Area::new(storage, area);
    let header = area.header()?;
    let suite = Suite::of(&header)?;
    let slots = active(&header);
    if slots.is_empty() {
        return Err(LuksError::NoActiveSlot);
    }
    limit.check(suite.work(&header, &slots))?;
    for slot in slots {
        if let Some(master) = suite.open(&area, &header, slot, passphrase)? {
            return Unlocked::new(suite, &header, slot, master);
        }
    }
    Err(LuksError::WrongPassphrase)
}
