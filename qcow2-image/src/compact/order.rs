//! Which slot each cluster gets, when everything lies in the order of the disk.

use std::collections::HashMap;

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, L1Entry};
use qcow2_io::Storage as _;

use super::extents::{Extent, Pack};
use super::index;
use crate::{Image, ImageError};

/// Where in the order of all trees something stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The active tree is the first, those of snapshots follow.
    tree: u64,
    l1: u64,
    part: Part,
    l2: usize,
}

/// Of an L2 table, first itself, then the compressed data that it leads to, then the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Table,
    Packed,
    Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// What is in it stays.
    Kept,
    /// It is vacated, and gets what belongs there.
    Fresh,
    /// It has something that is not part of the order.
    Structure,
}

/// What a number of slots are to hold.
pub(super) struct Plan<'a> {
    image: &'a Image,
    /// Clusters to be moved, at most.
    most: u64,
    /// Slots below hold what they should.
    first: u64,
    slots: Vec<Slot>,
    /// Which clusters get which slots.
    pub(super) clusters: HashMap<u64, u64>,
    /// Which compressed data gets which bytes.
    pub(super) extents: HashMap<u64, (Extent, u64)>,
    pack: Pack,
    /// References that any compressed data may have.
    weight: u64,
}

impl<'a> Plan<'a> {
    pub(super) fn new(image: &'a Image, first: u64, most: u64, trees: u64) -> Self {
        let max = image.geometry.refcount_max();
        Self {
            image,
            most,
            first,
            slots: Vec::new(),
            clusters: HashMap::new(),
            extents: HashMap::new(),
            pack: Pack::new(image.geometry.cluster_bits(), max),
            weight: trees.min(max),
        }
    }

    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// One past the last slot.
    pub(super) fn end(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    pub(super) fn is_fresh(&self, cluster: u64) -> bool {
        self.slot(cluster) == Some(Slot::Fresh)
    }

    fn slot(&self, cluster: u64) -> Option<Slot> {
        let at = cluster.checked_sub(self.first)?;
        self.slots.get(index(at)).copied()
    }

    fn is_full(&self) -> bool {
        let moves = self.clusters.len() + self.extents.len();
        moves as u64 >= self.most || self.slots.len() as u64 >= self.most.max(1 << 16)
    }

    /// Goes on from a place in the order until enough is planned; tells where it stopped, or `None` at the end.
    pub(super) fn fill(&mut self, mut at: Cursor) -> Result<Option<Cursor>, ImageError> {
        loop {
            let Some(l1) = self.image.tree(at.tree)? else {
                return Ok(None);
            };
            while index(at.l1) < l1.len() {
                let entry = l1.get(index(at.l1)).copied().unwrap_or_default();
                if entry.l2_table().get() != 0 {
                    at = self.fill_table(entry, at)?;
                    if self.is_full() {
                        return Ok(Some(at));
                    }
                }
                at = Cursor {
                    l1: at.l1 + 1,
                    part: Part::Table,
                    l2: 0,
                    ..at
                };
            }
            at = Cursor {
                tree: at.tree + 1,
                ..Cursor::default()
            };
        }
    }

    /// Plans for a table and what it leads to; if it gets full, the cursor tells where.
    fn fill_table(&mut self, entry: L1Entry, mut at: Cursor) -> Result<Cursor, ImageError> {
        let image = self.image;
        let bits = image.geometry.cluster_bits();
        let offset = entry.l2_table().get();
        if at.part == Part::Table {
            self.place_cluster(offset >> bits);
            at.part = Part::Packed;
        }
        if image.rules.external_data {
            return Ok(at);
        }
        let mut bytes = vec![0; image.geometry.cluster_len()];
        image.meta.storage().read_at(&mut bytes, offset)?;
        let table = L2Table::new(&bytes, image.geometry);
        for part in [Part::Packed, Part::Plain] {
            if at.part != part {
                continue;
            }
            while at.l2 < table.len() {
                if self.is_full() {
                    return Ok(at);
                }
                let entry = table.get(at.l2).unwrap_or_default();
                match entry.kind(image.rules) {
                    ClusterKind::Normal(data) | ClusterKind::ZeroAllocated(data)
                        if part == Part::Plain =>
                    {
                        self.place_cluster(data.get() >> bits);
                    }
                    ClusterKind::Compressed(_) if part == Part::Packed => {
                        if let Some(extent) = image.extent_of(entry, self.weight) {
                            self.place_extent(extent);
                        }
                    }
                    _ => {}
                }
                at.l2 += 1;
            }
            (at.part, at.l2) = (Part::Plain, 0);
        }
        // Through: a table that was left in the middle begins with its rest.
        at.l2 = table.len();
        Ok(at)
    }

    fn skip_structures(&mut self) {
        while self.image.is_structure(self.end()) {
            self.slots.push(Slot::Structure);
        }
    }

    fn has_kept(&self, cluster: u64) -> bool {
        cluster < self.first || self.slot(cluster) == Some(Slot::Kept)
    }

    fn place_cluster(&mut self, cluster: u64) {
        if self.has_kept(cluster) || self.clusters.contains_key(&cluster) {
            return;
        }
        self.skip_structures();
        let slot = self.end();
        if cluster == slot {
            self.slots.push(Slot::Kept);
        } else {
            self.slots.push(Slot::Fresh);
            self.clusters.insert(cluster, slot);
        }
    }

    fn place_extent(&mut self, extent: Extent) {
        let clusters = extent.clusters(self.image.geometry.cluster_bits());
        if self.extents.contains_key(&extent.offset) {
            return;
        }
        if self.has_kept(clusters.start) {
            // It may end in a cluster that nothing else begins in.
            for cluster in clusters.clone() {
                if cluster == self.end() {
                    self.slots.push(Slot::Kept);
                }
            }
            if clusters.clone().all(|cluster| self.has_kept(cluster)) {
                return;
            }
        }
        if self.pack.run().is_empty() || self.pack.run().end != self.end() {
            self.skip_structures();
        }
        if clusters.start == self.end() {
            // It lies where it could go, or a little behind.
            for _ in clusters {
                self.slots.push(Slot::Kept);
            }
            self.pack.enter(0..0);
            return;
        }
        let place = loop {
            if let Some(place) = self.pack.place(extent) {
                break place;
            }
            let slot = self.end();
            if self.image.is_structure(slot) {
                self.slots.push(Slot::Structure);
                continue;
            }
            self.slots.push(Slot::Fresh);
            let run = self.pack.run();
            if !run.is_empty() && run.end == slot {
                self.pack.extend();
            } else {
                self.pack.enter(slot..slot + 1);
            }
        };
        self.extents.insert(extent.offset, (extent, place));
    }
}

impl Image {
    /// The L1 table of a tree; `None` if there are not so many.
    fn tree(&self, number: u64) -> Result<Option<Vec<L1Entry>>, ImageError> {
        if number == 0 {
            return Ok(Some(self.active_l1()));
        }
        let (snapshots, _) = self.snapshot_table()?;
        let Some(snapshot) = snapshots.get(index(number - 1)) else {
            return Ok(None);
        };
        self.read_l1(snapshot.l1_table_offset, snapshot.l1_entries)
            .map(Some)
    }
}
