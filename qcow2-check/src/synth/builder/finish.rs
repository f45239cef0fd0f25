//! The end of an image in the making: tables whose content follows from everything else.

use qcow2_format::header::{BitmapsExtension, Extension};
use qcow2_format::{ClusterKind, HostOffset, L1Entry, L2Entry, set_refcount, snapshot};
use qcow2_io::Storage;

use super::{Builder, index};
use crate::synth::{SynthError, count32, table_bytes};

impl Builder {
    /// Writes the image; whatever `storage` held before is gone.
    ///
    /// # Errors
    ///
    /// The storage's, or something that the header or the refcount width can't express.
    pub fn finish(mut self, storage: &dyn Storage) -> Result<(), SynthError> {
        let geometry = self.geometry();
        self.finish_tables()?;
        self.reach(geometry.l1_entries_for(self.header.virtual_size()))?;
        let l1_clusters = geometry.clusters_for(self.active.len() as u64 * 8);
        self.header.l1_table_offset = self.take_counted(l1_clusters);
        self.header.l1_entries = count32(self.active.len() as u64, "the L1 table")?;
        self.count_trees();
        self.finish_trees();
        self.finish_refcounts()?;
        let header = self.header.encode()?;
        self.pieces.push((HostOffset::new(0), header));

        storage.set_len(0)?;
        storage.set_len(self.end().get())?;
        for (offset, content) in &self.pieces {
            storage.write_at(content, offset.get())?;
        }
        storage.flush()?;
        Ok(())
    }

    /// Places the snapshot table and the bitmap directory.
    fn finish_tables(&mut self) -> Result<(), SynthError> {
        if !self.snapshots.is_empty() {
            let table: Vec<_> = self.snapshots.iter().map(|(s, _)| s.clone()).collect();
            self.header.snapshot_count = count32(table.len() as u64, "the snapshot table")?;
            self.header.snapshot_table_offset = self.place(&snapshot::encode_table(&table)?);
        }
        if !self.bitmaps.is_empty() {
            let mut directory = Vec::new();
            for bitmap in &self.bitmaps {
                directory.append(&mut bitmap.encode()?);
            }
            let extension = BitmapsExtension {
                count: count32(self.bitmaps.len() as u64, "the bitmap directory")?,
                directory_len_bytes: directory.len() as u64,
                directory_offset: self.place(&directory),
            };
            self.header.extensions.push(Extension::Bitmaps(extension));
            self.header.autoclear.set_bitmaps(true);
        }
        Ok(())
    }

    /// Counts what the trees refer to.
    fn count_trees(&mut self) {
        let rules = self.header.entry_rules();
        let geometry = rules.geometry;
        let trees = self.snapshots.iter().map(|(_, tree)| tree);
        let mut count = |offset: HostOffset, len: u64| {
            let first = geometry.host_cluster(offset).get();
            let clusters = geometry.clusters_for(offset.get() % geometry.cluster_size() + len);
            let touched = self.references.iter_mut().zip(0..first + clusters);
            for (references, _) in touched.skip(usize::try_from(first).unwrap_or(usize::MAX)) {
                *references += 1;
            }
        };
        for number in trees.chain([&self.active]).flatten().flatten() {
            let Some(table) = self.tables.get(*number) else {
                continue;
            };
            count(table.offset, 1);
            for entry in &table.entries {
                match entry.kind(rules) {
                    ClusterKind::Unallocated | ClusterKind::ZeroPlain => {}
                    ClusterKind::ZeroAllocated(offset) | ClusterKind::Normal(offset) => {
                        count(offset, 1);
                    }
                    ClusterKind::Compressed(extent) => count(extent.offset, extent.len_bytes),
                }
            }
        }
    }

    /// Writes all L1 and L2 tables, their COPIED flags by the references counted.
    fn finish_trees(&mut self) {
        let rules = self.header.entry_rules();
        let only_reference = |offset: HostOffset| {
            let cluster = rules.geometry.host_cluster(offset).get();
            let cluster = usize::try_from(cluster).ok();
            cluster.and_then(|c| self.references.get(c)) == Some(&1)
        };
        let mut pieces = Vec::new();
        for table in &self.tables {
            let mut words = Vec::new();
            for entry in &table.entries {
                let entry = match entry.kind(rules) {
                    ClusterKind::Normal(at) => {
                        L2Entry::normal(at, only_reference(at), entry.bitmap())
                    }
                    ClusterKind::ZeroAllocated(at) => L2Entry::zero(at, only_reference(at)),
                    _ => *entry,
                };
                words.push(entry.word());
                if rules.geometry.extended_l2() {
                    words.push(entry.bitmap());
                }
            }
            pieces.push((table.offset, table_bytes(words)));
        }
        let l1 = |tree: &[Option<usize>]| {
            table_bytes(tree.iter().map(|entry| {
                entry
                    .and_then(|number| self.tables.get(number))
                    .map_or(0, |table| {
                        L1Entry::new(table.offset, only_reference(table.offset)).bits()
                    })
            }))
        };
        for (snapshot, tree) in &self.snapshots {
            pieces.push((snapshot.l1_table_offset, l1(tree)));
        }
        pieces.push((self.header.l1_table_offset, l1(&self.active)));
        self.pieces.append(&mut pieces);
    }

    /// Places refcount blocks and refcount table behind everything else.
    fn finish_refcounts(&mut self) -> Result<(), SynthError> {
        let geometry = self.geometry();
        let per_block = geometry.refcounts_per_block();
        // Blocks and table have refcounts, too, and so may call for more of them.
        let used = self.references.len() as u64;
        let (mut blocks, mut table) = (0, 0);
        loop {
            let needed = (used + blocks + table).div_ceil(per_block);
            if needed == blocks {
                break;
            }
            blocks = needed;
            table = geometry.clusters_for(blocks * 8);
        }
        let first = self.take_counted(blocks);
        self.header.refcount_table_offset = self.take_counted(table);
        self.header.refcount_table_clusters = count32(table, "the refcount table")?;
        let mut entries = Vec::new();
        for (number, counts) in (0..).zip(self.references.chunks(index(per_block)?)) {
            let mut block = vec![0; geometry.cluster_len()];
            for (index, count) in counts.iter().enumerate() {
                set_refcount(&mut block, geometry, index, *count)
                    .ok_or(SynthError::TooLarge { what: "a refcount" })?;
            }
            let offset = HostOffset::new(first.get() + number * geometry.cluster_size());
            entries.push(offset.get());
            self.pieces.push((offset, block));
        }
        let table = (self.header.refcount_table_offset, table_bytes(entries));
        self.pieces.push(table);
        Ok(())
    }
}
