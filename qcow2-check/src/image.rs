//! An image as the checker knows it once the header and the small tables are read.

use qcow2_format::header::Header;
use qcow2_format::{EntryRules, Geometry};

use crate::reader::Reader;
use crate::refmap::{RefMap, Sharing};
use crate::{Code, Place, Structure};

/// Most clusters that one range of metadata may fill: no structure of the format comes near, so more is a claim.
const RANGE_CLUSTERS_MAX: u64 = 1 << 20;

/// An L1 table and all that hangs on it. Snapshots that share one L1 table are one tree of that weight.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    /// First byte of the L1 table; aligned.
    pub(crate) offset: u64,
    /// Entries that lie in the file; those behind its end read as empty.
    pub(crate) entries: u64,
    /// Whether it is the active tree.
    pub(crate) active: bool,
    /// How many owners the tree has.
    pub(crate) weight: u64,
    /// The first snapshot it belongs to.
    pub(crate) snapshot: Option<u64>,
}

/// A range of metadata that a field names: everything but L2 tables, refcount blocks and bitmap data.
#[derive(Clone, Debug)]
pub(crate) struct MetaRange {
    pub(crate) structure: Structure,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Whose it is, where a structure exists several times: a snapshot's or bitmap's index.
    pub(crate) index: Option<u64>,
    /// How many owners name this very range.
    pub(crate) weight: u64,
}

impl MetaRange {
    pub(crate) fn place(&self) -> Place {
        let mut place = Place::of(self.structure).at(self.offset, self.len);
        match self.structure {
            Structure::SnapshotL1 => place.snapshot = self.index,
            _ => place.index = self.index,
        }
        place
    }
}

/// Whether a reference was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    Yes,
    /// It ends a cluster or more behind the end of the file.
    PastEnd,
    /// It is absurdly long.
    TooLong,
}

/// What every phase of the check needs to know of the image.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    pub(crate) reader: Reader<'a>,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) rules: EntryRules,
    pub(crate) trees: Vec<Tree>,
    pub(crate) metadata: Vec<MetaRange>,
    /// Whether the snapshot table is [read as it is written](crate::snapshots::read_as_written).
    pub(crate) as_written: bool,
}

impl Image<'_> {
    pub(crate) fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    pub(crate) fn cluster_bits(&self) -> u32 {
        self.geometry.cluster_bits()
    }

    /// Length of the file in bytes, rounded up to sectors as QEMU does.
    pub(crate) fn file_len(&self) -> u64 {
        self.reader
            .len()
            .checked_next_multiple_of(512)
            .unwrap_or(u64::MAX)
    }

    /// Clusters of the file, the last one perhaps in part.
    pub(crate) fn file_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_len())
    }

    /// Whether a range of `len` bytes may be counted: it ends less than a cluster behind the end of the file. The last
    /// cluster of a file may be there in part.
    pub(crate) fn is_inside(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end < self.file_len().saturating_add(self.cluster_size()))
    }

    /// Counts `weight` references to every cluster that a range touches.
    pub(crate) fn count(
        &self,
        map: &mut RefMap,
        offset: u64,
        len: u64,
        weight: u64,
        sharing: Sharing,
    ) -> Counted {
        if len == 0 {
            return Counted::Yes;
        }
        if !self.is_inside(offset, len) {
            return Counted::PastEnd;
        }
        let first = offset >> self.cluster_bits();
        let last = (offset + (len - 1)) >> self.cluster_bits();
        if last - first >= RANGE_CLUSTERS_MAX {
            return Counted::TooLong;
        }
        if first == last || sharing == Sharing::Packed {
            for cluster in first..=last {
                map.add(cluster, weight, sharing);
            }
        } else {
            map.add_run(first, last - first + 1, weight);
        }
        Counted::Yes
    }

    /// First guest byte that entry `l2_index` of the table in L1 entry `l1_index` maps.
    pub(crate) fn guest_offset(&self, l1_index: u64, l2_index: u64) -> u64 {
        l1_index
            .saturating_mul(self.geometry.l2_coverage())
            .saturating_add(l2_index << self.cluster_bits())
    }

    /// Where an entry of the active L1 table lies.
    pub(crate) fn active_entry(&self, l1_index: u64) -> u64 {
        let table = self.header.l1_table_offset.get();
        table.saturating_add(l1_index.saturating_mul(8))
    }

    /// The place of an L2 table.
    pub(crate) fn table_place(&self, table: &crate::walk::TableRef) -> Place {
        Place::of(Structure::L2Table)
            .at(table.offset, self.cluster_size())
            .guest(
                self.guest_offset(table.l1_index, 0),
                self.geometry.l2_coverage(),
            )
            .snapshot(if table.active { None } else { table.snapshot })
    }

    /// Whether guest data is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.header.crypt_method != qcow2_format::header::CryptMethod::None
    }

    /// The place of an L2 entry.
    pub(crate) fn l2_place(&self, table: &crate::walk::TableRef, l2_index: u64) -> Place {
        Place::of(Structure::L2Table)
            .at(table.offset, 0)
            .entry(l2_index)
            .guest(
                self.guest_offset(table.l1_index, l2_index),
                self.cluster_size(),
            )
            .snapshot(if table.active { None } else { table.snapshot })
    }
}

/// The code for a range that was not counted.
pub(crate) fn uncounted(counted: Counted) -> Option<Code> {
    match counted {
        Counted::Yes => None,
        Counted::PastEnd => Some(Code::ReferencePastEnd),
        Counted::TooLong => Some(Code::CheckLimited),
    }
}
