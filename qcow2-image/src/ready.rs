//! Before the first write: all that is known of where metadata lies.

use qcow2_cache::sync::atomic::Ordering;
use qcow2_cache::sync::lock;
use qcow2_cache::{Kinds, MetadataError, OverlapMap};
use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::snapshot::MAX_TABLE_BYTES;
use qcow2_format::{Geometry, Header, HostOffset, L1Entry, Snapshot, SnapshotError};
use qcow2_io::{ExtentKind, Storage};

use crate::{Image, ImageError, SnapshotL1Problem};

/// Tables of snapshots are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

impl Image {
    /// What opening for writing does to the file: features that this writer does not know are cleared, and refcounts that
    /// were left behind are put right.
    pub(crate) fn begin_writing(&self, header: &Header) -> Result<(), ImageError> {
        let keep = header.autoclear.bits() & !header.autoclear.unknown();
        if header.incompatible.dirty() {
            // It may refuse, so it comes before the first write and does that itself.
            self.recover(keep)
        } else {
            Ok(self.meta.clear_autoclear(keep)?)
        }
    }

    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Makes the image ready for writes. This takes a look at all that is not guest data, which an image that is only
    /// opened and read does not need.
    #[inline]
    pub(crate) fn get_ready(&self) -> Result<(), ImageError> {
        if self.is_ready() {
            return Ok(());
        }
        self.get_ready_once()
    }

    #[cold]
    fn get_ready_once(&self) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        let _one = lock(&self.getting_ready);
        if self.is_ready() {
            return Ok(());
        }
        let header = self.header();
        self.chart(&header)?;
        self.begin_bitmaps(&header)?;
        self.ready.store(true, Ordering::Release);
        Ok(())
    }

    /// Fills the map of metadata.
    pub(crate) fn chart(&self, header: &Header) -> Result<(), ImageError> {
        let map = self.meta.overlap();
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let add = |offset, len, kinds| map.add(offset, len, kinds).map_err(MetadataError::from);
        add(HostOffset::new(0), cluster, Kinds::MAIN_HEADER)?;
        add(header.l1_table_offset, self.l1.len() * 8, Kinds::ACTIVE_L1)?;
        for index in 0..self.l1.len() {
            let table = self.l1.get(index).l2_table();
            if table.get() != 0 {
                add(table, cluster, Kinds::ACTIVE_L2)?;
            }
        }
        let (table, len, blocks) = self.alloc()?.tables();
        add(table, len, Kinds::REFCOUNT_TABLE)?;
        for block in blocks {
            add(block, cluster, Kinds::REFCOUNT_BLOCK)?;
        }
        if let Some(crypto) = header.crypto() {
            add(crypto.offset, crypto.len_bytes, Kinds::CRYPTO_HEADER)?;
        }
        if header.snapshot_count > 0 {
            self.chart_snapshots(header)?;
        }
        Ok(())
    }

    /// Notes where snapshots have their tables.
    pub(crate) fn chart_snapshots(&self, header: &Header) -> Result<(), ImageError> {
        let storage = &**self.meta.storage();
        chart_snapshots(
            storage,
            header,
            self.meta.overlap(),
            self.pass_over_snapshots,
        )
    }
}

fn chart_snapshots(
    storage: &dyn Storage,
    header: &Header,
    map: &OverlapMap,
    pass_over: bool,
) -> Result<(), ImageError> {
    let geometry = header.geometry;
    let offset = header.snapshot_table_offset;
    let (snapshots, len) = read_snapshots(storage, header)?;
    let add = |offset, len, kinds| map.add(offset, len, kinds).map_err(MetadataError::from);
    add(offset, len, Kinds::SNAPSHOT_TABLE)?;
    let mut tables: Vec<(HostOffset, u32)> = snapshots
        .iter()
        .map(|snapshot| (snapshot.l1_table_offset, snapshot.l1_entries))
        .collect();
    tables.sort_unstable();
    tables.dedup();
    for (offset, entries) in tables {
        let len = match snapshot_l1_len(geometry, offset, entries) {
            Err(_) if pass_over => continue,
            len => len?,
        };
        add(offset, len, Kinds::INACTIVE_L1)?;
        for_each_entry(storage, offset, len, |bits| {
            let table = L1Entry::from_bits(bits).l2_table();
            if table.get() == 0 {
                return Ok(());
            }
            add(table, geometry.cluster_size(), Kinds::INACTIVE_L2).map_err(ImageError::from)
        })?;
    }
    Ok(())
}

/// Bytes of a snapshot's L1 table, if it can be one.
pub(crate) fn snapshot_l1_len(
    geometry: Geometry,
    offset: HostOffset,
    entries: u32,
) -> Result<u64, ImageError> {
    let len = u64::from(entries) * 8;
    let ends = offset.get().checked_add(len);
    let problem = if len > MAX_L1_BYTES {
        SnapshotL1Problem::TooLarge
    } else if !geometry.is_cluster_aligned(offset) || ends.is_none_or(|end| end > i64::MAX as u64) {
        SnapshotL1Problem::Place
    } else {
        return Ok(len);
    };
    Err(ImageError::SnapshotL1 {
        offset,
        entries,
        problem,
    })
}

/// The snapshot table, and its length in bytes.
pub(crate) fn read_snapshots(
    storage: &dyn Storage,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64), ImageError> {
    let offset = header.snapshot_table_offset.get();
    let count = usize::try_from(header.snapshot_count).unwrap_or(usize::MAX);
    // Entries beyond the end of the file would be zeros, which no entry is.
    let left = storage.len()?.saturating_sub(offset).min(MAX_TABLE_BYTES);
    let mut len = (count as u64 * 256).max(PIECE).min(left);
    loop {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        storage.read_at(&mut bytes, offset)?;
        let mut snapshots = Vec::new();
        let mut at = 0;
        let result = loop {
            if snapshots.len() == count {
                break Ok(());
            }
            match Snapshot::decode(bytes.get(at..).unwrap_or_default()) {
                Ok((snapshot, unpadded)) => {
                    snapshots.push(snapshot);
                    at += unpadded.next_multiple_of(8);
                }
                Err(error) => break Err(error),
            }
        };
        let source = match result {
            Ok(()) => return Ok((snapshots, at as u64)),
            // Names may be long.
            Err(SnapshotError::Truncated { .. }) if len < left => {
                len = (len * 2).min(left);
                continue;
            }
            Err(SnapshotError::Truncated { needed, .. })
                if at as u64 + needed > MAX_TABLE_BYTES =>
            {
                SnapshotError::TableTooLarge {
                    found: at as u64 + needed,
                    limit: MAX_TABLE_BYTES,
                }
            }
            Err(error) => error,
        };
        return Err(ImageError::SnapshotEntry {
            entry: snapshots.len() as u64,
            count: header.snapshot_count.into(),
            source,
        });
    }
}

/// Reads a table of 8-byte entries, but not its holes, which a claim can make as long as it likes.
pub(crate) fn for_each_entry(
    storage: &dyn Storage,
    offset: HostOffset,
    len: u64,
    mut each: impl FnMut(u64) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let end = offset.get().saturating_add(len);
    let mut at = offset.get();
    let mut bytes = Vec::new();
    while at < end {
        let found = storage.extents(at..end, 64)?;
        let Some(last) = found.last().map(qcow2_io::Extent::end) else {
            break;
        };
        for extent in found
            .iter()
            .filter(|extent| extent.kind == ExtentKind::Data)
        {
            // A hole may begin in the middle of an entry.
            let stop = extent.end().next_multiple_of(8).min(end);
            let mut from = extent.offset & !7;
            while from < stop {
                let piece = PIECE.min(stop - from);
                bytes.resize(usize::try_from(piece).unwrap_or(0), 0);
                storage.read_at(&mut bytes, from)?;
                for entry in bytes.as_chunks::<8>().0 {
                    each(u64::from_be_bytes(*entry))?;
                }
                from += piece;
            }
        }
        at = last.max(at + 1);
    }
    Ok(())
}
