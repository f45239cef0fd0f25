use std::sync::Arc;

use qcow2_alloc::{Allocator, PassDiscard};
use qcow2_cache::{Kinds, Metadata, MetadataOptions, OverlapChecks, Rules};
use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, IncompatibleFeatures,
    Version,
};
use qcow2_format::{Geometry, Header, HostOffset, raw, set_refcount};
use qcow2_io::{Memory, Storage};

/// Clusters of a new image: header, refcount table, refcount block, L1 table.
pub(crate) const FIRST_CLUSTERS: u64 = 4;

/// The header of an image with those clusters.
fn header(geometry: Geometry) -> Header {
    let at = |cluster: u64| HostOffset::new(cluster << geometry.cluster_bits());
    Header {
        version: Version::V3,
        geometry,
        virtual_size_raw: 512,
        crypt_method: CryptMethod::None,
        l1_table_offset: at(3),
        l1_entries: 1,
        refcount_table_offset: at(1),
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshot_table_offset: HostOffset::new(0),
        incompatible: IncompatibleFeatures::default(),
        compatible: CompatibleFeatures::default(),
        autoclear: AutoclearFeatures::default(),
        header_length: raw::Header::LEN,
        compression_type: CompressionType::Zlib,
        padding: [0; 7],
        unknown_fields: Vec::new(),
        backing_name: None,
        extensions: Vec::new(),
    }
}

/// An image without any data.
pub(crate) fn empty_image(geometry: Geometry) -> (Memory, Header) {
    let header = header(geometry);
    let storage = Memory::new();
    storage.write_at(&header.encode().unwrap(), 0).unwrap();
    let size = geometry.cluster_size();
    storage.write_at(&(2 * size).to_be_bytes(), size).unwrap();
    let mut block = vec![0; size as usize];
    for index in 0..FIRST_CLUSTERS as usize {
        set_refcount(&mut block, geometry, index, 1).unwrap();
    }
    storage.write_at(&block, 2 * size).unwrap();
    storage.set_len(FIRST_CLUSTERS * size).unwrap();
    (storage, header)
}

/// Opens the allocator of an image in `storage`, with refcount slices of 512 bytes, `slices` of them.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    header: Header,
    slices: usize,
) -> (Arc<Metadata>, Allocator) {
    let (geometry, l1) = (header.geometry, header.l1_table_offset);
    let options = MetadataOptions {
        read_only: false,
        lazy_refcounts: false,
        overlap_checks: OverlapChecks::default(),
        l2_slice_bytes: 512,
        l2_slices: 2,
        refcount_slice_bytes: 512,
        refcount_slices: slices,
        rules: Rules::ALL,
    };
    let meta = Arc::new(Metadata::new(storage, None, header, &options));
    let alloc = Allocator::open(meta.clone(), PassDiscard::default()).unwrap();
    let note = |offset, len, kinds| meta.overlap().add(offset, len, kinds).unwrap();
    let size = geometry.cluster_size();
    note(HostOffset::new(0), size, Kinds::MAIN_HEADER);
    note(l1, 8, Kinds::ACTIVE_L1);
    let (table, len, blocks) = alloc.tables();
    note(table, len, Kinds::REFCOUNT_TABLE);
    for block in blocks {
        note(block, size, Kinds::REFCOUNT_BLOCK);
    }
    (meta, alloc)
}

/// Brings everything to the disk and frees what was released.
pub(crate) fn settle(meta: &Metadata, alloc: &Allocator) {
    meta.commit(alloc).unwrap();
    alloc.reclaim(alloc.take_ripe()).unwrap();
}
