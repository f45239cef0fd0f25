//! Looking through the L1 tables: which L2 tables hang on more than one place of the disk?

use qcow2_format::L1Entry;

use super::{TableRef, Window};
use crate::image::{Image, Tree};
use crate::reader::is_zero;
use crate::refmap::RefMap;
use crate::{ByteRange, Code, Finding, Place, Run, Structure};

/// L1 entries that repeat a table of another place, at most: an L1 table full of them and more.
const AGAIN_MAX: usize = 8 << 20;
/// Tables that hang on several places, at most. Sound images have none.
const DUPLICATES_MAX: usize = 1 << 20;

/// What the L1 tables say together.
#[derive(Debug, Default)]
pub(crate) struct L1Scan {
    /// Tables that several groups refer to, sorted by offset. They are walked apart from the groups, once each, with all
    /// their references as weight: a million references to one table cost no more than one.
    pub(crate) duplicates: Vec<TableRef>,
    /// Windows in which any tree has an entry; the others need no second look.
    pub(crate) windows: Vec<u64>,
    /// Entries that lead to a table, weighted by their trees.
    pub(crate) l1_entries: u64,
    /// The tables are scattered or repeated so absurdly that the scan was cut off.
    pub(crate) scattered: bool,
}

impl L1Scan {
    /// The window that is unit of work number `unit`; units that follow the windows are others.
    pub(crate) fn window(&self, unit: u64) -> Option<u64> {
        self.windows.get(usize::try_from(unit).ok()?).copied()
    }

    /// Whether a table is walked apart from its groups.
    pub(crate) fn is_duplicate(&self, offset: u64) -> bool {
        !self.duplicates.is_empty()
            && self
                .duplicates
                .binary_search_by_key(&offset, |table| table.offset)
                .is_ok()
    }
}

/// Scans all L1 tables, counts references to L2 tables into nothing yet, and finds the duplicates.
pub(crate) fn scan(image: &Image<'_>, run: &Run<'_>) -> L1Scan {
    let windows = Window::plan(image);
    let mut seen = RefMap::new(image.file_clusters());
    let mut again = Vec::new();
    let mut scan = L1Scan::default();
    let mut window = Window::default();
    let mut group = Vec::new();
    let bits = image.cluster_bits();
    for number in 0..windows.count() {
        if run.is_cancelled() || scan.scattered {
            return scan;
        }
        scan.scattered = seen.is_scattered() || again.len() > AGAIN_MAX;
        window.load(image, &windows, number, |tree, range, error| {
            let first = range.start.saturating_sub(tree.offset) / 8;
            let entries = (range.end - range.start).div_ceil(8);
            let structure = if tree.active {
                Structure::ActiveL1
            } else {
                Structure::SnapshotL1
            };
            let place = Place::of(structure)
                .at(range.start, range.end - range.start)
                .guest(
                    image.guest_offset(first, 0),
                    entries.saturating_mul(image.geometry.l2_coverage()),
                )
                .snapshot(tree.snapshot);
            run.find(Finding::new(
                Code::L1Unreadable,
                place,
                format!("can't be read: {error}"),
            ));
        });
        if !window.indices().is_empty() {
            scan.windows.push(number);
        }
        for index in window.indices() {
            window.group(image, index, &mut group);
            for table in &group {
                scan.l1_entries = scan.l1_entries.saturating_add(table.weight);
                if table.offset >= image.file_len() {
                    // Reads as zeros, however often.
                    continue;
                }
                let aligned = table.offset.trailing_zeros() >= bits;
                if !aligned || !seen.insert(table.offset >> bits) {
                    again.push(table.offset);
                }
            }
        }
    }
    again.sort_unstable();
    // An unaligned table is apart only where it comes a second time.
    let mut duplicates: Vec<u64> = Vec::new();
    for pair in again.chunk_by(|a, b| a == b) {
        if let Some(offset) = pair.first() {
            let aligned = offset.trailing_zeros() >= bits;
            if aligned || pair.len() > 1 {
                duplicates.push(*offset);
            }
        }
    }
    drop(again);
    drop(seen);
    scan.scattered |= duplicates.len() > DUPLICATES_MAX;
    if scan.scattered {
        return scan;
    }
    if duplicates.is_empty() {
        return scan;
    }
    scan.duplicates = duplicates
        .into_iter()
        .map(|offset| TableRef {
            offset,
            l1_index: u64::MAX,
            ..TableRef::default()
        })
        .collect();
    for number in &scan.windows {
        window.load(image, &windows, *number, |_, _, _| {});
        for index in window.indices() {
            window.group(image, index, &mut group);
            for table in &group {
                let found = scan
                    .duplicates
                    .binary_search_by_key(&table.offset, |t| t.offset);
                let Some(known) = found.ok().and_then(|at| scan.duplicates.get_mut(at)) else {
                    continue;
                };
                if known.l1_index == u64::MAX {
                    known.l1_index = table.l1_index;
                    known.snapshot = table.snapshot;
                }
                known.weight = known.weight.saturating_add(table.weight);
                known.active_refs = known.active_refs.saturating_add(table.active_refs);
                known.active |= table.active;
            }
        }
    }
    scan
}

impl Window {
    /// Loads window `number`: its part of every tree's L1 table.
    pub(crate) fn load(
        &mut self,
        image: &Image<'_>,
        plan: &super::tables::Plan,
        number: u64,
        mut failed: impl FnMut(&Tree, ByteRange, &qcow2_io::StorageError),
    ) {
        (self.start, self.end) = plan.range(number);
        let width = usize::try_from(self.end - self.start).unwrap_or(0);
        self.rows.clear();
        self.bytes.clear();
        for (tree_number, tree) in image.trees.iter().enumerate() {
            let entries = tree.entries.min(self.end).saturating_sub(self.start);
            let offset = tree.offset.saturating_add(self.start * 8);
            if entries == 0 || image.reader.is_known_zero(offset, entries * 8) {
                continue;
            }
            let from = self.bytes.len();
            self.bytes.resize(from + width * 8, 0);
            let used = usize::try_from(entries * 8).unwrap_or(0);
            let Some(part) = self.bytes.get_mut(from..from + used) else {
                continue;
            };
            let mut whole = true;
            image.reader.read_parts(part, offset, |range, error| {
                whole = false;
                failed(tree, range, error);
            });
            if is_zero(part) {
                if whole {
                    image.reader.met_zero_table(offset);
                }
                self.bytes.truncate(from);
            } else {
                self.rows.push(tree_number);
            }
        }
    }

    /// The L1 indices of the window.
    pub(crate) fn indices(&self) -> std::ops::Range<u64> {
        // Nothing to look at where no tree has an entry.
        if self.rows.is_empty() {
            self.end..self.end
        } else {
            self.start..self.end
        }
    }

    /// The row of the active tree.
    pub(crate) fn active_row(&self, image: &Image<'_>) -> Option<usize> {
        let is_active = |number: &usize| image.trees.get(*number).is_some_and(|tree| tree.active);
        self.rows.iter().position(is_active)
    }

    /// The entries for an index, each with the number of its tree.
    pub(crate) fn entries(&self, index: u64) -> impl Iterator<Item = (usize, L1Entry)> + '_ {
        let rows = self.rows.iter().enumerate();
        rows.map(move |(row, tree)| (*tree, self.entry(row, index)))
    }

    /// The entry of a row.
    pub(crate) fn entry(&self, row: usize, index: u64) -> L1Entry {
        let width = usize::try_from(self.end - self.start).unwrap_or(0);
        let column = usize::try_from(index - self.start).unwrap_or(usize::MAX);
        let (words, _) = self.bytes.as_chunks::<8>();
        L1Entry::from_be_bytes(words.get(row * width + column).copied().unwrap_or_default())
    }

    /// The tables for an index, each as often as there are trees that have it: with a snapshot, or `None` for the active
    /// tree. Sorted.
    pub(crate) fn trees_by_table(
        &self,
        image: &Image<'_>,
        index: u64,
        tables: &mut Vec<(u64, Option<u64>)>,
    ) {
        tables.clear();
        for (row, tree_number) in self.rows.iter().enumerate() {
            let entry = self.entry(row, index);
            if let (Some(tree), false) = (image.trees.get(*tree_number), entry.is_empty()) {
                tables.push((entry.l2_table().get(), tree.snapshot));
            }
        }
        tables.sort_unstable();
    }

    /// The distinct tables that the trees have for an index, in the order of their offsets.
    pub(crate) fn group(&self, image: &Image<'_>, index: u64, group: &mut Vec<TableRef>) {
        group.clear();
        for (row, tree_number) in self.rows.iter().enumerate() {
            let entry = self.entry(row, index);
            let Some(tree) = image.trees.get(*tree_number) else {
                continue;
            };
            if entry.is_empty() {
                continue;
            }
            group.push(TableRef {
                offset: entry.l2_table().get(),
                weight: tree.weight,
                active_refs: u64::from(tree.active),
                active: tree.active,
                snapshot: tree.snapshot,
                l1_index: index,
                copied: tree.active && entry.is_copied(),
            });
        }
        if group.len() < 2 {
            return;
        }
        // Stable: the first tree that has a table gives it its name.
        group.sort_by_key(|table| table.offset);
        group.dedup_by(|later, first| {
            let same = later.offset == first.offset;
            if same {
                first.weight = first.weight.saturating_add(later.weight);
                first.active_refs += later.active_refs;
                first.active |= later.active;
                first.copied |= later.copied;
                first.snapshot = first.snapshot.or(later.snapshot);
            }
            same
        });
    }
}
