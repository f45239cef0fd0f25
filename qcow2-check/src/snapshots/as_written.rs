//! A snapshot table beyond the limits, read as it is written: every length is what it says, of too much extra data the end is left
//! out, and so are the entries behind the limits.
//!
//! So reads `qemu-img check -r all`. A repair that is not bound to that looks for what the lengths should be.

use qcow2_format::header::MAX_SNAPSHOTS;
use qcow2_format::snapshot::{MAX_EXTRA_DATA_LEN, MAX_TABLE_BYTES, SnapshotLen};
use qcow2_format::{Snapshot, raw};
use qcow2_io::StorageError;

use crate::ByteRange;
use crate::image::Image;

/// What is left out of a snapshot table that goes beyond the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotCut {
    /// The end of an entry's extra data.
    ExtraData {
        /// Which entry, counted from 0.
        entry: u64,
        /// Bytes of extra data that it has.
        found: u64,
        /// Bytes that it may have.
        limit: u64,
    },
    /// The last entries, since there are more than there may be.
    TooMany {
        /// How many are left out.
        count: u64,
    },
    /// The last entries, since with them the table would be larger than it may be.
    TooLarge {
        /// How many are left out.
        count: u64,
    },
}

impl SnapshotCut {
    /// How many entries it is about.
    pub const fn entries(self) -> u64 {
        match self {
            Self::ExtraData { .. } => 1,
            Self::TooMany { count } | Self::TooLarge { count } => count,
        }
    }
}

/// What is left of a table.
#[derive(Debug, Default)]
pub(crate) struct AsWritten {
    /// The entries, each with the bytes of the file that it has, without padding.
    pub(crate) entries: Vec<(ByteRange, Snapshot)>,
    pub(crate) cuts: Vec<SnapshotCut>,
}

/// Reads the table. Behind the end of the file are zeros.
pub(crate) fn read(image: &Image<'_>) -> Result<AsWritten, StorageError> {
    let mut table = AsWritten::default();
    let offset = image.header.snapshot_table_offset;
    if !image.geometry.is_cluster_aligned(offset) || offset.get() == 0 || offset.get() >> 63 != 0 {
        return Ok(table);
    }
    let mut count = u64::from(image.header.snapshot_count);
    if let Some(over @ 1..) = count.checked_sub(MAX_SNAPSHOTS.into()) {
        table.cuts.push(SnapshotCut::TooMany { count: over });
        count = MAX_SNAPSHOTS.into();
    }
    let mut at = offset.get();
    let mut kept_bytes = 0_u64;
    for number in 0..count {
        at = at.checked_next_multiple_of(8).unwrap_or(u64::MAX);
        let mut fixed = [0; raw::SnapshotHeader::LEN];
        image.reader.read(&mut fixed, at)?;
        let fixed = raw::SnapshotHeader::from_bytes(fixed);
        let len = Snapshot::encoded_len(&fixed);
        let kept = SnapshotLen {
            extra_data: len.extra_data.min(MAX_EXTRA_DATA_LEN.into()),
            ..len
        };
        if kept.extra_data < len.extra_data {
            table.cuts.push(SnapshotCut::ExtraData {
                entry: number,
                found: len.extra_data,
                limit: kept.extra_data,
            });
        }
        let start = kept_bytes.next_multiple_of(8);
        kept_bytes = start.saturating_add(kept.unpadded());
        if kept_bytes > MAX_TABLE_BYTES {
            let over = count.saturating_sub(number);
            table.cuts.push(SnapshotCut::TooLarge { count: over });
            break;
        }
        let part = |offset: u64, len: u64| {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            image.reader.read(&mut bytes, offset)?;
            Ok::<_, StorageError>(bytes)
        };
        let extra_at = at.saturating_add(raw::SnapshotHeader::LEN as u64);
        let id_at = extra_at.saturating_add(len.extra_data);
        let snapshot = Snapshot::from_parts(
            &fixed,
            part(extra_at, kept.extra_data)?,
            part(id_at, len.id)?,
            part(id_at.saturating_add(len.id), len.name)?,
        );
        let place = ByteRange::new(at, len.unpadded());
        at = place.end;
        table.entries.push((place, snapshot));
    }
    Ok(table)
}
