//! A small image in the making: structures are added one by one, refcounts and header follow at the end.

use std::collections::BTreeMap;

use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, Header,
    IncompatibleFeatures, Version,
};
use qcow2_format::{Geometry, HostOffset, L1Entry, L2Entry, set_refcount};

/// Header, refcount table (one cluster) and whatever was added, each in clusters of its own.
#[derive(Debug)]
pub(super) struct Draft {
    /// Fields that point at added structures are for the caller to set.
    pub(super) header: Header,
    bytes: Vec<u8>,
    /// Host cluster to refcount, where that is not 1.
    refcounts: BTreeMap<u64, u64>,
}

impl Draft {
    /// An image without any L1 table.
    pub(super) fn new(version: Version, geometry: Geometry, virtual_size: u64) -> Self {
        let mut incompatible = IncompatibleFeatures::default();
        incompatible.set_extended_l2(geometry.extended_l2());
        let header = Header {
            version,
            geometry,
            virtual_size_raw: virtual_size,
            crypt_method: CryptMethod::None,
            l1_table_offset: HostOffset::new(0),
            l1_entries: 0,
            refcount_table_offset: HostOffset::new(geometry.cluster_size()),
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshot_table_offset: HostOffset::new(0),
            incompatible,
            compatible: CompatibleFeatures::default(),
            autoclear: AutoclearFeatures::default(),
            header_length: if version == Version::V2 { 72 } else { 112 },
            compression_type: CompressionType::Zlib,
            padding: [0; 7],
            unknown_fields: Vec::new(),
            backing_name: None,
            extensions: Vec::new(),
        };
        let bytes = vec![0; 2 * geometry.cluster_len()];
        Self {
            header,
            bytes,
            refcounts: BTreeMap::new(),
        }
    }

    /// A draft with the usual 16-bit refcounts and clusters of 512 bytes, for a disk that one L2 table maps.
    pub(super) fn small(version: Version) -> Self {
        let geometry = Geometry::new(9, 4, false).expect("within the format's limits");
        Self::new(version, geometry, geometry.l2_coverage())
    }

    /// Adds whole clusters that begin with these bytes; where.
    pub(super) fn add(&mut self, content: &[u8]) -> HostOffset {
        let offset = HostOffset::new(self.bytes.len() as u64);
        self.bytes.extend_from_slice(content);
        let whole = self
            .bytes
            .len()
            .next_multiple_of(self.header.geometry.cluster_len());
        self.bytes.resize(whole, 0);
        offset
    }

    /// Adds one cluster of guest data.
    pub(super) fn add_data(&mut self) -> HostOffset {
        self.add(&[0xda])
    }

    /// Adds an L2 table.
    pub(super) fn add_l2(&mut self, entries: &[L2Entry]) -> HostOffset {
        let mut table = Vec::new();
        for entry in entries {
            table.extend(entry.word().to_be_bytes());
            if self.header.geometry.extended_l2() {
                table.extend(entry.bitmap().to_be_bytes());
            }
        }
        table.resize(self.header.geometry.cluster_len(), 0);
        self.add(&table)
    }

    /// Adds an L1 table.
    pub(super) fn add_l1(&mut self, entries: &[L1Entry]) -> HostOffset {
        let table: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.add(&table)
    }

    /// Adds an active L1 table with one L2 table below it.
    pub(super) fn map(&mut self, entries: &[L2Entry]) {
        let l2_table = self.add_l2(entries);
        self.header.l1_table_offset = self.add_l1(&[L1Entry::new(l2_table, true)]);
        self.header.l1_entries = 1;
    }

    /// Sets the refcount of the cluster at `offset` to something other than 1.
    pub(super) fn set_refcount(&mut self, offset: HostOffset, refcount: u64) {
        let cluster = self.header.geometry.host_cluster(offset);
        self.refcounts.insert(cluster.get(), refcount);
    }

    /// The image.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let geometry = self.header.geometry;
        let mut blocks = Vec::new();
        // Blocks have refcounts, too, so each may call for one more.
        while blocks.len() as u64 * geometry.refcounts_per_block() < self.clusters() {
            blocks.push(self.add(&[0]));
        }
        let mut table = Vec::new();
        let mut first = 0;
        for block in &blocks {
            table.extend(block.get().to_be_bytes());
            let end = self.clusters().min(first + geometry.refcounts_per_block());
            let mut content = vec![0; geometry.cluster_len()];
            for (index, cluster) in (first..end).enumerate() {
                let refcount = self.refcounts.get(&cluster).copied().unwrap_or(1);
                set_refcount(&mut content, geometry, index, refcount)
                    .expect("the width holds the refcount");
            }
            self.put(*block, &content);
            first = end;
        }
        self.put(self.header.refcount_table_offset, &table);
        let header = self.header.encode().expect("the header fits its cluster");
        self.put(HostOffset::new(0), &header);
        self.bytes
    }

    fn clusters(&self) -> u64 {
        self.header.geometry.clusters_for(self.bytes.len() as u64)
    }

    /// Overwrites what lies at `offset`.
    fn put(&mut self, offset: HostOffset, content: &[u8]) {
        let start = usize::try_from(offset.get()).expect("the image is in memory");
        let target = self.bytes.iter_mut().skip(start);
        target.zip(content).for_each(|(to, from)| *to = *from);
    }
}
