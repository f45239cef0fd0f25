use alloc::vec::Vec;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    BitmapError, DIRTY_TRACKING, MAX_DATA_BYTES, MAX_GRANULARITY_BITS, MAX_NAME_LEN,
    MAX_TABLE_ENTRIES, MIN_GRANULARITY_BITS, required_table_entries,
};
use crate::{Geometry, HostOffset, raw};

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_DATA_COMPATIBLE: u32 = 4;

/// Flags of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct BitmapFlags(u32);

impl BitmapFlags {
    /// The flags with these 32 bits.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Flags of a bitmap that is, or is not, in use and automatic.
    pub const fn new(in_use: bool, auto: bool) -> Self {
        Self(if in_use { IN_USE } else { 0 } | if auto { AUTO } else { 0 })
    }

    /// All 32 bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether the bits on disk are stale: someone has, or had, the image open for writing.
    pub const fn in_use(self) -> bool {
        self.0 & IN_USE != 0
    }

    /// Whether the bitmap must record all writes.
    pub const fn auto(self) -> bool {
        self.0 & AUTO != 0
    }

    /// Whether unknown extra data may be ignored.
    pub const fn extra_data_compatible(self) -> bool {
        self.0 & EXTRA_DATA_COMPATIBLE != 0
    }

    /// The set bits without a meaning.
    pub const fn unknown(self) -> u32 {
        self.0 & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE)
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BitmapEntry {
    /// The bitmap table; cluster-aligned.
    pub table_offset: HostOffset,
    /// Entries in that table.
    pub table_entries: u32,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Its type: 1, dirty tracking.
    pub kind: u8,
    /// Base-2 logarithm of the guest bytes a bit stands for: 9 to 31.
    pub granularity_bits: u8,
    /// Its name; any bytes.
    pub name: Vec<u8>,
    /// Extra data, none today.
    pub extra_data: Vec<u8>,
}

impl BitmapEntry {
    /// The entry at the start of `bytes`, and its length with padding. Its values are not judged; see
    /// [`defects`](Self::defects).
    ///
    /// # Errors
    ///
    /// [`BitmapError::Truncated`] where `bytes` end inside the entry or its padding.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), BitmapError> {
        let truncated = |needed| BitmapError::Truncated {
            needed,
            available: bytes.len() as u64,
        };
        let (fixed, _) = raw::BitmapEntry::read_from_prefix(bytes)
            .map_err(|_| truncated(raw::BitmapEntry::LEN as u64))?;
        let name_len = usize::from(fixed.name_len.get());
        let name_at =
            u64::from(fixed.extra_data_len.get()).saturating_add(raw::BitmapEntry::LEN as u64);
        let padded = name_at.saturating_add(name_len as u64).next_multiple_of(8);
        let entry = usize::try_from(padded)
            .ok()
            .and_then(|padded| bytes.get(..padded))
            .ok_or_else(|| truncated(padded))?;
        let (extra_data, name) = usize::try_from(name_at)
            .ok()
            .and_then(|at| entry.split_at_checked(at))
            .ok_or_else(|| truncated(padded))?;
        let decoded = Self {
            table_offset: HostOffset::new(fixed.table_offset.get()),
            table_entries: fixed.table_entries.get(),
            flags: BitmapFlags::from_bits(fixed.flags.get()),
            kind: fixed.kind,
            granularity_bits: fixed.granularity_bits,
            name: name.iter().take(name_len).copied().collect(),
            extra_data: extra_data
                .iter()
                .skip(raw::BitmapEntry::LEN)
                .copied()
                .collect(),
        };
        Ok((decoded, entry.len()))
    }

    /// The entry's bytes, with padding.
    ///
    /// # Errors
    ///
    /// A name that is too long, or 4 GiB of extra data.
    pub fn encode(&self) -> Result<Vec<u8>, BitmapError> {
        let name_len = u16::try_from(self.name.len())
            .ok()
            .filter(|len| u64::from(*len) <= MAX_NAME_LEN)
            .ok_or(BitmapError::NameTooLong {
                found: self.name.len() as u64,
                limit: MAX_NAME_LEN,
            })?;
        let extra_data_len =
            u32::try_from(self.extra_data.len()).map_err(|_| BitmapError::ExtraData {
                found: self.extra_data.len() as u64,
            })?;
        let fixed = raw::BitmapEntry {
            table_offset: U64::new(self.table_offset.get()),
            table_entries: U32::new(self.table_entries),
            flags: U32::new(self.flags.bits()),
            kind: self.kind,
            granularity_bits: self.granularity_bits,
            name_len: U16::new(name_len),
            extra_data_len: U32::new(extra_data_len),
        };
        let mut bytes = [fixed.as_bytes(), &self.extra_data, &self.name].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok(bytes)
    }

    /// Every rule the entry breaks, in an image of this geometry and virtual size.
    pub fn defects(&self, geometry: Geometry, virtual_size: u64) -> Vec<BitmapError> {
        let mut defects = Vec::new();
        let mut rule = |holds: bool, error: BitmapError| {
            if !holds {
                defects.push(error);
            }
        };
        let entries = self.table_entries;
        rule(self.table_offset.get() != 0, BitmapError::TableOffsetZero);
        rule(
            geometry.is_cluster_aligned(self.table_offset),
            BitmapError::TableUnaligned {
                found: self.table_offset,
                cluster_size: geometry.cluster_size(),
            },
        );
        rule(entries != 0, BitmapError::TableEmpty);
        let limit = u32::try_from(MAX_DATA_BYTES >> geometry.cluster_bits())
            .unwrap_or(u32::MAX)
            .min(MAX_TABLE_ENTRIES);
        rule(
            entries <= limit,
            BitmapError::TableTooLarge {
                found: entries,
                limit,
            },
        );
        let granularity = MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS;
        rule(
            granularity.contains(&self.granularity_bits),
            BitmapError::Granularity {
                found: self.granularity_bits,
                min: MIN_GRANULARITY_BITS,
                max: MAX_GRANULARITY_BITS,
            },
        );
        rule(
            self.flags.unknown() == 0,
            BitmapError::Flags {
                bits: self.flags.unknown(),
            },
        );
        rule(
            !self.flags.extra_data_compatible(),
            BitmapError::ExtraDataFlag,
        );
        rule(
            self.kind == DIRTY_TRACKING,
            BitmapError::Kind { found: self.kind },
        );
        let name_len = self.name.len() as u64;
        rule(
            name_len <= MAX_NAME_LEN,
            BitmapError::NameTooLong {
                found: name_len,
                limit: MAX_NAME_LEN,
            },
        );
        rule(name_len != 0, BitmapError::NameEmpty);
        rule(
            self.extra_data.is_empty(),
            BitmapError::ExtraData {
                found: self.extra_data.len() as u64,
            },
        );
        if !self.flags.in_use() && granularity.contains(&self.granularity_bits) {
            let needed =
                required_table_entries(geometry, virtual_size, self.granularity_bits.into());
            let found = entries;
            rule(
                needed <= found.into(),
                BitmapError::TableTooShort { found, needed },
            );
            rule(
                needed >= found.into(),
                BitmapError::TableTooLong { found, needed },
            );
        }
        defects
    }
}

/// A walk over the entries of a bitmap directory.
///
/// Gives an error, and then ends, where the directory can't be walked further, ends early, or goes on behind the last
/// entry.
#[derive(Clone, Debug)]
pub struct BitmapDirectory<'a> {
    rest: Option<&'a [u8]>,
    expected: u32,
    found: u32,
}

impl<'a> BitmapDirectory<'a> {
    /// A walk over the directory in `bytes`, in which the header counts `count` entries.
    pub const fn new(bytes: &'a [u8], count: u32) -> Self {
        Self {
            rest: Some(bytes),
            expected: count,
            found: 0,
        }
    }
}

impl Iterator for BitmapDirectory<'_> {
    type Item = Result<BitmapEntry, BitmapError>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.rest.take()?;
        if self.found == self.expected {
            return (!bytes.is_empty()).then_some(Err(BitmapError::TrailingBytes {
                left: bytes.len() as u64,
            }));
        }
        if bytes.is_empty() {
            return Some(Err(BitmapError::TooFew {
                found: self.found,
                expected: self.expected,
            }));
        }
        Some(BitmapEntry::decode(bytes).map(|(entry, padded)| {
            self.found = self.found.saturating_add(1);
            self.rest = bytes.get(padded..);
            entry
        }))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
