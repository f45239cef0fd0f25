//! L1 table entries.

use core::fmt;

use crate::HostOffset;

pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;

/// One entry of an L1 table: where an L2 table lies.
///
/// Any 64 bits are an entry; what is wrong with it can be asked.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct L1Entry(u64);

impl L1Entry {
    /// The entry with these 64 bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The entry as it lies in the file.
    pub const fn from_be_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }

    /// An entry that points at an L2 table.
    pub const fn new(l2_table: HostOffset, copied: bool) -> Self {
        Self(l2_table.get() & OFFSET_MASK | if copied { COPIED } else { 0 })
    }

    /// All 64 bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The entry's bytes for the file.
    pub const fn to_be_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// Whether all bits are clear.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Where the L2 table lies; 0 means there is none.
    pub const fn l2_table(self) -> HostOffset {
        HostOffset::new(self.0 & OFFSET_MASK)
    }

    /// Whether the entry says that the L2 table's refcount is exactly 1.
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The bits that must be clear and are not.
    pub const fn reserved_bits(self) -> u64 {
        self.0 & RESERVED_MASK
    }
}

impl fmt::Debug for L1Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L1Entry({:#x})", self.0)
    }
}
