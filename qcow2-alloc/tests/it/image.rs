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

/// Metadata of an image in `storage`, with refcount slices of 512 bytes, `slices` of them.
pub(crate) fn metadata(storage: Arc<dyn Storage>, header: Header, slices: usize) -> Arc<Metadata> {
    let (geometry, table) = (header.geometry, header.refcount_table_offset);
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
    let meta = Metadata::new(storage, None, header, &options);
    let size = geometry.cluster_size();
    let note = |cluster: u64, kinds| {
        let offset = HostOffset::new(cluster * size);
        meta.overlap().add(offset, size, kinds).unwrap();
    };
    note(0, Kinds::MAIN_HEADER);
    note(3, Kinds::ACTIVE_L1);
    assert_eq!(table.get(), size);
    note(1, Kinds::REFCOUNT_TABLE);
    note(2, Kinds::REFCOUNT_BLOCK);
    Arc::new(meta)
}

/// Opens the allocator of a new image in `storage`.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    header: Header,
    slices: usize,
) -> (Arc<Metadata>, Allocator) {
    let meta = metadata(storage, header, slices);
    let alloc = Allocator::open(meta.clone(), PassDiscard::default()).unwrap();
    (meta, alloc)
}

/// Brings everything to the disk and frees what was released.
pub(crate) fn settle(meta: &Metadata, alloc: &Allocator) {
    meta.commit(alloc).unwrap();
    alloc.reclaim(alloc.take_ripe()).unwrap();
}
