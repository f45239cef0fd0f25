//! Compressed data, which lies at any byte and may end in the cluster behind.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use qcow2_format::{ClusterKind, HostOffset, L2Entry};

use crate::trees::Table;
use crate::{Image, ImageError};

/// Sectors are what extents end with.
const SECTOR: u64 = 512;

/// Compressed data somewhere, and how many references lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First byte.
    pub(super) offset: u64,
    /// Bytes, to the end of the last sector.
    pub(super) len: u64,
    /// How many trees lead to it.
    pub(super) weight: u64,
}

impl Extent {
    pub(super) fn clusters(&self, bits: u32) -> std::ops::Range<u64> {
        self.offset >> bits..((self.offset + self.len - 1) >> bits) + 1
    }
}

/// Packs compressed data into runs of clusters, as closely as what is known of it allows.
pub(super) struct Pack {
    bits: u32,
    /// References that a cluster may get.
    most: u64,
    run: std::ops::Range<u64>,
    /// The next byte that is free.
    next: u64,
    /// The extent placed last, and where it went.
    last: Option<(Extent, u64)>,
    /// References of the clusters at hand.
    weights: BTreeMap<u64, u64>,
}

impl Pack {
    /// Packs into nothing yet.
    pub(super) fn new(bits: u32, most: u64) -> Self {
        Self {
            bits,
            most,
            run: 0..0,
            next: 0,
            last: None,
            weights: BTreeMap::new(),
        }
    }

    /// Goes on in another run of clusters, nothing of which is in use.
    pub(super) fn enter(&mut self, run: std::ops::Range<u64>) {
        self.next = run.start << self.bits;
        self.run = run;
        self.last = None;
        self.weights.clear();
    }

    /// The run goes on with one more cluster.
    pub(super) fn extend(&mut self) {
        self.run.end += 1;
    }

    pub(super) fn run(&self) -> std::ops::Range<u64> {
        self.run.clone()
    }

    /// The place of one more extent; `None` if it doesn't fit into what is left of the run.
    pub(super) fn place(&mut self, extent: Extent) -> Option<u64> {
        let end = self.run.end << self.bits;
        let fits = |at: u64| at + extent.len <= end;
        if let Some((last, place)) = self.last
            && (last.offset..=last.offset + last.len).contains(&extent.offset)
            && (place ^ last.offset).is_multiple_of(SECTOR)
        {
            // They may share a sector, which only stays so if both go together.
            let at = place + (extent.offset - last.offset);
            if fits(at) && self.note(extent, at) {
                return Some(at);
            }
        }
        let mut start = self.next.next_multiple_of(SECTOR);
        while start < end {
            for at in [start + extent.offset % SECTOR, start] {
                if fits(at) && self.note(extent, at) {
                    return Some(at);
                }
            }
            // Perhaps the cluster has as many references as it can count.
            start = ((start >> self.bits) + 1) << self.bits;
        }
        None
    }

    fn note(&mut self, extent: Extent, at: u64) -> bool {
        let placed = Extent {
            offset: at,
            ..extent
        };
        let weight = |pack: &Self, cluster| pack.weights.get(&cluster).copied().unwrap_or(0);
        let clusters = placed.clusters(self.bits);
        if clusters
            .clone()
            .any(|cluster| weight(self, cluster) + extent.weight > self.most)
        {
            return false;
        }
        for cluster in clusters.clone() {
            *self.weights.entry(cluster).or_insert(0) += extent.weight;
        }
        self.weights.retain(|cluster, _| *cluster >= clusters.start);
        self.next = self.next.max(at + extent.len);
        self.last = Some((extent, at));
        true
    }
}

impl Image {
    /// The compressed data that `wanted` asks for, in the order of the file.
    pub(super) fn gather_extents(
        &self,
        tables: &[Table],
        wanted: impl Fn(&Extent) -> bool,
    ) -> Result<Vec<Extent>, ImageError> {
        let mut found: BTreeMap<u64, Extent> = BTreeMap::new();
        if self.rules.external_data {
            return Ok(Vec::new());
        }
        self.for_each_piece(tables, |piece| {
            piece.change(|table, _, entry| {
                if let Some(extent) = self.extent_of(entry, table.times)
                    && wanted(&extent)
                {
                    let new = Extent {
                        weight: 0,
                        ..extent
                    };
                    let known = found.entry(extent.offset).or_insert(new);
                    known.weight += table.times;
                    known.len = known.len.max(extent.len);
                }
                Ok::<_, ImageError>(None)
            })?;
            Ok::<_, ImageError>(ControlFlow::Continue(false))
        })?;
        Ok(found.into_values().collect())
    }

    /// The compressed data that an entry leads to.
    pub(super) fn extent_of(&self, entry: L2Entry, weight: u64) -> Option<Extent> {
        if !entry.is_compressed() {
            return None;
        }
        match entry.kind(self.rules) {
            ClusterKind::Compressed(extent) => Some(Extent {
                offset: extent.offset.get(),
                len: extent.len_bytes,
                weight,
            }),
            _ => None,
        }
    }

    /// An entry that leads to compressed data at another place.
    pub(super) fn entry_for(&self, at: u64, len: u64) -> Result<L2Entry, ImageError> {
        let offset = HostOffset::new(at);
        L2Entry::compressed(self.geometry, offset, len).ok_or_else(|| ImageError::Refused {
            what: "compressed data",
            offset,
            detail: format!("no entry can say that {len} bytes are there"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent {
            offset,
            len,
            weight: 1,
        }
    }

    #[test]
    fn what_shares_a_sector_stays_together() {
        let mut pack = Pack::new(12, 100);
        assert_eq!(pack.place(extent(100, 412)), None);
        pack.enter(8..10);
        // The first ends at byte 1024, the next begins in its last sector.
        assert_eq!(pack.place(extent(100, 924)), Some((8 << 12) + 100));
        assert_eq!(pack.place(extent(700, 836)), Some((8 << 12) + 700));
        // Another one begins with a sector.
        assert_eq!(
            pack.place(extent(9000, 216)),
            Some((8 << 12) + 1536 + 9000 % 512)
        );
        // It ends in the next cluster.
        assert_eq!(pack.place(extent(20_480, 4096)), Some((8 << 12) + 2048));
        assert_eq!(pack.place(extent(50_176, 4096)), None);
        assert_eq!(pack.place(extent(50_177, 1023)), Some((9 << 12) + 2048 + 1));
    }

    #[test]
    fn a_cluster_gets_no_more_references_than_it_can_count() {
        let mut pack = Pack::new(12, 1);
        pack.enter(8..11);
        assert_eq!(pack.place(extent(512, 512)), Some(8 << 12));
        assert_eq!(pack.place(extent(1024, 512)), Some(9 << 12));
        assert_eq!(pack.place(extent(7168, 512)), Some(10 << 12));
        assert_eq!(pack.place(extent(9216, 512)), None);
        let heavy = Extent {
            weight: 2,
            ..extent(0, 512)
        };
        pack.enter(20..24);
        assert_eq!(pack.place(heavy), None);
    }
}
