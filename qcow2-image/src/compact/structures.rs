//! What lies in one piece and has one pointer: L1 tables, the snapshot table, the refcount table and its blocks.

use qcow2_cache::{Kinds, MetadataError, field};
use qcow2_format::snapshot::encode_table;
use qcow2_format::{HostCluster, HostOffset};
use qcow2_io::Storage as _;

use super::index;
use crate::buffer::Pages;
use crate::{Image, ImageError};

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    ActiveL1,
    SnapshotTable,
    SnapshotL1,
    RefcountTable,
    /// The block with this number.
    RefcountBlock(u64),
    BitmapDirectory,
    /// Of so many bytes, with its pointer there.
    BitmapTable {
        pointer: HostOffset,
        len: u64,
    },
}

/// A structure and the clusters that it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Structure {
    pub(super) what: What,
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Structure {
    pub(super) fn end(&self) -> u64 {
        self.first + self.count
    }

    fn kinds(&self) -> Kinds {
        match self.what {
            What::ActiveL1 => Kinds::ACTIVE_L1,
            What::SnapshotTable => Kinds::SNAPSHOT_TABLE,
            What::SnapshotL1 => Kinds::INACTIVE_L1,
            What::RefcountTable => Kinds::REFCOUNT_TABLE,
            What::RefcountBlock(_) => Kinds::REFCOUNT_BLOCK,
            What::BitmapDirectory => Kinds::BITMAP_DIRECTORY,
            What::BitmapTable { .. } => Kinds::BITMAP_TABLE,
        }
    }
}

impl Image {
    /// The structures that can be moved.
    pub(super) fn structures(&self) -> Result<Vec<Structure>, ImageError> {
        let header = self.header();
        let mut found = Vec::new();
        let mut add = |what, offset: HostOffset, len: u64| {
            if len > 0 {
                found.push(Structure {
                    what,
                    first: self.geometry.host_cluster(offset).get(),
                    count: self.geometry.clusters_for(len),
                });
            }
        };
        add(What::ActiveL1, header.l1_table_offset, self.l1.len() * 8);
        let (snapshots, len) = self.snapshot_table()?;
        add(What::SnapshotTable, header.snapshot_table_offset, len);
        let mut tables: Vec<(HostOffset, u64)> = snapshots
            .iter()
            .map(|snapshot| (snapshot.l1_table_offset, u64::from(snapshot.l1_entries) * 8))
            .collect();
        tables.sort_unstable_by(|a, b| b.cmp(a));
        tables.dedup_by_key(|(offset, _)| *offset);
        for (offset, len) in tables {
            add(What::SnapshotL1, offset, len);
        }
        let alloc = self.alloc()?;
        let (table, len, _) = alloc.tables();
        add(What::RefcountTable, table, len);
        for number in 0..len / 8 {
            if let Some(block) = alloc.block(number)? {
                add(What::RefcountBlock(number), block, self.cluster_size());
            }
        }
        Ok(found)
    }

    /// Moves a structure to clusters that are free. The gate is closed, and everything in the file.
    pub(super) fn move_structure(&self, it: &Structure, to: u64) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        let target = HostCluster::new(to);
        self.rework(|| {
            let moved = match it.what {
                What::RefcountBlock(number) => {
                    alloc.move_block(number, target).map_err(ImageError::from)
                }
                What::RefcountTable => alloc.move_table(target).map_err(ImageError::from),
                _ => self.move_by_pointer(it, to),
            };
            moved.inspect_err(|_| {
                if self.meta.is_writable() && self.chart_structure(it, to).is_err() {
                    self.meta.give_up();
                }
            })
        })
    }

    /// After a failure: where it is now is what the map has to say.
    fn chart_structure(&self, it: &Structure, to: u64) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        for first in [it.first, to] {
            let offset = HostOffset::new(first << bits);
            let map = self.meta.overlap();
            map.remove(offset, it.count << bits, it.kinds());
        }
        let header = self.header();
        self.chart(&header)
    }

    fn move_by_pointer(&self, it: &Structure, to: u64) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        let bits = self.geometry.cluster_bits();
        let (old, new) = (
            HostOffset::new(it.first << bits),
            HostOffset::new(to << bits),
        );
        let len = it.count << bits;
        alloc.cover(HostCluster::new(to + it.count))?;
        for number in 0..it.count {
            // Snapshots may have one L1 table together.
            let count = alloc.refcount(HostCluster::new(it.first + number))?;
            self.check_free(to + number)?;
            alloc.set_refcount(HostCluster::new(to + number), count)?;
        }
        let mut bytes = Pages::default();
        let mut done = 0;
        while done < len {
            bytes.resize(index((len - done).min(PIECE)));
            self.meta.storage().read_at(&mut bytes, old.get() + done)?;
            let place = HostOffset::new(new.get() + done);
            self.meta.write(it.kinds(), place, &bytes)?;
            done += bytes.len() as u64;
        }
        // New refcount blocks, too.
        self.meta.commit(alloc)?;
        self.meta.write_refcounts()?;
        self.meta.flush()?;
        let map = self.meta.overlap();
        map.add(new, len, it.kinds()).map_err(MetadataError::from)?;
        match it.what {
            What::ActiveL1 => self
                .meta
                .switch_header(field::L1_TABLE, |header| header.l1_table_offset = new)?,
            What::SnapshotTable => self.meta.switch_header(field::SNAPSHOTS, |header| {
                header.snapshot_table_offset = new;
            })?,
            What::SnapshotL1 => self.redirect_snapshots(old, new)?,
            _ => self.redirect_bitmaps(it.what, new)?,
        }
        map.remove(old, len, it.kinds());
        for number in it.first..it.end() {
            alloc.set_refcount(HostCluster::new(number), 0)?;
        }
        Ok(())
    }

    /// Has the snapshots whose L1 table lay at `old` find it at `new`.
    fn redirect_snapshots(&self, old: HostOffset, new: HostOffset) -> Result<(), ImageError> {
        let table = self.meta.header().snapshot_table_offset;
        let (snapshots, _) = self.snapshot_table()?;
        let mut at = table.get();
        for snapshot in &snapshots {
            if snapshot.l1_table_offset == old {
                // It is the first field, and entries are aligned.
                let bytes = new.get().to_be_bytes();
                self.meta
                    .write(Kinds::SNAPSHOT_TABLE, HostOffset::new(at), &bytes)?;
            }
            let len = encode_table(std::slice::from_ref(snapshot))?.len() as u64;
            at += len.next_multiple_of(8);
        }
        Ok(self.meta.flush()?)
    }

    /// Refuses to move anything to where something is.
    pub(super) fn check_free(&self, cluster: u64) -> Result<(), ImageError> {
        let count = self.alloc()?.refcount(HostCluster::new(cluster))?;
        if count == 0 {
            return Ok(());
        }
        Err(ImageError::Refused {
            what: "a cluster",
            offset: HostOffset::new(cluster << self.geometry.cluster_bits()),
            detail: format!("it was to be moved to, but its refcount is {count}"),
        })
    }
}
