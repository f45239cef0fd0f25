//! The snapshot table: entries of variable length, each at a multiple of 8.

use alloc::vec::Vec;

use thiserror::Error;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::header::MAX_SNAPSHOTS;
use crate::{HostOffset, raw};

/// Longest extra data of an entry, in bytes.
pub const MAX_EXTRA_DATA_LEN: u32 = 1024;
/// Shortest extra data that an entry of a version 3 image should have: up to the disk size.
pub const MIN_EXTRA_DATA_LEN_V3: usize = 16;
/// Longest snapshot table, in bytes.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;

/// A fact about a snapshot table that can't be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The bytes end inside an entry.
    #[error("the entry needs {needed} bytes, there are {available}")]
    Truncated {
        /// Bytes the entry needs, as far as can be told.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Extra data beyond the limit.
    #[error("the extra data has {found} bytes, at most {limit} are allowed")]
    ExtraDataTooLong {
        /// Its length.
        found: u64,
        /// Largest length.
        limit: u64,
    },
    /// An id that its length field can't tell.
    #[error("the id has {found} bytes, at most 65535 are allowed")]
    IdTooLong {
        /// Its length.
        found: u64,
    },
    /// A name that its length field can't tell.
    #[error("the name has {found} bytes, at most 65535 are allowed")]
    NameTooLong {
        /// Its length.
        found: u64,
    },
    /// Too many snapshots.
    #[error("there are {found} snapshots, at most {limit} are allowed")]
    TooMany {
        /// Their number.
        found: u64,
        /// Largest number.
        limit: u64,
    },
    /// A table beyond the limit.
    #[error("the snapshot table has {found} bytes, at most {limit} are allowed")]
    TableTooLarge {
        /// Its length in bytes.
        found: u64,
        /// Largest length.
        limit: u64,
    },
}

/// How the bytes of an entry divide, told by its fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotLen {
    /// Bytes of extra data, from byte 40 on; any 32 bits.
    pub extra_data: u64,
    /// Bytes of the id, behind the extra data.
    pub id: u64,
    /// Bytes of the name, behind the id.
    pub name: u64,
}

impl SnapshotLen {
    /// Bytes of the entry without padding.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "a 32-bit and two 16-bit lengths"
    )]
    pub const fn unpadded(self) -> u64 {
        raw::SnapshotHeader::LEN as u64 + self.extra_data + self.id + self.name
    }

    /// Bytes from the start of the entry to that of the next.
    pub const fn padded(self) -> u64 {
        self.unpadded().next_multiple_of(8)
    }
}

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The snapshot's L1 table; cluster-aligned.
    pub l1_table_offset: HostOffset,
    /// Entries in that table.
    pub l1_entries: u32,
    /// Its id, a decimal number by convention.
    pub id: Vec<u8>,
    /// Its name; any bytes.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub date_sec: u32,
    /// When it was taken: nanoseconds.
    pub date_nsec: u32,
    /// Run time of the guest in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The 32-bit size of the VM state in bytes; see [`vm_state_size`](Self::vm_state_size).
    pub vm_state_size_32: u32,
    /// Extra data: three known words, and what later versions may add.
    pub extra_data: Vec<u8>,
}

impl Snapshot {
    /// How an entry's bytes divide, so that a reader can fetch as much as it needs.
    pub fn encoded_len(fixed: &raw::SnapshotHeader) -> SnapshotLen {
        SnapshotLen {
            extra_data: fixed.extra_data_len.get().into(),
            id: fixed.id_len.get().into(),
            name: fixed.name_len.get().into(),
        }
    }

    /// A snapshot of its fixed part and separately read variable ones, whose lengths are those given here.
    pub fn from_parts(
        fixed: &raw::SnapshotHeader,
        extra_data: Vec<u8>,
        id: Vec<u8>,
        name: Vec<u8>,
    ) -> Self {
        Self {
            l1_table_offset: HostOffset::new(fixed.l1_table_offset.get()),
            l1_entries: fixed.l1_entries.get(),
            id,
            name,
            date_sec: fixed.date_sec.get(),
            date_nsec: fixed.date_nsec.get(),
            vm_clock_nsec: fixed.vm_clock_nsec.get(),
            vm_state_size_32: fixed.vm_state_size.get(),
            extra_data,
        }
    }

    /// The entry at the start of `bytes`, and its length without padding.
    ///
    /// # Errors
    ///
    /// `bytes` end inside the entry, or its extra data is too long.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), SnapshotError> {
        let fixed = fixed(bytes)?;
        if fixed.extra_data_len.get() > MAX_EXTRA_DATA_LEN {
            return Err(SnapshotError::ExtraDataTooLong {
                found: fixed.extra_data_len.get().into(),
                limit: MAX_EXTRA_DATA_LEN.into(),
            });
        }
        Self::decode_truncating(bytes)
    }

    /// As [`decode`](Self::decode), but of extra data that is too long the allowed part is kept. The length is that in
    /// `bytes`.
    ///
    /// # Errors
    ///
    /// `bytes` end inside the entry.
    pub fn decode_truncating(bytes: &[u8]) -> Result<(Self, usize), SnapshotError> {
        let fixed = fixed(bytes)?;
        let len = Self::encoded_len(&fixed);
        let truncated = SnapshotError::Truncated {
            needed: len.unpadded(),
            available: bytes.len() as u64,
        };
        let unpadded = usize::try_from(len.unpadded()).map_err(|_| truncated)?;
        let entry = bytes.get(..unpadded).ok_or(truncated)?;
        let (entry, name) = entry.split_at(unpadded.saturating_sub(fixed.name_len.get().into()));
        let (entry, id) = entry.split_at(entry.len().saturating_sub(fixed.id_len.get().into()));
        let extra_data = entry.iter().skip(raw::SnapshotHeader::LEN);
        let snapshot = Self::from_parts(
            &fixed,
            extra_data
                .take(MAX_EXTRA_DATA_LEN as usize)
                .copied()
                .collect(),
            id.to_vec(),
            name.to_vec(),
        );
        Ok((snapshot, unpadded))
    }

    /// The entry's bytes without padding.
    ///
    /// # Errors
    ///
    /// Extra data, id or name are too long.
    pub fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        let extra_data_len = u32::try_from(self.extra_data.len())
            .ok()
            .filter(|len| *len <= MAX_EXTRA_DATA_LEN)
            .ok_or(SnapshotError::ExtraDataTooLong {
                found: self.extra_data.len() as u64,
                limit: MAX_EXTRA_DATA_LEN.into(),
            })?;
        let id_len = u16::try_from(self.id.len()).map_err(|_| SnapshotError::IdTooLong {
            found: self.id.len() as u64,
        })?;
        let name_len = u16::try_from(self.name.len()).map_err(|_| SnapshotError::NameTooLong {
            found: self.name.len() as u64,
        })?;
        let fixed = raw::SnapshotHeader {
            l1_table_offset: U64::new(self.l1_table_offset.get()),
            l1_entries: U32::new(self.l1_entries),
            id_len: U16::new(id_len),
            name_len: U16::new(name_len),
            date_sec: U32::new(self.date_sec),
            date_nsec: U32::new(self.date_nsec),
            vm_clock_nsec: U64::new(self.vm_clock_nsec),
            vm_state_size: U32::new(self.vm_state_size_32),
            extra_data_len: U32::new(extra_data_len),
        };
        Ok([fixed.as_bytes(), &self.extra_data, &self.id, &self.name].concat())
    }

    /// Bytes of VM state: the 64-bit size where the entry has one.
    pub fn vm_state_size(&self) -> u64 {
        self.extra_word(0)
            .unwrap_or_else(|| self.vm_state_size_32.into())
    }

    /// Virtual size in bytes when the snapshot was taken; `None` means that of the image.
    pub fn disk_size(&self) -> Option<u64> {
        self.extra_word(1)
    }

    /// Instructions the guest had run; `None` where that was not recorded.
    pub fn icount(&self) -> Option<u64> {
        self.extra_word(2).filter(|count| *count != u64::MAX)
    }

    fn extra_word(&self, index: usize) -> Option<u64> {
        let (words, _) = self.extra_data.as_chunks::<8>();
        words.get(index).map(|word| u64::from_be_bytes(*word))
    }
}

fn fixed(bytes: &[u8]) -> Result<raw::SnapshotHeader, SnapshotError> {
    match raw::SnapshotHeader::read_from_prefix(bytes) {
        Ok((fixed, _)) => Ok(fixed),
        Err(_) => Err(SnapshotError::Truncated {
            needed: raw::SnapshotHeader::LEN as u64,
            available: bytes.len() as u64,
        }),
    }
}

/// The `count` entries of the table in `bytes`, up to the first that can't be read.
pub fn decode_table(
    bytes: &[u8],
    count: u32,
) -> impl Iterator<Item = Result<Snapshot, SnapshotError>> {
    let mut rest = Some(bytes);
    (0..count).map_while(move |_| {
        let bytes = rest.take()?;
        Some(Snapshot::decode(bytes).map(|(snapshot, unpadded)| {
            rest = Some(
                bytes
                    .get(unpadded.next_multiple_of(8)..)
                    .unwrap_or_default(),
            );
            snapshot
        }))
    })
}

/// The table's bytes: entries at multiples of 8, the last one without padding.
///
/// # Errors
///
/// An entry that can't be written, too many of them, or a table that is too large.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>, SnapshotError> {
    if snapshots.len() as u64 > MAX_SNAPSHOTS.into() {
        return Err(SnapshotError::TooMany {
            found: snapshots.len() as u64,
            limit: MAX_SNAPSHOTS.into(),
        });
    }
    let mut table = Vec::new();
    for snapshot in snapshots {
        table.resize(table.len().next_multiple_of(8), 0);
        table.append(&mut snapshot.encode()?);
        if table.len() as u64 > MAX_TABLE_BYTES {
            return Err(SnapshotError::TableTooLarge {
                found: table.len() as u64,
                limit: MAX_TABLE_BYTES,
            });
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    fn snapshot(extra_data: usize) -> Snapshot {
        Snapshot {
            l1_table_offset: HostOffset::new(0x50000),
            l1_entries: 2,
            id: b"1".to_vec(),
            name: b"before".to_vec(),
            vm_state_size_32: 7,
            extra_data: (0..24).chain(0..255).cycle().take(extra_data).collect(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn extra_data_counts_as_far_as_it_goes() {
        let with = |len| snapshot(len);
        assert_eq!(with(7).vm_state_size(), 7);
        assert_eq!(with(8).vm_state_size(), 0x0001_0203_0405_0607);
        assert_eq!(with(15).disk_size(), None);
        assert_eq!(with(16).disk_size(), Some(0x0809_0a0b_0c0d_0e0f));
        assert_eq!(with(16).icount(), None);
        assert_eq!(with(24).icount(), Some(0x1011_1213_1415_1617));
        let mut unknown = with(24);
        unknown.extra_data[16..].fill(0xff);
        assert_eq!(unknown.icount(), None);
    }

    #[test]
    fn the_last_entry_is_not_padded() {
        let snapshots = [snapshot(24), snapshot(0), snapshot(1024)];
        let table = encode_table(&snapshots).unwrap();
        assert_eq!(table.len(), 72 + 48 + 1071);
        let read: Result<Vec<_>, _> = decode_table(&table, 3).collect();
        assert_eq!(read.unwrap(), snapshots);
        let short = &table[..table.len() - 1];
        let read: Vec<_> = decode_table(short, 3).collect();
        let truncated = SnapshotError::Truncated {
            needed: 1071,
            available: 1070,
        };
        assert_eq!(read[2], Err(truncated));
        // Nothing comes behind the first broken entry.
        assert_eq!(decode_table(&table[..50], 100).count(), 1);
    }

    #[test]
    fn long_extra_data_is_refused_or_cut() {
        let mut bytes = snapshot(1024).encode().unwrap();
        bytes[38..40].copy_from_slice(&1030_u16.to_be_bytes());
        let too_long = SnapshotError::ExtraDataTooLong {
            found: 1030,
            limit: 1024,
        };
        assert_eq!(Snapshot::decode(&bytes), Err(too_long));
        // Extra data takes six of the seven bytes of id and name, so six are missing at the end.
        bytes.extend(b"xbefor");
        let (cut, unpadded) = Snapshot::decode_truncating(&bytes).unwrap();
        assert_eq!((cut.extra_data.len(), unpadded), (1024, 1077));
        assert_eq!((&cut.id[..], &cut.name[..]), (&b"e"[..], &b"xbefor"[..]));
        assert_eq!(
            snapshot(1025).encode(),
            Err(SnapshotError::ExtraDataTooLong {
                found: 1025,
                limit: 1024,
            })
        );
    }

    #[test]
    fn a_hostile_length_is_an_error() {
        let mut bytes = vec![0xff; 40];
        bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(
            Snapshot::decode_truncating(&bytes),
            Err(SnapshotError::Truncated {
                needed: 40 + 0xffff_ffff + 2 * 0xffff,
                available: 40,
            })
        );
        assert!(matches!(
            Snapshot::decode(&bytes[..39]),
            Err(SnapshotError::Truncated { needed: 40, .. })
        ));
    }
}
