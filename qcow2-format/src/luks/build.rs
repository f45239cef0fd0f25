//! New LUKS headers, and changes to the slots of one.

use core::ops::Range;

use super::{
    HEADER_SECTORS, LuksError, LuksHeader, LuksText, MAX_MASTER_KEY_LEN, MIN_MASTER_KEY_LEN,
    SECTOR_SIZE, SLOT_DISABLED, SLOT_ENABLED, STRIPES,
};
use crate::raw;

/// Key slots of a header.
pub const SLOTS: usize = 8;
/// Bytes of a header before its first slot.
const BEFORE_SLOTS: usize = 208;
/// Bytes of a slot.
const SLOT_LEN: usize = 48;

/// All that is chosen about a new header; where things lie follows from the key's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksParameters<'a> {
    /// Name of the cipher, such as `aes`; at most 31 bytes.
    pub cipher_name: &'a [u8],
    /// Mode of the cipher and its initialization vector, such as `xts-plain64`; at most 31 bytes.
    pub cipher_mode: &'a [u8],
    /// Name of the hash, such as `sha256`; at most 31 bytes.
    pub hash_spec: &'a [u8],
    /// Bytes of the master key, both halves for XTS: 16 to 64. Its 4000 stripes must be whole sectors, as they are with
    /// multiples of 16.
    pub master_key_len: u32,
    /// Digest that tells the right master key.
    pub master_key_digest: [u8; 20],
    /// Salt of that digest.
    pub master_key_salt: [u8; 32],
    /// Iterations of that digest; at least 1.
    pub master_key_iterations: u32,
    /// UUID as text; at most 39 bytes.
    pub uuid: &'a [u8],
}

impl LuksHeader {
    /// A header with eight disabled slots, laid out as QEMU does it: 8 sectors for the header, then one region for each slot, a
    /// multiple of 8 sectors long, then the payload.
    ///
    /// # Errors
    ///
    /// A text that is too long or has a zero byte, a key of a length that no cipher has or that doesn't fill sectors, or no
    /// iterations.
    pub fn new(parameters: &LuksParameters<'_>) -> Result<Self, LuksError> {
        let key_len = parameters.master_key_len;
        let sectors = key_material_sectors(key_len)?;
        if parameters.master_key_iterations == 0 {
            return Err(LuksError::MasterIterationsZero);
        }
        let mut next = HEADER_SECTORS;
        let mut slots = [raw::LuksKeySlot {
            state: SLOT_DISABLED.into(),
            iterations: 0.into(),
            salt: [0; 32],
            key_material_sector: next.into(),
            stripes: STRIPES.into(),
        }; SLOTS];
        for slot in &mut slots {
            slot.key_material_sector.set(next);
            next = next.saturating_add(sectors);
        }
        let raw = raw::LuksHeader {
            magic: raw::LuksHeader::MAGIC,
            version: 1.into(),
            cipher_name: padded(LuksText::CipherName, parameters.cipher_name)?,
            cipher_mode: padded(LuksText::CipherMode, parameters.cipher_mode)?,
            hash_spec: padded(LuksText::HashSpec, parameters.hash_spec)?,
            payload_sector: next.into(),
            master_key_len: key_len.into(),
            master_key_digest: parameters.master_key_digest,
            master_key_salt: parameters.master_key_salt,
            master_key_iterations: parameters.master_key_iterations.into(),
            uuid: padded(LuksText::Uuid, parameters.uuid)?,
            slots,
        };
        Ok(Self { raw })
    }

    /// Bytes of header and key material together for a master key of `master_key_len` bytes: how long the area in the image
    /// has to be.
    ///
    /// # Errors
    ///
    /// A key of a length that no cipher has, or that doesn't fill sectors.
    pub fn area_len(master_key_len: u32) -> Result<u64, LuksError> {
        let slots = u64::from(key_material_sectors(master_key_len)?).saturating_mul(SLOTS as u64);
        let sectors = slots.saturating_add(HEADER_SECTORS.into());
        Ok(sectors.saturating_mul(SECTOR_SIZE))
    }

    /// Enables a slot. Its key material must lie on the disk before the slot does.
    ///
    /// # Errors
    ///
    /// No such slot, or no iterations.
    pub fn enable_slot(
        &mut self,
        slot: usize,
        iterations: u32,
        salt: [u8; 32],
    ) -> Result<(), LuksError> {
        let raw = self.slot_mut(slot)?;
        if iterations == 0 {
            return Err(LuksError::SlotIterationsZero { slot });
        }
        raw.state.set(SLOT_ENABLED);
        raw.iterations.set(iterations);
        raw.salt = salt;
        Ok(())
    }

    /// Disables a slot and forgets its iterations and salt. Where its key material lies stays as it is.
    ///
    /// # Errors
    ///
    /// No such slot.
    pub fn disable_slot(&mut self, slot: usize) -> Result<(), LuksError> {
        let raw = self.slot_mut(slot)?;
        raw.state.set(SLOT_DISABLED);
        raw.iterations.set(0);
        raw.salt = [0; 32];
        Ok(())
    }

    /// Which of the header's bytes are those of a slot. Those of slot 6 lie in two sectors.
    ///
    /// # Errors
    ///
    /// No such slot.
    pub fn slot_range(slot: usize) -> Result<Range<usize>, LuksError> {
        if slot >= SLOTS {
            return Err(no_slot(slot));
        }
        let start = SLOT_LEN.saturating_mul(slot).saturating_add(BEFORE_SLOTS);
        Ok(start..start.saturating_add(SLOT_LEN))
    }

    fn slot_mut(&mut self, slot: usize) -> Result<&mut raw::LuksKeySlot, LuksError> {
        self.raw.slots.get_mut(slot).ok_or_else(|| no_slot(slot))
    }
}

const fn no_slot(found: usize) -> LuksError {
    LuksError::NoSuchSlot {
        found,
        max: SLOTS.saturating_sub(1),
    }
}

/// Sectors between one slot's key material and the next one's.
fn key_material_sectors(key_len: u32) -> Result<u32, LuksError> {
    if !(MIN_MASTER_KEY_LEN..=MAX_MASTER_KEY_LEN).contains(&key_len) {
        return Err(LuksError::MasterKeyLength {
            found: key_len,
            min: MIN_MASTER_KEY_LEN,
            max: MAX_MASTER_KEY_LEN,
        });
    }
    let len_bytes = key_len.saturating_mul(STRIPES);
    if !u64::from(len_bytes).is_multiple_of(SECTOR_SIZE) {
        return Err(LuksError::KeyMaterialNotSectors { len_bytes });
    }
    let unit = HEADER_SECTORS.saturating_mul(512);
    Ok(len_bytes.div_ceil(unit).saturating_mul(HEADER_SECTORS))
}

fn padded<const N: usize>(field: LuksText, text: &[u8]) -> Result<[u8; N], LuksError> {
    let max = N.saturating_sub(1);
    if text.len() > max {
        return Err(LuksError::TextTooLong {
            field,
            found: text.len(),
            max,
        });
    }
    if text.contains(&0) {
        return Err(LuksError::TextWithZero { field });
    }
    let mut bytes = [0; N];
    for (to, from) in bytes.iter_mut().zip(text) {
        *to = *from;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::luks::LuksSlotState;

    const PARAMETERS: LuksParameters<'_> = LuksParameters {
        cipher_name: b"aes",
        cipher_mode: b"xts-plain64",
        hash_spec: b"sha256",
        master_key_len: 64,
        master_key_digest: [1; 20],
        master_key_salt: [2; 32],
        master_key_iterations: 1000,
        uuid: b"01234567-89ab-cdef-0123-456789abcdef",
    };
    /// What qemu-img made for aes-256-xts.
    const QEMU: &[u8; 592] = include_bytes!("../../testdata/qemu-10.0/luks-header.bin");

    #[test]
    fn the_same_parameters_give_the_header_of_qemu() {
        let theirs = LuksHeader::decode(QEMU).unwrap();
        let mut ours = LuksHeader::new(&LuksParameters {
            cipher_name: theirs.cipher_name(),
            cipher_mode: theirs.cipher_mode(),
            hash_spec: theirs.hash_spec(),
            master_key_len: theirs.master_key_len(),
            master_key_digest: *theirs.master_key_digest(),
            master_key_salt: *theirs.master_key_salt(),
            master_key_iterations: theirs.master_key_iterations(),
            uuid: theirs.uuid(),
        })
        .unwrap();
        let slot = theirs.slots()[0];
        ours.enable_slot(0, slot.iterations(), *slot.salt())
            .unwrap();
        assert_eq!(ours.encode(), *QEMU);
    }

    #[test]
    fn new_headers_break_no_rule_and_areas_are_as_long_as_those_of_qemu() {
        for (master_key_len, len_bytes) in
            [(16, 528384), (32, 1052672), (48, 1544192), (64, 2068480)]
        {
            let header = LuksHeader::new(&LuksParameters {
                master_key_len,
                ..PARAMETERS
            });
            let header = header.unwrap();
            assert_eq!(header.defects(), []);
            assert_eq!(header.payload_offset(), len_bytes);
            assert_eq!(LuksHeader::area_len(master_key_len), Ok(len_bytes));
            assert_eq!(LuksHeader::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn slots_are_enabled_and_disabled_where_they_lie() {
        let new = LuksHeader::new(&PARAMETERS).unwrap();
        for slot in 0..SLOTS {
            let mut header = new;
            header.enable_slot(slot, 5, [7; 32]).unwrap();
            assert_eq!(header.slots()[slot].state(), LuksSlotState::Enabled);
            assert_eq!(header.slots()[slot].iterations(), 5);
            assert_eq!(header.slots()[slot].salt(), &[7; 32]);
            assert_eq!(header.defects(), []);
            let (before, after) = (new.encode(), header.encode());
            let range = LuksHeader::slot_range(slot).unwrap();
            for (at, (old, new)) in before.iter().zip(after).enumerate() {
                assert!(*old == new || range.contains(&at));
            }
            assert_ne!(before[range.clone()], after[range]);
            header.disable_slot(slot).unwrap();
            assert_eq!(header, new);
        }
    }

    #[test]
    fn what_makes_no_header_is_refused() {
        use LuksError::*;
        let mut error = PARAMETERS;
        error.master_key_len = 24;
        assert_eq!(
            LuksHeader::new(&error),
            Err(KeyMaterialNotSectors { len_bytes: 96000 })
        );
        for found in [0, 15, 65, u32::MAX] {
            error.master_key_len = found;
            let (min, max) = (16, 64);
            let refused = MasterKeyLength { found, min, max };
            assert_eq!(LuksHeader::new(&error), Err(refused));
            assert_eq!(LuksHeader::area_len(found), Err(refused));
        }
        error = PARAMETERS;
        error.master_key_iterations = 0;
        assert_eq!(LuksHeader::new(&error), Err(MasterIterationsZero));
        error = PARAMETERS;
        error.hash_spec = &[b'a'; 32];
        let (field, found, max) = (LuksText::HashSpec, 32, 31);
        let long = TextTooLong { field, found, max };
        assert_eq!(LuksHeader::new(&error), Err(long));
        error.hash_spec = b"sha\0";
        assert_eq!(LuksHeader::new(&error), Err(TextWithZero { field }));

        let mut header = LuksHeader::new(&PARAMETERS).unwrap();
        let none = NoSuchSlot { found: 8, max: 7 };
        assert_eq!(header.enable_slot(8, 1, [0; 32]), Err(none));
        assert_eq!(header.disable_slot(8), Err(none));
        assert_eq!(LuksHeader::slot_range(8), Err(none));
        assert_eq!(
            header.enable_slot(3, 0, [0; 32]),
            Err(SlotIterationsZero { slot: 3 })
        );
    }
}
