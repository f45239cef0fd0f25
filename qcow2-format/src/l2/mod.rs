//! L2 table entries: what a guest cluster is made of.

mod table;

use core::fmt;

pub use table::L2Table;

use crate::l1::{COPIED, OFFSET_MASK};
use crate::{Geometry, HostOffset};

const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;

/// What an entry's meaning depends on besides its own bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryRules {
    /// The image's geometry.
    pub geometry: Geometry,
    /// Guest data lies in an external data file, where host offset 0 is a valid place.
    pub external_data: bool,
    /// Version 2: no zero flag.
    pub version2: bool,
}

/// One L2 entry: the first word, and the subcluster bitmap of an extended entry (else 0).
///
/// Any bits are an entry; what is wrong with it can be asked.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct L2Entry {
    word: u64,
    bitmap: u64,
}

/// What a guest cluster is, as its entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterKind {
    /// No host cluster; content comes from the backing file or is zero.
    Unallocated,
    /// Reads as zero, no host cluster.
    ZeroPlain,
    /// Reads as zero and keeps a host cluster.
    ZeroAllocated(HostOffset),
    /// Has a host cluster. With extended entries the bitmap tells which subclusters are in it.
    Normal(HostOffset),
    /// Compressed data somewhere in the file.
    Compressed(CompressedExtent),
}

/// Where compressed data lies: bytes, without alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// First byte.
    pub offset: HostOffset,
    /// Bytes from the first one to the end of the last 512-byte sector; at most two clusters.
    pub len_bytes: u64,
}

impl L2Entry {
    /// An entry of these words; `bitmap` is 0 for a standard entry.
    pub const fn from_bits(word: u64, bitmap: u64) -> Self {
        Self { word, bitmap }
    }

    /// An entry for a cluster that holds data. A standard entry unless `bitmap` gives subclusters.
    pub const fn normal(cluster: HostOffset, copied: bool, bitmap: u64) -> Self {
        Self {
            word: cluster.get() & OFFSET_MASK | if copied { COPIED } else { 0 },
            bitmap,
        }
    }

    /// A standard entry that reads as zero, keeping `cluster` unless that is 0.
    pub const fn zero(cluster: HostOffset, copied: bool) -> Self {
        Self {
            word: cluster.get() & OFFSET_MASK | ZERO | if copied { COPIED } else { 0 },
            bitmap: 0,
        }
    }

    /// An entry for compressed data of `len_bytes` bytes at `offset`, or `None` where the descriptor doesn't hold them.
    pub fn compressed(geometry: Geometry, offset: HostOffset, len_bytes: u64) -> Option<Self> {
        let offset_bits = geometry.compressed_offset_bits();
        let last = offset.get().checked_add(len_bytes.checked_sub(1)?)?;
        let sectors = (last >> 9).checked_sub(offset.get() >> 9)?;
        let sectors_max = (1_u64 << 62_u32.checked_sub(offset_bits)?).checked_sub(1)?;
        if sectors > sectors_max
            || offset.get() >> offset_bits != 0
            || offset.get() >= crate::geometry::HOST_OFFSET_LIMIT
        {
            return None;
        }
        Some(Self {
            word: COMPRESSED | sectors << offset_bits | offset.get(),
            bitmap: 0,
        })
    }

    /// The first word.
    pub const fn word(self) -> u64 {
        self.word
    }

    /// The subcluster bitmap: allocated in bits 0 to 31, reads as zero in bits 32 to 63.
    pub const fn bitmap(self) -> u64 {
        self.bitmap
    }

    /// Whether all bits are clear.
    pub const fn is_empty(self) -> bool {
        self.word == 0 && self.bitmap == 0
    }

    /// Whether the entry says that the host cluster's refcount is exactly 1.
    pub const fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// Where the data lies, if nothing but an offset and perhaps the COPIED flag is set: what most entries of most images
    /// are.
    #[inline]
    pub const fn plain_data(self) -> Option<HostOffset> {
        let offset = self.word & !COPIED;
        if offset & !OFFSET_MASK != 0 || offset == 0 {
            return None;
        }
        Some(HostOffset::new(offset))
    }

    /// Whether this is a compressed descriptor.
    pub const fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// Bit 0: the zero flag of a standard entry of version 3, reserved elsewhere.
    pub const fn has_zero_flag(self) -> bool {
        self.word & ZERO != 0 && !self.is_compressed()
    }

    /// Subclusters with data in the host cluster, one bit each.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low half is what is meant"
    )]
    pub const fn allocated_subclusters(self) -> u32 {
        self.bitmap as u32
    }

    /// Subclusters that read as zero, one bit each.
    pub const fn zero_subclusters(self) -> u32 {
        (self.bitmap >> 32) as u32
    }

    /// The bits of a standard descriptor that must be clear and are not. Bit 0, where it is no zero flag, is told by
    /// [`misplaced_zero_flag`](Self::misplaced_zero_flag).
    pub const fn reserved_bits(self) -> u64 {
        if self.is_compressed() {
            0
        } else {
            self.word & RESERVED_MASK
        }
    }

    /// Whether bit 0 is set where the image's version or entry size knows no zero flag.
    pub const fn misplaced_zero_flag(self, rules: EntryRules) -> bool {
        self.has_zero_flag() && (rules.version2 || rules.geometry.extended_l2())
    }

    /// What the guest cluster is.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "a sector count of at most 14 bits; shifts below 64"
    )]
    pub const fn kind(self, rules: EntryRules) -> ClusterKind {
        if self.is_compressed() {
            let bits = rules.geometry.compressed_offset_bits();
            let offset = self.word & ((1 << bits) - 1);
            let sectors = (self.word & !(COPIED | COMPRESSED)) >> bits;
            return ClusterKind::Compressed(CompressedExtent {
                offset: HostOffset::new(offset),
                len_bytes: (sectors + 1) * 512 - (offset & 511),
            });
        }
        let offset = HostOffset::new(self.word & OFFSET_MASK);
        let zero = self.word & ZERO != 0 && !rules.geometry.extended_l2();
        match (zero, offset.get()) {
            (true, 0) => ClusterKind::ZeroPlain,
            (true, _) => ClusterKind::ZeroAllocated(offset),
            (false, 0) if !(rules.external_data && self.is_copied()) => ClusterKind::Unallocated,
            (false, _) => ClusterKind::Normal(offset),
        }
    }
}

impl fmt::Debug for L2Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L2Entry({:#x}, {:#x})", self.word, self.bitmap)
    }
}
