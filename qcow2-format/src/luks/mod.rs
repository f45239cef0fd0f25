//! The LUKS1 header: how guest data is encrypted, and where the key lies in eight encrypted copies.

mod build;
mod error;

use alloc::vec::Vec;

use zerocopy::FromBytes;

pub use build::{LuksParameters, SLOTS};
pub use error::{LuksError, LuksText};

use crate::raw;

/// Anti-forensic stripes of every key slot.
pub const STRIPES: u32 = 4000;
/// Sectors of the header itself; key material and payload lie behind it.
pub const HEADER_SECTORS: u32 = 8;
/// Shortest master key of any cipher, in bytes.
pub const MIN_MASTER_KEY_LEN: u32 = 16;
/// Longest master key of any cipher, in bytes.
pub const MAX_MASTER_KEY_LEN: u32 = 64;
/// Bytes in a sector.
const SECTOR_SIZE: u64 = 512;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;

/// State of a key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LuksSlotState {
    /// A passphrase opens it.
    Enabled,
    /// Nothing opens it.
    Disabled,
    /// Neither: the slot is damaged.
    Unknown(u32),
}

/// Place of a slot's key material, in bytes from the start of the LUKS header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksKeyMaterial {
    /// First byte.
    pub offset: u64,
    /// Bytes of the split key.
    pub len_bytes: u64,
    /// Bytes that are the slot's own: the length rounded up to 4096.
    pub area_len_bytes: u64,
}

/// One of the eight key slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksKeySlot {
    raw: raw::LuksKeySlot,
}

impl LuksKeySlot {
    /// Whether a passphrase opens it.
    pub const fn state(&self) -> LuksSlotState {
        match self.raw.state.get() {
            SLOT_ENABLED => LuksSlotState::Enabled,
            SLOT_DISABLED => LuksSlotState::Disabled,
            other => LuksSlotState::Unknown(other),
        }
    }

    /// Iterations that derive the slot's key from a passphrase; any 32 bits.
    pub const fn iterations(&self) -> u32 {
        self.raw.iterations.get()
    }

    /// Salt of that derivation.
    pub const fn salt(&self) -> &[u8; 32] {
        &self.raw.salt
    }

    /// First sector of the key material, from the start of the LUKS header.
    pub const fn key_material_sector(&self) -> u32 {
        self.raw.key_material_sector.get()
    }

    /// Anti-forensic stripes of the key material.
    pub const fn stripes(&self) -> u32 {
        self.raw.stripes.get()
    }
}

/// The LUKS1 header. Any 592 bytes are one; [`defects`](Self::defects) tells what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    raw: raw::LuksHeader,
}

impl LuksHeader {
    /// Bytes of the header.
    pub const LEN: usize = raw::LuksHeader::LEN;

    /// The header in these bytes, whatever they are.
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self {
            raw: zerocopy::transmute!(bytes),
        }
    }

    /// The header at the start of `bytes`, with all rules tested.
    ///
    /// # Errors
    ///
    /// `bytes` are too short, or the first of the [`defects`](Self::defects).
    pub fn decode(bytes: &[u8]) -> Result<Self, LuksError> {
        let Ok((raw, _)) = raw::LuksHeader::read_from_prefix(bytes) else {
            return Err(LuksError::Truncated {
                needed: Self::LEN as u64,
                available: bytes.len() as u64,
            });
        };
        let header = Self { raw };
        match header.defects().first() {
            Some(defect) => Err(*defect),
            None => Ok(header),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        zerocopy::transmute!(self.raw)
    }

    /// Every rule the header breaks, in the order in which QEMU tests them.
    pub fn defects(&self) -> Vec<LuksError> {
        let mut defects = Vec::new();
        let mut rule = |holds: bool, error: LuksError| {
            if !holds {
                defects.push(error);
            }
        };
        let raw = &self.raw;
        rule(
            raw.magic == raw::LuksHeader::MAGIC,
            LuksError::Magic { found: raw.magic },
        );
        rule(
            raw.version.get() == 1,
            LuksError::Version {
                found: raw.version.get(),
            },
        );
        for (field, bytes) in [
            (LuksText::CipherName, &raw.cipher_name),
            (LuksText::CipherMode, &raw.cipher_mode),
            (LuksText::HashSpec, &raw.hash_spec),
        ] {
            rule(bytes.contains(&0), LuksError::Unterminated { field });
        }
        rule(
            raw.payload_sector.get() >= HEADER_SECTORS,
            LuksError::PayloadInHeader {
                found: raw.payload_sector.get(),
                min: HEADER_SECTORS,
            },
        );
        rule(
            raw.master_key_iterations.get() != 0,
            LuksError::MasterIterationsZero,
        );
        let slots = self.slots();
        let areas = slots.map(|slot| self.sectors(&slot));
        for (number, (slot, (start, end))) in slots.iter().zip(areas).enumerate() {
            rule(
                slot.stripes() == STRIPES,
                LuksError::SlotStripes {
                    slot: number,
                    found: slot.stripes(),
                },
            );
            rule(
                slot.key_material_sector() >= HEADER_SECTORS,
                LuksError::SlotInHeader {
                    slot: number,
                    found: slot.key_material_sector(),
                    min: HEADER_SECTORS,
                },
            );
            rule(
                !matches!(slot.state(), LuksSlotState::Unknown(_)),
                LuksError::SlotState {
                    slot: number,
                    found: slot.raw.state.get(),
                },
            );
            rule(
                slot.state() != LuksSlotState::Enabled || slot.iterations() != 0,
                LuksError::SlotIterationsZero { slot: number },
            );
            rule(
                end <= raw.payload_sector.get().into(),
                LuksError::SlotInPayload {
                    slot: number,
                    end,
                    payload: raw.payload_sector.get(),
                },
            );
            for (other, (other_start, other_end)) in
                areas.into_iter().enumerate().skip(number.saturating_add(1))
            {
                rule(
                    end <= other_start || other_end <= start,
                    LuksError::SlotsOverlap {
                        first: number,
                        second: other,
                    },
                );
            }
        }
        rule(
            (MIN_MASTER_KEY_LEN..=MAX_MASTER_KEY_LEN).contains(&raw.master_key_len.get()),
            LuksError::MasterKeyLength {
                found: raw.master_key_len.get(),
                min: MIN_MASTER_KEY_LEN,
                max: MAX_MASTER_KEY_LEN,
            },
        );
        defects
    }

    /// Name of the cipher, such as `aes`: bytes up to the first zero, as all texts here.
    pub fn cipher_name(&self) -> &[u8] {
        text(&self.raw.cipher_name)
    }

    /// Mode of the cipher and its initialization vector, such as `xts-plain64`.
    pub fn cipher_mode(&self) -> &[u8] {
        text(&self.raw.cipher_mode)
    }

    /// Name of the hash, such as `sha256`.
    pub fn hash_spec(&self) -> &[u8] {
        text(&self.raw.hash_spec)
    }

    /// UUID as text.
    pub fn uuid(&self) -> &[u8] {
        text(&self.raw.uuid)
    }

    /// Version of the LUKS header.
    pub const fn version(&self) -> u16 {
        self.raw.version.get()
    }

    /// First sector behind the key material. Inside qcow2 guest data lies elsewhere.
    pub const fn payload_sector(&self) -> u32 {
        self.raw.payload_sector.get()
    }

    /// Byte behind the key material, from the start of the LUKS header.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector()) * SECTOR_SIZE
    }

    /// Bytes of the master key; both halves for XTS.
    pub const fn master_key_len(&self) -> u32 {
        self.raw.master_key_len.get()
    }

    /// Digest that tells the right master key.
    pub const fn master_key_digest(&self) -> &[u8; 20] {
        &self.raw.master_key_digest
    }

    /// Salt of that digest.
    pub const fn master_key_salt(&self) -> &[u8; 32] {
        &self.raw.master_key_salt
    }

    /// Iterations of that digest; any 32 bits.
    pub const fn master_key_iterations(&self) -> u32 {
        self.raw.master_key_iterations.get()
    }

    /// The eight key slots.
    pub fn slots(&self) -> [LuksKeySlot; 8] {
        self.raw.slots.map(|raw| LuksKeySlot { raw })
    }

    /// Where each slot's key material lies, enabled or not.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "products of two 32-bit numbers, rounded to 4096; sectors below 2^33"
    )]
    pub fn key_material(&self) -> [LuksKeyMaterial; 8] {
        self.slots().map(|slot| {
            let (start, _) = self.sectors(&slot);
            let len_bytes = u64::from(self.master_key_len()) * u64::from(slot.stripes());
            LuksKeyMaterial {
                offset: start * SECTOR_SIZE,
                len_bytes,
                area_len_bytes: len_bytes
                    .div_ceil(SECTOR_SIZE * u64::from(HEADER_SECTORS))
                    .saturating_mul(SECTOR_SIZE * u64::from(HEADER_SECTORS)),
            }
        })
    }

    /// First sector of a slot's key material and the one behind it.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "a product of two 32-bit numbers, divided by 4096, times 8"
    )]
    fn sectors(&self, slot: &LuksKeySlot) -> (u64, u64) {
        let start = u64::from(slot.key_material_sector());
        let len_bytes = u64::from(self.master_key_len()) * u64::from(slot.stripes());
        let unit = u64::from(HEADER_SECTORS);
        (start, start + len_bytes.div_ceil(SECTOR_SIZE * unit) * unit)
    }
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests;
