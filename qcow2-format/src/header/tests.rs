use std::vec;
use std::vec::Vec;

use super::*;
use crate::raw;

fn header() -> Header {
    Header {
        version: Version::V3,
        geometry: Geometry::new(16, 4, false).unwrap(),
        virtual_size_raw: 1 << 30,
        crypt_method: CryptMethod::None,
        l1_table_offset: HostOffset::new(0x30000),
        l1_entries: 2,
        refcount_table_offset: HostOffset::new(0x10000),
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
        extensions: vec![Extension::FeatureNames(FeatureName::known())],
    }
}

#[test]
fn a_header_is_read_as_it_was_written() {
    let mut header = header();
    header.backing_name = Some(b"base".to_vec());
    header
        .extensions
        .insert(0, Extension::BackingFormat(b"raw".to_vec()));
    header.extensions.push(Extension::Unknown {
        kind: 0x1234,
        data: vec![1, 2, 3],
    });
    let bytes = header.encode().unwrap();
    assert_eq!(bytes.len(), 65536);
    assert_eq!(Header::probe(&bytes[..24]).unwrap(), 65536);
    assert_eq!(Header::decode(&bytes).unwrap(), header);
    assert_eq!(
        Header::decode_for_check(&bytes).unwrap(),
        (header.clone(), Vec::new())
    );
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
}
