use core::fmt;

use crate::{Geometry, HostOffset};

const ALL_ONES: u64 = 1;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED_MASK: u64 = 0xff00_0000_0000_01fe;

/// One entry of a bitmap table: a cluster of bits.
///
/// Any 64 bits are an entry; what is wrong with it can be asked.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct BitmapTableEntry(u64);

/// What a bitmap table entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// A cluster of clear bits that is not stored.
    AllZeros,
    /// A cluster of set bits that is not stored.
    AllOnes,
    /// Bits in a cluster of the image file.
    Cluster(HostOffset),
}

impl BitmapTableEntry {
    /// The entry with these 64 bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The entry as it lies in the file.
    pub const fn from_be_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }

    /// An entry that stands for `cluster`.
    pub const fn new(cluster: BitmapCluster) -> Self {
        match cluster {
            BitmapCluster::AllZeros => Self(0),
            BitmapCluster::AllOnes => Self(ALL_ONES),
            BitmapCluster::Cluster(offset) => Self(offset.get() & OFFSET_MASK),
        }
    }

    /// All 64 bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The entry's bytes for the file.
    pub const fn to_be_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// What the entry stands for.
    pub const fn kind(self) -> BitmapCluster {
        match (self.0 & OFFSET_MASK, self.0 & ALL_ONES) {
            (0, 0) => BitmapCluster::AllZeros,
            (0, _) => BitmapCluster::AllOnes,
            (offset, _) => BitmapCluster::Cluster(HostOffset::new(offset)),
        }
    }

    /// The bits that must be clear and are not: among them bit 0 of an entry with a cluster.
    pub const fn reserved_bits(self) -> u64 {
        if self.0 & OFFSET_MASK == 0 {
            self.0 & RESERVED_MASK
        } else {
            self.0 & (RESERVED_MASK | ALL_ONES)
        }
    }
}

impl fmt::Debug for BitmapTableEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BitmapTableEntry({:#x})", self.0)
    }
}

/// Table entries of a bitmap with a bit for every `1 << granularity_bits` of `virtual_size` bytes.
///
/// One granule covers everything where 64 bits don't hold its size.
pub const fn required_table_entries(
    geometry: Geometry,
    virtual_size: u64,
    granularity_bits: u32,
) -> u64 {
    let bits = match 1_u64.checked_shl(granularity_bits) {
        Some(granularity) => virtual_size.div_ceil(granularity),
        None => (virtual_size != 0) as u64,
    };
    geometry.clusters_for(bits.div_ceil(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_zeros_ones_or_a_cluster() {
        let of = |bits| BitmapTableEntry::from_bits(bits);
        assert_eq!(of(0).kind(), BitmapCluster::AllZeros);
        assert_eq!(of(1).kind(), BitmapCluster::AllOnes);
        let cluster = BitmapCluster::Cluster(HostOffset::new(0x50000));
        assert_eq!(of(0x50000).kind(), cluster);
        assert_eq!(BitmapTableEntry::new(cluster), of(0x50000));
        assert_eq!(of(1).reserved_bits(), 0);
        assert_eq!(of(0x50001).reserved_bits(), 1);
        assert_eq!(of(u64::MAX).reserved_bits(), 0xff00_0000_0000_01ff);
        assert_eq!(of(0x1ff).reserved_bits(), 0x1fe);
    }

    #[test]
    fn a_table_has_an_entry_for_every_started_cluster() {
        let geometry = Geometry::new(9, 4, false).unwrap();
        // One cluster holds 4096 bits; at 9 bits of granularity that is 2 MiB.
        assert_eq!(required_table_entries(geometry, 0, 9), 0);
        assert_eq!(required_table_entries(geometry, 2 << 20, 9), 1);
        assert_eq!(required_table_entries(geometry, (2 << 20) + 1, 9), 2);
        assert_eq!(required_table_entries(geometry, u64::MAX, 64), 1);
    }
}
