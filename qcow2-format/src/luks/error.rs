use core::fmt;

use thiserror::Error;

use super::STRIPES;

/// A text field of the LUKS header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LuksText {
    /// Name of the cipher.
    CipherName,
    /// Mode of the cipher and its initialization vector.
    CipherMode,
    /// Name of the hash.
    HashSpec,
    /// UUID.
    Uuid,
}

impl fmt::Display for LuksText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CipherName => "cipher name",
            Self::CipherMode => "cipher mode",
            Self::HashSpec => "hash name",
            Self::Uuid => "UUID",
        })
    }
}

/// A fact for which a LUKS header is refused. Slots count from 0, sectors of 512 bytes from the header's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LuksError {
    /// The bytes end inside the header.
    #[error("the LUKS header needs {needed} bytes, there are {available}")]
    Truncated {
        /// Bytes of the header.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// The magic bytes are not there.
    #[error("the LUKS header starts with {found:02x?}")]
    Magic {
        /// The first six bytes.
        found: [u8; 6],
    },
    /// Another version than 1.
    #[error("the LUKS version is {found}, known is 1")]
    Version {
        /// The version.
        found: u16,
    },
    /// A text that fills its field without a zero at the end.
    #[error("the {field} has no end")]
    Unterminated {
        /// Which text.
        field: LuksText,
    },
    /// The payload starts inside the header.
    #[error("the payload starts at sector {found}, the header ends at {min}")]
    PayloadInHeader {
        /// Its sector.
        found: u32,
        /// First sector behind the header.
        min: u32,
    },
    /// No cipher has a key of this length.
    #[error("the master key has {found} bytes, allowed are {min} to {max}")]
    MasterKeyLength {
        /// Its length.
        found: u32,
        /// Smallest length.
        min: u32,
        /// Largest length.
        max: u32,
    },
    /// The master key's digest takes no iteration.
    #[error("the master key has no iterations")]
    MasterIterationsZero,
    /// Another number of stripes than 4000.
    #[error("key slot {slot} has {found} stripes instead of {}", STRIPES)]
    SlotStripes {
        /// The slot.
        slot: usize,
        /// Its stripes.
        found: u32,
    },
    /// Key material that starts inside the header.
    #[error("key slot {slot} starts at sector {found}, the header ends at {min}")]
    SlotInHeader {
        /// The slot.
        slot: usize,
        /// Sector of its key material.
        found: u32,
        /// First sector behind the header.
        min: u32,
    },
    /// A state that is neither enabled nor disabled.
    #[error("the state of key slot {slot} is {found:#x}")]
    SlotState {
        /// The slot.
        slot: usize,
        /// Its state.
        found: u32,
    },
    /// An enabled slot whose key takes no iteration.
    #[error("key slot {slot} has no iterations")]
    SlotIterationsZero {
        /// The slot.
        slot: usize,
    },
    /// Key material that runs into the payload.
    #[error("key slot {slot} ends at sector {end}, the payload starts at {payload}")]
    SlotInPayload {
        /// The slot.
        slot: usize,
        /// Sector behind its key material.
        end: u64,
        /// First sector of the payload.
        payload: u32,
    },
    /// Two slots whose key material overlaps.
    #[error("key slots {first} and {second} overlap")]
    SlotsOverlap {
        /// The one slot.
        first: usize,
        /// The other slot, of a higher number.
        second: usize,
    },
    /// A text that does not fit its field, for a new header.
    #[error("the {field} has {found} bytes, at most {max} fit")]
    TextTooLong {
        /// Which text.
        field: LuksText,
        /// Its bytes.
        found: usize,
        /// Bytes that fit.
        max: usize,
    },
    /// A text that would be read to its first zero byte only, for a new header.
    #[error("the {field} contains a zero byte")]
    TextWithZero {
        /// Which text.
        field: LuksText,
    },
    /// Key material that does not fill sectors, so that it can't be encrypted.
    #[error("the key material has {len_bytes} bytes, no multiple of 512")]
    KeyMaterialNotSectors {
        /// Bytes of one slot's key material.
        len_bytes: u32,
    },
    /// A slot that no header has.
    #[error("there is no key slot {found}, the last is {max}")]
    NoSuchSlot {
        /// The slot asked for.
        found: usize,
        /// The last slot.
        max: usize,
    },
}
