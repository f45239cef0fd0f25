//! Units of the walk: windows of L1 indices, and tables that are walked apart.

use super::{L1Scan, TableRef, Worker};
use crate::image::{Image, uncounted};
use crate::reader::is_zero;
use crate::refmap::Sharing;
use crate::{Code, Place, Structure};

/// Bytes of L2 tables that make a unit of work.
const UNIT_BYTES: u64 = 2 << 20;
/// Bytes read at once where tables lie one behind the other.
const READ_BYTES: usize = 256 << 10;
/// Most bytes of L1 entries in a window, all trees together.
const WINDOW_BYTES: u64 = 2 << 20;
/// Tables walked apart that make a unit of work.
const DUPLICATES_PER_UNIT: usize = 64;

/// How the L1 indices are divided into windows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    entries: u64,
    width: u64,
}

impl Plan {
    pub(crate) fn count(&self) -> u64 {
        self.entries.div_ceil(self.width)
    }

    pub(crate) fn range(&self, number: u64) -> (u64, u64) {
        let start = number.saturating_mul(self.width).min(self.entries);
        (start, start.saturating_add(self.width).min(self.entries))
    }
}

/// The part of all L1 tables that belongs to a window of indices.
#[derive(Debug, Default)]
pub(crate) struct Window {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Trees that have an entry here.
    pub(super) rows: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Window {
    /// Divides the L1 indices of an image.
    pub(crate) fn plan(image: &Image<'_>) -> Plan {
        let entries = image
            .trees
            .iter()
            .map(|tree| tree.entries)
            .max()
            .unwrap_or(0);
        let trees = (image.trees.len() as u64).max(1);
        let by_tables = UNIT_BYTES / image.cluster_size();
        let by_entries = WINDOW_BYTES / 8 / trees;
        Plan {
            entries,
            width: by_tables.min(by_entries).max(1),
        }
    }
}

/// How many units the tables make that are walked apart.
pub(crate) fn duplicate_units(scan: &L1Scan) -> u64 {
    scan.duplicates.len().div_ceil(DUPLICATES_PER_UNIT) as u64
}

impl Worker<'_, '_> {
    /// Walks all tables of a window.
    pub(super) fn walk_window(&mut self, plan: &Plan, number: u64, scan: &L1Scan) {
        let mut window = Window::default();
        // What can't be read was told when the L1 tables were scanned.
        window.load(self.image, plan, number, |_, _, _| {});
        self.judge_l1_entries(&window);
        let mut group = Vec::new();
        // Single tables of neighbouring indices wait here to be read together.
        let mut batch: Vec<TableRef> = Vec::new();
        for index in window.indices() {
            window.group(self.image, index, &mut group);
            if !scan.duplicates.is_empty() {
                group.retain(|table| !scan.is_duplicate(table.offset));
            }
            self.count_tables(&group);
            for table in group.iter().filter(|table| table.active) {
                self.tally.copied_suspect |= table.copied != (table.weight == 1);
            }
            match group.as_slice() {
                [] => {}
                [table] => {
                    let follows = batch.last().is_some_and(|last| {
                        last.offset.saturating_add(self.image.cluster_size()) == table.offset
                    });
                    let full = batch.len() * self.image.geometry.cluster_len() >= READ_BYTES;
                    if !follows || full {
                        self.walk_batch(&mut batch);
                    }
                    batch.push(table.clone());
                }
                several => {
                    self.walk_batch(&mut batch);
                    self.walk_merged(several);
                }
            }
        }
        self.walk_batch(&mut batch);
    }

    /// Walks tables that hang on several places of the disk, each once.
    pub(super) fn walk_duplicates(&mut self, scan: &L1Scan, unit: u64) {
        let first = usize::try_from(unit).unwrap_or(0) * DUPLICATES_PER_UNIT;
        for table in scan.duplicates.iter().skip(first).take(DUPLICATES_PER_UNIT) {
            self.count_tables(std::slice::from_ref(table));
            self.walk_batch(&mut vec![table.clone()]);
            let image = self.image;
            self.find(Code::L2Shared, 1, || {
                let detail = format!(
                    "{} L1 entries lead to it, from several places",
                    table.weight
                );
                (image.table_place(table), detail)
            });
        }
    }

    /// What is wrong with the L1 entries themselves.
    fn judge_l1_entries(&mut self, window: &Window) {
        for index in window.indices() {
            for (row, tree_number) in window.rows.iter().enumerate() {
                let entry = window.entry(row, index);
                if entry.is_empty() {
                    continue;
                }
                let Some(tree) = self.image.trees.get(*tree_number) else {
                    continue;
                };
                let offset = entry.l2_table();
                let aligned = self.image.geometry.is_cluster_aligned(offset);
                if entry.reserved_bits() == 0 && aligned && offset.get() != 0 {
                    continue;
                }
                let structure = if tree.active {
                    Structure::ActiveL1
                } else {
                    Structure::SnapshotL1
                };
                let image = self.image;
                let place = || {
                    Place::of(structure)
                        .at(tree.offset.saturating_add(index * 8), 8)
                        .entry(index)
                        .guest(image.guest_offset(index, 0), image.geometry.l2_coverage())
                        .snapshot(tree.snapshot)
                };
                let weight = tree.weight;
                let (bits, reserved) = (entry.bits(), entry.reserved_bits());
                if reserved != 0 {
                    self.find(Code::L1Reserved, weight, || {
                        (
                            place(),
                            format!("entry {bits:#x} has the reserved bits {reserved:#x}"),
                        )
                    });
                }
                if offset.get() == 0 {
                    self.find(Code::L1NoTable, weight, || {
                        (place(), format!("entry {bits:#x} has no offset"))
                    });
                } else if !aligned {
                    self.find(Code::L1Unaligned, weight, || {
                        (place(), format!("its L2 table would start at {offset}"))
                    });
                }
            }
        }
    }

    /// Counts the references to L2 tables.
    fn count_tables(&mut self, tables: &[TableRef]) {
        for table in tables {
            let len = self.image.cluster_size();
            let counted = self.image.count(
                &mut self.map,
                table.offset,
                len,
                table.weight,
                Sharing::Exclusive,
            );
            self.bound_memory();
            if let Some(code) = uncounted(counted) {
                let image = self.image;
                self.find(code, table.weight, || {
                    (image.table_place(table), image.past_end(table.offset))
                });
            }
        }
    }

    /// Reads the tables of a batch, which lie one behind the other, and walks them.
    fn walk_batch(&mut self, batch: &mut Vec<TableRef>) {
        let Some(first) = batch.first() else { return };
        let size = self.image.geometry.cluster_len();
        let offset = first.offset;
        let len = batch.len() * size;
        if !self.image.reader.is_known_zero(offset, len as u64) {
            let mut buffer = std::mem::take(&mut self.buffer);
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            let bytes = buffer.get_mut(..len).unwrap_or_default();
            match self.image.reader.read(bytes, offset) {
                Ok(()) => {
                    for (table, bytes) in batch.iter().zip(bytes.chunks_exact(size)) {
                        self.walk_table(table, bytes);
                    }
                }
                Err(_) if batch.len() > 1 => {
                    // One of them can't be read: find out which.
                    for table in batch.drain(..) {
                        self.walk_batch(&mut vec![table]);
                    }
                }
                Err(_) => {
                    let table = first.clone();
                    self.read_table_parts(&table, 0, bytes);
                    self.walk_entries(&table, bytes);
                }
            }
            self.buffer = buffer;
        }
        batch.clear();
    }

    /// Reads a part of a table, from `from` bytes in, with zeros for what can't be read, and tells of that.
    pub(super) fn read_table_parts(&mut self, table: &TableRef, from: u64, bytes: &mut [u8]) {
        let image = self.image;
        let entry_size = image.geometry.l2_entry_size();
        let mut bad = Vec::new();
        let start = table.offset.saturating_add(from);
        image.reader.read_parts(bytes, start, |range, error| {
            bad.push((range, error.to_string()));
        });
        for (range, error) in bad {
            let first = range.start.saturating_sub(table.offset) / entry_size;
            let entries = (range.end - range.start).div_ceil(entry_size);
            self.find(Code::L2Unreadable, table.weight, || {
                let place = image
                    .l2_place(table, first)
                    .at(range.start, range.end - range.start)
                    .guest(
                        image.guest_offset(table.l1_index, first),
                        entries << image.cluster_bits(),
                    );
                (place, format!("can't be read: {error}"))
            });
        }
    }

    fn walk_table(&mut self, table: &TableRef, bytes: &[u8]) {
        if self.walk_entries(table, bytes) == 0 && is_zero(bytes) {
            self.image.reader.met_zero_table(table.offset);
        }
    }
}
