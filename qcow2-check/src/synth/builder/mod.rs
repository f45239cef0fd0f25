//! Small images, structure by structure. What is added is placed at once; `finish` writes what depends on all of it.

mod finish;

use std::ops::Range;

use qcow2_format::bitmap::{BitmapCluster, BitmapFlags, DIRTY_TRACKING, required_table_entries};
use qcow2_format::header::{CryptMethod, CryptoExtension, Extension, Version};
use qcow2_format::{
    BitmapEntry, BitmapTableEntry, Geometry, GuestCluster, Header, HostCluster, HostOffset,
    L2Entry, Snapshot,
};

use super::{SynthError, count32, header, luks, table_bytes};

/// When all snapshots were taken: seconds since 1970.
const SNAPSHOT_DATE: u32 = 1_767_225_600;
/// Bitmap of an extended entry: all subclusters allocated.
const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// Bitmap of an extended entry: all subclusters read as zero.
const ALL_ZERO: u64 = ALL_ALLOCATED << 32;

/// How a guest cluster comes to read as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// Without a host cluster.
    Plain,
    /// With a host cluster that is kept for later.
    Allocated,
}

/// A small image in the making, held in memory.
///
/// Clusters are handed out in order and never reused: mapping a guest cluster again leaves its old host cluster to the
/// snapshots that have it, or free. An L2 table that a snapshot shares is copied before it changes. Refcounts and COPIED flags follow
/// from the trees at the end.
#[derive(Debug)]
pub struct Builder {
    /// What the header will say. Fields that point at structures of the image are set by [`finish`](Self::finish);
    /// all others, and the extensions, are for the caller to change.
    pub header: Header,
    /// Content of clusters, by their offset.
    pieces: Vec<(HostOffset, Vec<u8>)>,
    /// References of each cluster handed out, those of the trees left out.
    references: Vec<u64>,
    tables: Vec<Table>,
    /// The active tree: for each L1 entry a place in `tables`.
    active: Vec<Option<usize>>,
    snapshots: Vec<(Snapshot, Vec<Option<usize>>)>,
    bitmaps: Vec<BitmapEntry>,
    /// Where the next compressed cluster may start: the first byte behind the last one.
    compressed_end: u64,
}

#[derive(Clone, Debug)]
struct Table {
    offset: HostOffset,
    entries: Vec<L2Entry>,
    /// A snapshot has it, too.
    shared: bool,
}

impl Builder {
    /// An image whose disk of `virtual_size` bytes has no cluster yet.
    pub fn new(version: Version, geometry: Geometry, virtual_size: u64) -> Self {
        Self {
            header: header(version, geometry, virtual_size),
            pieces: Vec::new(),
            references: vec![1],
            tables: Vec::new(),
            active: Vec::new(),
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            compressed_end: 0,
        }
    }

    fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// Writes a guest cluster: `content`, and zeros as far as that is shorter. With extended entries all subclusters are
    /// allocated. Tells where it lies.
    ///
    /// # Errors
    ///
    /// More content than a cluster holds, or a guest cluster that no L1 table reaches.
    pub fn data(&mut self, guest: GuestCluster, content: &[u8]) -> Result<HostOffset, SynthError> {
        let bitmap = if self.geometry().extended_l2() {
            ALL_ALLOCATED
        } else {
            0
        };
        self.subclusters(guest, bitmap, content)
    }

    /// As [`data`](Self::data), with this subcluster bitmap: allocated in bits 0 to 31, reads as zero in bits 32 to 63. Without
    /// extended entries it must be 0.
    ///
    /// # Errors
    ///
    /// As `data`.
    pub fn subclusters(
        &mut self,
        guest: GuestCluster,
        bitmap: u64,
        content: &[u8],
    ) -> Result<HostOffset, SynthError> {
        if content.len() > self.geometry().cluster_len() {
            return Err(SynthError::TooLarge {
                what: "the content of a cluster",
            });
        }
        let offset = self.take(1);
        self.pieces.push((offset, content.to_vec()));
        self.map(guest, L2Entry::normal(offset, false, bitmap))?;
        Ok(offset)
    }

    /// Makes a guest cluster read as zero.
    ///
    /// # Errors
    ///
    /// Version 2, which can't, or a guest cluster that no L1 table reaches.
    pub fn zero(&mut self, guest: GuestCluster, zero: Zero) -> Result<(), SynthError> {
        if self.header.version == Version::V2 {
            return Err(SynthError::NotInVersion2 {
                what: "zero clusters",
            });
        }
        let offset = match zero {
            Zero::Plain => HostOffset::new(0),
            Zero::Allocated => self.take(1),
        };
        let entry = if self.geometry().extended_l2() {
            L2Entry::normal(offset, false, ALL_ZERO)
        } else {
            L2Entry::zero(offset, false)
        };
        self.map(guest, entry)
    }

    /// Stores compressed data for a guest cluster, right behind the compressed data before it where that is possible.
    ///
    /// `payload` is what the header's compression type says; [`deflate`](super::deflate) can make some.
    ///
    /// # Errors
    ///
    /// A payload that is empty or that no descriptor can hold, or a guest cluster that no L1 table reaches.
    pub fn compressed(
        &mut self,
        guest: GuestCluster,
        payload: &[u8],
    ) -> Result<HostOffset, SynthError> {
        let cluster_size = self.geometry().cluster_size();
        let len = payload.len() as u64;
        let file_end = self.end().get();
        let room = self.compressed_end.next_multiple_of(cluster_size) - self.compressed_end;
        // What doesn't fit goes on in the next cluster only if that is still to be had.
        let at = if self.compressed_end + room == file_end || len <= room {
            self.compressed_end
        } else {
            file_end
        };
        let missing = (at + len).saturating_sub(file_end);
        self.take(self.geometry().clusters_for(missing));
        self.compressed_end = at + len;
        let offset = HostOffset::new(at);
        let entry =
            L2Entry::compressed(self.geometry(), offset, len).ok_or(SynthError::TooLarge {
                what: "compressed data",
            })?;
        self.pieces.push((offset, payload.to_vec()));
        self.map(guest, entry)?;
        Ok(offset)
    }

    /// Takes an internal snapshot of the disk as it is, with this VM state (which may be empty).
    ///
    /// # Errors
    ///
    /// A VM state or L1 table beyond the format's limits.
    pub fn snapshot(&mut self, name: &str, vm_state: &[u8]) -> Result<(), SynthError> {
        let geometry = self.geometry();
        let disk_entries = geometry.l1_entries_for(self.header.virtual_size());
        let first = disk_entries << geometry.l2_bits();
        for (index, content) in (first..).zip(vm_state.chunks(geometry.cluster_len())) {
            self.data(GuestCluster::new(index), content)?;
        }
        self.reach(disk_entries)?;
        let tree = self.active.clone();
        for table in tree.iter().flatten() {
            if let Some(table) = self.tables.get_mut(*table) {
                table.shared = true;
            }
        }
        // The VM state belongs to the snapshot alone.
        for entry in self.active.iter_mut().skip(index(disk_entries)?) {
            *entry = None;
        }
        let clusters = geometry.clusters_for(tree.len() as u64 * 8);
        let number = self.snapshots.len() + 1;
        let snapshot = Snapshot {
            l1_table_offset: self.take_counted(clusters),
            l1_entries: count32(tree.len() as u64, "an L1 table")?,
            id: number.to_string().into_bytes(),
            name: name.as_bytes().to_vec(),
            date_sec: SNAPSHOT_DATE,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size_32: count32(vm_state.len() as u64, "the VM state")?,
            // VM state, disk size, instruction count.
            extra_data: table_bytes([vm_state.len() as u64, self.header.virtual_size(), 0]),
        };
        self.snapshots.push((snapshot, tree));
        Ok(())
    }

    /// Adds a bitmap in which the granules of these ranges are set. A range counts granules, each of
    /// `1 << granularity_bits` guest bytes; what lies behind the disk's end is left out.
    ///
    /// # Errors
    ///
    /// A bitmap beyond the format's limits.
    pub fn bitmap(
        &mut self,
        name: &str,
        granularity_bits: u8,
        flags: BitmapFlags,
        set: &[Range<u64>],
    ) -> Result<(), SynthError> {
        let geometry = self.geometry();
        let size = self.header.virtual_size();
        let granules = size.div_ceil(1 << granularity_bits);
        let mut bits = vec![0_u8; index(granules.div_ceil(8))?];
        for granule in set
            .iter()
            .flat_map(|range| range.start..range.end.min(granules))
        {
            if let Some(byte) = bits.get_mut(index(granule / 8)?) {
                *byte |= 1 << (granule % 8);
            }
        }
        let table: Vec<_> = bits
            .chunks(geometry.cluster_len())
            .map(|part| {
                let cluster = if part.iter().all(|byte| *byte == 0) {
                    BitmapCluster::AllZeros
                } else if part.len() == geometry.cluster_len() && part.iter().all(|b| *b == 0xff) {
                    BitmapCluster::AllOnes
                } else {
                    BitmapCluster::Cluster(self.place(part))
                };
                BitmapTableEntry::new(cluster).bits()
            })
            .collect();
        let entries = required_table_entries(geometry, size, granularity_bits.into());
        debug_assert_eq!(table.len() as u64, entries, "a cluster of bits each");
        let entry = BitmapEntry {
            table_offset: self.place(&table_bytes(table)),
            table_entries: count32(entries, "a bitmap table")?,
            flags,
            kind: DIRTY_TRACKING,
            granularity_bits,
            name: name.as_bytes().to_vec(),
            extra_data: Vec::new(),
        };
        self.bitmaps.push(entry);
        Ok(())
    }

    /// Adds a LUKS area and says that guest data is encrypted. One key slot is in use; its passphrase is
    /// [`DEMO_LUKS_PASSPHRASE`](super::DEMO_LUKS_PASSPHRASE). Data is stored as it is given.
    pub fn luks(&mut self) {
        let (bytes, len_bytes) = luks::area();
        let offset = self.take_counted(self.geometry().clusters_for(len_bytes));
        self.pieces.push((offset, bytes));
        self.header.crypt_method = CryptMethod::Luks;
        let extension = CryptoExtension { offset, len_bytes };
        self.header.extensions.push(Extension::Crypto(extension));
    }

    /// Makes an entry of the active tree, with an L2 table of its own where there is none.
    fn map(&mut self, guest: GuestCluster, entry: L2Entry) -> Result<(), SynthError> {
        let bits = self.geometry().l2_bits();
        let l1_index = guest.get() >> bits;
        self.reach(l1_index + 1)?;
        let slot = index(l1_index)?;
        let old = self.active.get(slot).copied().flatten();
        let old = old.and_then(|number| Some((number, self.tables.get(number)?.clone())));
        let number = match old {
            Some((number, table)) if !table.shared => number,
            other => {
                let entries = match other {
                    Some((_, table)) => table.entries,
                    None => vec![L2Entry::default(); index(self.geometry().l2_entries())?],
                };
                let offset = self.take(1);
                self.tables.push(Table {
                    offset,
                    entries,
                    shared: false,
                });
                self.tables.len() - 1
            }
        };
        if let Some(at) = self.active.get_mut(slot) {
            *at = Some(number);
        }
        let l2_index = index(guest.get() & (self.geometry().l2_entries() - 1))?;
        let table = self.tables.get_mut(number);
        if let Some(at) = table.and_then(|table| table.entries.get_mut(l2_index)) {
            *at = entry;
        }
        Ok(())
    }

    /// Lengthens the active L1 table to at least `entries`.
    fn reach(&mut self, entries: u64) -> Result<(), SynthError> {
        if entries > qcow2_format::geometry::MAX_L1_BYTES / 8 {
            return Err(SynthError::TooLarge {
                what: "the L1 table",
            });
        }
        let entries = index(entries)?;
        if self.active.len() < entries {
            self.active.resize(entries, None);
        }
        Ok(())
    }

    /// The first byte behind all clusters handed out.
    fn end(&self) -> HostOffset {
        let clusters = HostCluster::new(self.references.len() as u64);
        let offset = self.geometry().host_offset(clusters);
        offset.expect("as many clusters as memory holds numbers")
    }

    /// Hands out clusters that the trees will count.
    fn take(&mut self, clusters: u64) -> HostOffset {
        let offset = self.end();
        self.references.extend((0..clusters).map(|_| 0));
        offset
    }

    /// Hands out clusters with one reference each.
    fn take_counted(&mut self, clusters: u64) -> HostOffset {
        let offset = self.end();
        self.references.extend((0..clusters).map(|_| 1));
        offset
    }

    /// Stores metadata in clusters of its own. What refers to it, such as a header extension, is for the caller to write.
    pub fn place(&mut self, content: &[u8]) -> HostOffset {
        let clusters = self.geometry().clusters_for(content.len() as u64);
        let offset = self.take_counted(clusters);
        self.pieces.push((offset, content.to_vec()));
        offset
    }
}

/// A number that indexes memory.
fn index(n: u64) -> Result<usize, SynthError> {
    usize::try_from(n).map_err(|_| SynthError::TooLarge { what: "a table" })
}
