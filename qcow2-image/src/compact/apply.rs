//! Moving: copies first, then pointers, then refcounts, with a flush between any two.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::ControlFlow;

use qcow2_cache::sync::atomic::Ordering;
use qcow2_cache::{Kinds, MetadataError};
use qcow2_format::{ClusterKind, HostCluster, HostOffset, L1Entry, L2Entry};
use qcow2_io::Storage as _;

use super::extents::Extent;
use super::index;
use crate::buffer::Pages;
use crate::trees::Table;
use crate::{Image, ImageError};

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

/// Refcounts by cluster.
type Refcounts = BTreeMap<u64, u64>;

/// What is moved where. New places are free, and none is an old one.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Guest data and L2 tables, by cluster.
    pub(super) clusters: BTreeMap<u64, u64>,
    /// Compressed data, by byte.
    pub(super) extents: BTreeMap<u64, (Extent, u64)>,
}

impl Moves {
    pub(super) fn is_empty(&self) -> bool {
        self.clusters.is_empty() && self.extents.is_empty()
    }

    fn cluster(&self, offset: HostOffset, bits: u32) -> Option<HostOffset> {
        let new = self.clusters.get(&(offset.get() >> bits))?;
        Some(HostOffset::new(new << bits))
    }
}

impl Image {
    /// Moves clusters, and gives the bytes that were copied. The gate is closed.
    pub(super) fn apply(&self, moves: &Moves) -> Result<u64, ImageError> {
        if moves.is_empty() {
            return Ok(0);
        }
        self.rework(|| {
            self.apply_now(moves).inspect_err(|_| {
                // Before references are counted anew, for that writes to tables.
                if self.meta.is_writable() && self.chart_again(moves).is_err() {
                    self.meta.give_up();
                }
            })
        })
    }

    fn apply_now(&self, moves: &Moves) -> Result<u64, ImageError> {
        let alloc = self.alloc()?;
        let bits = self.geometry.cluster_bits();
        let mut tables = self.all_tables()?;
        let (risen, fallen) = self.new_counts(moves)?;
        if let Some((last, _)) = risen.last_key_value() {
            alloc.cover(HostCluster::new(last + 1))?;
        }
        for (cluster, count) in &risen {
            self.check_free(*cluster)?;
            alloc.set_refcount(HostCluster::new(*cluster), *count)?;
        }
        let copied = self.copy_clusters(moves)? + self.copy_extents(moves)?;
        // New refcount blocks, too.
        self.meta.commit(alloc)?;
        self.meta.write_refcounts()?;
        self.meta.flush()?;

        let map = self.meta.overlap();
        let size = self.cluster_size();
        for (old, new) in &moves.clusters {
            let kinds = map.kinds(HostCluster::new(*old));
            if !kinds.is_empty() {
                map.add(HostOffset::new(new << bits), size, kinds)
                    .map_err(MetadataError::from)?;
            }
        }
        self.redirect_tables(&mut tables, moves)?;
        self.redirect_l1(moves)?;
        self.meta.flush()?;

        for index in 0..self.l1.len() {
            let entry = self.l1.get(index);
            if let Some(new) = moves.cluster(entry.l2_table(), bits) {
                self.l1.set(index, L1Entry::new(new, entry.is_copied()));
            }
        }
        for old in moves.clusters.keys() {
            let kinds = map.kinds(HostCluster::new(*old));
            map.remove(HostOffset::new(old << bits), size, kinds);
        }
        for (cluster, count) in fallen {
            alloc.set_refcount(HostCluster::new(cluster), count)?;
        }
        Ok(copied)
    }

    /// After a failure nobody knows which tables lie at their old places and which at new ones.
    fn chart_again(&self, moves: &Moves) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let tables = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
        for cluster in moves.clusters.iter().flat_map(|(old, new)| [old, new]) {
            let offset = HostOffset::new(cluster << bits);
            self.meta
                .overlap()
                .remove(offset, self.cluster_size(), tables);
        }
        let header = self.header();
        self.chart(&header)
    }

    /// The refcounts of the new places, and those that the old ones have afterwards.
    fn new_counts(&self, moves: &Moves) -> Result<(Refcounts, Refcounts), ImageError> {
        let alloc = self.alloc()?;
        let bits = self.geometry.cluster_bits();
        let (mut risen, mut fallen) = (Refcounts::new(), Refcounts::new());
        for (old, new) in &moves.clusters {
            risen.insert(*new, alloc.refcount(HostCluster::new(*old))?);
            fallen.insert(*old, 0);
        }
        for (extent, new) in moves.extents.values() {
            let placed = Extent {
                offset: *new,
                ..*extent
            };
            for cluster in placed.clusters(bits) {
                *risen.entry(cluster).or_insert(0) += extent.weight;
            }
            for cluster in extent.clusters(bits) {
                let count = match fallen.get(&cluster) {
                    Some(count) => *count,
                    None => alloc.refcount(HostCluster::new(cluster))?,
                };
                let left = count.checked_sub(extent.weight).ok_or_else(|| {
                    let offset = HostOffset::new(cluster << bits);
                    let detail = "it is lower than the references to its compressed data";
                    self.meta
                        .corrupt("the refcount of the cluster", offset, detail)
                })?;
                fallen.insert(cluster, left);
            }
        }
        Ok((risen, fallen))
    }

    fn copy_clusters(&self, moves: &Moves) -> Result<u64, ImageError> {
        let bits = self.geometry.cluster_bits();
        let most = (PIECE >> bits).max(1);
        let all: Vec<(u64, u64, bool)> = moves
            .clusters
            .iter()
            .map(|(old, new)| (*old, *new, self.is_table(*old)))
            .collect();
        let follows = |a: &(u64, u64, bool), b: &(u64, u64, bool)| {
            a.0 + 1 == b.0 && a.1 + 1 == b.1 && a.2 == b.2
        };
        let mut bytes = Pages::default();
        for run in all.chunk_by(follows) {
            for part in run.chunks(index(most)) {
                let Some((old, new, is_table)) = part.first().copied() else {
                    continue;
                };
                let (from, to) = (HostOffset::new(old << bits), HostOffset::new(new << bits));
                bytes.resize(index((part.len() as u64) << bits));
                if is_table {
                    self.meta.storage().read_at(&mut bytes, from.get())?;
                    let kinds = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
                    self.meta.write(kinds, to, &bytes)?;
                } else {
                    self.copy_data(from, to, &mut bytes)?;
                }
            }
        }
        Ok((all.len() as u64) << bits)
    }

    /// Copies guest data; where ciphers know sectors by their place, it is deciphered and enciphered again.
    fn copy_data(
        &self,
        from: HostOffset,
        to: HostOffset,
        bytes: &mut [u8],
    ) -> Result<(), ImageError> {
        let len = bytes.len() as u64;
        self.meta.check_data(to, len)?;
        if self.ciphers_by_place() {
            self.load_data(&mut [IoSliceMut::new(bytes)], 0, len, 0, from)?;
            return self.store_data(&[IoSlice::new(bytes)], 0, to);
        }
        self.meta.storage().read_at(bytes, from.get())?;
        Ok(self.meta.storage().write_at(bytes, to.get())?)
    }

    /// Copies compressed data, which is never encrypted. What shares a sector is copied as one.
    fn copy_extents(&self, moves: &Moves) -> Result<u64, ImageError> {
        let mut copied = 0;
        let all: Vec<&(Extent, u64)> = moves.extents.values().collect();
        let together = |a: &&(Extent, u64), b: &&(Extent, u64)| {
            b.0.offset <= a.0.offset + a.0.len && b.1 >= a.1 && b.0.offset - a.0.offset == b.1 - a.1
        };
        let mut bytes = Pages::default();
        for run in all.chunk_by(together) {
            let Some((first, to)) = run.first() else {
                continue;
            };
            let ends = run.iter().map(|(extent, _)| extent.offset + extent.len);
            let end = ends.max().unwrap_or(first.offset);
            let mut at = first.offset;
            while at < end {
                let len = (end - at).min(PIECE);
                bytes.resize(index(len));
                self.meta.storage().read_at(&mut bytes, at)?;
                let place = HostOffset::new(to + (at - first.offset));
                self.meta.check_data(place, len)?;
                self.meta.storage().write_at(&bytes, place.get())?;
                at += len;
            }
            copied += end - first.offset;
            self.ends_in_sector.store(true, Ordering::Release);
        }
        Ok(copied)
    }

    /// Changes the entries of all tables, those that were moved at their new places.
    fn redirect_tables(&self, tables: &mut [Table], moves: &Moves) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        for table in tables.iter_mut() {
            if let Some(new) = moves.cluster(HostOffset::new(table.offset), bits) {
                table.offset = new.get();
            }
        }
        tables.sort_unstable_by_key(|table| table.offset);
        if self.rules.external_data {
            return Ok(());
        }
        self.for_each_piece(tables, |piece| {
            let changed = piece.change(|_, _, entry| self.redirected(entry, moves))?;
            Ok::<_, ImageError>(ControlFlow::Continue(changed))
        })
    }

    fn redirected(&self, entry: L2Entry, moves: &Moves) -> Result<Option<L2Entry>, ImageError> {
        let bits = self.geometry.cluster_bits();
        match entry.kind(self.rules) {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => {
                let Some(new) = moves.cluster(offset, bits) else {
                    return Ok(None);
                };
                let word = entry.word() ^ offset.get() ^ new.get();
                Ok(Some(L2Entry::from_bits(word, entry.bitmap())))
            }
            ClusterKind::Compressed(extent) => match moves.extents.get(&extent.offset.get()) {
                Some((moved, new)) => self.entry_for(*new, moved.len).map(Some),
                None => Ok(None),
            },
            ClusterKind::Unallocated | ClusterKind::ZeroPlain => Ok(None),
        }
    }

    /// Changes the entries of all L1 tables in the file.
    fn redirect_l1(&self, moves: &Moves) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let active = self.meta.header().l1_table_offset;
        self.for_each_l1(|place, entries| {
            let mut run: Option<(u64, Vec<u8>)> = None;
            let kind = if place == active {
                Kinds::ACTIVE_L1
            } else {
                Kinds::INACTIVE_L1
            };
            let write = |run: &mut Option<(u64, Vec<u8>)>| match run.take() {
                Some((at, bytes)) => self.meta.write(kind, HostOffset::new(at), &bytes),
                None => Ok(()),
            };
            for (number, entry) in (0..).zip(&entries) {
                let Some(new) = moves.cluster(entry.l2_table(), bits) else {
                    write(&mut run)?;
                    continue;
                };
                let word = entry.bits() ^ entry.l2_table().get() ^ new.get();
                let (_, bytes) = run.get_or_insert((place.get() + number * 8, Vec::new()));
                bytes.extend_from_slice(&word.to_be_bytes());
            }
            Ok(write(&mut run)?)
        })
    }
}
