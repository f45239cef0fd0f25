use qcow2_format::LuksHeader;
use qcow2_format::header::CryptoExtension;
use qcow2_format::luks::{LuksKeyMaterial, LuksKeySlot, LuksSlotState};
use qcow2_io::Storage;

use super::LuksError;

/// Bytes that are written in one piece, or not at all, when the machine fails.
const SECTOR: u64 = 512;

/// Where LUKS header and key material lie in the image, as the header extension tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LuksArea {
    /// First byte.
    pub offset: u64,
    /// Bytes of header and key material.
    pub len: u64,
}

impl From<CryptoExtension> for LuksArea {
    fn from(extension: CryptoExtension) -> Self {
        Self {
            offset: extension.offset.get(),
            len: extension.len_bytes,
        }
    }
}

/// An area in its storage. No byte outside is read or written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area<'a> {
    storage: &'a dyn Storage,
    place: LuksArea,
}

impl<'a> Area<'a> {
    pub(super) fn new(storage: &'a dyn Storage, place: LuksArea) -> Self {
        Self { storage, place }
    }

    /// The header, with all its rules tested.
    pub(super) fn header(&self) -> Result<LuksHeader, LuksError> {
        let mut bytes = [0; LuksHeader::LEN];
        self.read(0, &mut bytes, "read the LUKS header")?;
        let header = LuksHeader::decode(&bytes)?;
        for (number, slot) in (0..).zip(header.slots()) {
            if slot.state() == LuksSlotState::Enabled {
                let material = self.material(&header, number)?;
                self.in_file(material.offset, material.len_bytes)?;
            }
        }
        Ok(header)
    }

    /// Where the key material of a slot lies, which is inside the area.
    pub(super) fn material(
        &self,
        header: &LuksHeader,
        slot: u8,
    ) -> Result<LuksKeyMaterial, LuksError> {
        let material = header.key_material().get(usize::from(slot)).copied();
        let material = material.ok_or(LuksError::NoSuchSlot { slot })?;
        self.inside(material.offset, material.len_bytes)?;
        Ok(material)
    }

    /// Fills `bytes` from `at` on, counted from the start of the area.
    pub(super) fn read(
        &self,
        at: u64,
        bytes: &mut [u8],
        action: &'static str,
    ) -> Result<(), LuksError> {
        let len = bytes.len() as u64;
        self.inside(at, len)?;
        let offset = self.in_file(at, len)?;
        self.storage
            .read_at(bytes, offset)
            .map_err(LuksError::while_trying(action))
    }

    pub(super) fn write(
        &self,
        at: u64,
        bytes: &[u8],
        action: &'static str,
    ) -> Result<(), LuksError> {
        self.inside(at, bytes.len() as u64)?;
        let offset = self.absolute(at)?;
        self.storage
            .write_at(bytes, offset)
            .map_err(LuksError::while_trying(action))
    }

    pub(super) fn flush(&self, action: &'static str) -> Result<(), LuksError> {
        self.storage
            .flush()
            .map_err(LuksError::while_trying(action))
    }

    /// Writes what `header` says of a slot, durably. Where it lies in two sectors, that with the slot's state comes last if the
    /// slot is enabled and first if not: so whenever the machine fails, an enabled slot is a whole one.
    pub(super) fn write_slot(&self, header: &LuksHeader, slot: u8) -> Result<(), LuksError> {
        const ACTION: &str = "write a key slot";
        let range = LuksHeader::slot_range(slot.into())?;
        let at = range.start as u64;
        let bytes = header.encode();
        let bytes = bytes.get(range).unwrap_or_default();
        let in_sector = self.absolute(at)? % SECTOR;
        let in_first = usize::try_from(SECTOR - in_sector).unwrap_or(usize::MAX);
        let Some((first, second)) = bytes.split_at_checked(in_first) else {
            self.write(at, bytes, ACTION)?;
            return self.flush(ACTION);
        };
        let mut pieces = [(at, first), (at + first.len() as u64, second)];
        let slots = header.slots();
        let state = slots.get(usize::from(slot)).map(LuksKeySlot::state);
        if state == Some(LuksSlotState::Enabled) {
            pieces.reverse();
        }
        for (at, piece) in pieces {
            self.write(at, piece, ACTION)?;
            self.flush(ACTION)?;
        }
        Ok(())
    }

    /// Where in the storage the byte `at` of the area lies.
    fn absolute(&self, at: u64) -> Result<u64, LuksError> {
        let absolute = self.place.offset.checked_add(at);
        absolute.ok_or(LuksError::BeyondFile {
            end: u64::MAX,
            len: qcow2_io::MAX_LEN,
        })
    }

    fn inside(&self, at: u64, len: u64) -> Result<(), LuksError> {
        let end = at.saturating_add(len);
        if end > self.place.len {
            return Err(LuksError::BeyondArea {
                end,
                len: self.place.len,
            });
        }
        Ok(())
    }

    fn in_file(&self, at: u64, len: u64) -> Result<u64, LuksError> {
        let offset = self.absolute(at)?;
        let end = offset.saturating_add(len);
        let len = self.storage.len();
        let len = len.map_err(LuksError::while_trying("tell the length of the image"))?;
        if end > len {
            return Err(LuksError::BeyondFile { end, len });
        }
        Ok(offset)
    }
}
