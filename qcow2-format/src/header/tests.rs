use std::string::ToString;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::{GeometryError, raw};

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

/// The header with `patches` (offset, bytes) applied after encoding.
fn patched(header: &Header, patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = header.encode().unwrap();
    for (at, patch) in patches {
        bytes[*at..][..patch.len()].copy_from_slice(patch);
    }
    bytes
}

/// An opener and a checker refuse the header.
fn fatal(patches: &[(usize, &[u8])], expected: &HeaderError) {
    let bytes = patched(&header(), patches);
    assert_eq!(Header::decode(&bytes).as_ref(), Err(expected));
    assert_eq!(Header::decode_for_check(&bytes).as_ref(), Err(expected));
    let (at, _) = patches[0];
    assert_eq!(expected.offset(), at as u64, "{expected}");
    assert!(!expected.field().is_empty());
}

/// An opener refuses the header, a checker lists just this.
fn defect(header: &Header, patches: &[(usize, &[u8])], expected: &HeaderError) {
    let bytes = patched(header, patches);
    assert_eq!(Header::decode(&bytes).as_ref(), Err(expected));
    let (_, defects) = Header::decode_for_check(&bytes).unwrap();
    assert_eq!(&defects[..], std::slice::from_ref(expected));
    assert!(expected.is_refused());
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
    header.header_length = 120;
    header.unknown_fields = b"kept all".to_vec();
    let bytes = header.encode().unwrap();
    assert_eq!(bytes.len(), 65536);
    assert_eq!(Header::probe(&bytes[..24]).unwrap(), 65536);
    assert_eq!(Header::decode(&bytes).unwrap(), header);
    assert_eq!(
        Header::decode_for_check(&bytes).unwrap(),
        (header.clone(), Vec::new())
    );
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
    assert_eq!(header.feature_names()[7].name(), b"raw external data");
}

#[test]
fn a_short_file_is_completed_with_zeros() {
    let bytes = header().encode().unwrap();
    let short = Header::decode(&bytes[..104]).unwrap();
    assert_eq!(short.extensions, []);
    assert_eq!(short.l1_entries, 2);
    assert_eq!(
        Header::decode(b"QFI"),
        Err(HeaderError::Magic { found: *b"QFI\0" })
    );
}

#[test]
fn an_old_header_has_the_values_that_newer_ones_spell_out() {
    let mut old = header();
    old.version = Version::V2;
    old.header_length = 72;
    old.extensions.clear();
    let bytes = patched(&old, &[(80, &[0xff; 32])]);
    assert_eq!(Header::decode(&bytes).unwrap(), old);
    assert!(old.entry_rules().version2);
    old.compatible.set_lazy_refcounts(true);
    let contradiction = HeaderError::Contradiction {
        field: "compatible_features",
        found: 1,
        expected: 0,
    };
    assert_eq!(old.encode(), Err(contradiction));
}

#[test]
fn a_size_is_floored_to_sectors_and_kept() {
    let bytes = patched(&header(), &[(24, &1000_u64.to_be_bytes())]);
    let header = Header::decode(&bytes).unwrap();
    assert_eq!(
        (header.virtual_size(), header.virtual_size_raw),
        (512, 1000)
    );
    assert_eq!(header.encode().unwrap(), bytes);
}

#[test]
fn what_no_table_can_be_found_without_is_fatal() {
    use HeaderError::*;

    fatal(&[(0, b"KDMV")], &Magic { found: *b"KDMV" });
    fatal(&[(4, &[0, 0, 0, 1])], &Version { found: 1 });
    fatal(&[(4, &[0, 0, 0, 4])], &Version { found: 4 });
    for found in [8, 22] {
        let error = Geometry(GeometryError::ClusterBits { found });
        fatal(&[(20, &found.to_be_bytes())], &error);
    }
    for found in [0, 103, 65537, u32::MAX] {
        let error = HeaderLength {
            found,
            min: 104,
            max: 65536,
        };
        fatal(&[(100, &found.to_be_bytes())], &error);
    }
    fatal(&[(104, &[2])], &CompressionType { found: 2 });
    fatal(
        &[(96, &[0, 0, 0, 7])],
        &Geometry(GeometryError::RefcountOrder { found: 7 }),
    );
    let error = Geometry(GeometryError::ExtendedClusterBits { found: 13 });
    fatal(&[(20, &[0, 0, 0, 13]), (79, &[0x10])], &error);
    fatal(
        &[(56, &[0, 0, 0, 129])],
        &TableTooLarge {
            table: HeaderTable::Refcount,
            found: 129,
            limit: 128,
        },
    );
    fatal(
        &[(36, &[0, 0x40, 0, 1])],
        &TableTooLarge {
            table: HeaderTable::L1,
            found: 0x40_0001,
            limit: 0x40_0000,
        },
    );
    for (at, table) in [(40, HeaderTable::L1), (48, HeaderTable::Refcount)] {
        let found = HostOffset::new(0x30200);
        let error = TableUnaligned {
            table,
            found,
            cluster_size: 65536,
        };
        fatal(&[(at, &found.get().to_be_bytes())], &error);
        let found = HostOffset::new(1 << 63);
        let len_bytes = if table == HeaderTable::L1 { 16 } else { 65536 };
        let error = TableEnd {
            table,
            found,
            len_bytes,
        };
        fatal(&[(at, &found.get().to_be_bytes())], &error);
    }
    fatal(
        &[(36, &[0, 0, 0, 1])],
        &L1TooSmall {
            found: 1,
            needed: 2,
        },
    );
    fatal(
        &[(24, &u64::MAX.to_be_bytes())],
        &VirtualSize {
            found: u64::MAX,
            needed: 1 << 35,
            limit: i32::MAX as u64,
        },
    );
}

#[test]
fn unknown_features_are_told_by_name() {
    let mut header = header();
    header.extensions = vec![Extension::FeatureNames(vec![
        FeatureName::new(0, 5, b"shiny"),
        FeatureName::new(1, 5, b"other kind"),
        FeatureName::new(0, 6, b"other bit"),
        FeatureName::new(0, 200, b"no bit"),
        FeatureName::new(0, 63, &[b'\n'; 50]),
    ])];
    let bytes = patched(&header, &[(72, &[0x80]), (79, &[0x20])]);
    let error = Header::decode(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        std::format!(
            "unknown incompatible features 0x8000000000000020: shiny, {}",
            "\\n".repeat(46)
        )
    );
    assert_eq!(error.kind(), HeaderErrorKind::Unsupported);
    assert_eq!(Header::decode_for_check(&bytes), Err(error));
}

#[test]
fn a_check_lives_with_what_an_opener_refuses() {
    use HeaderError::*;

    let sound = header();
    defect(&sound, &[(56, &[0; 4])], &RefcountTableEmpty);
    defect(
        &sound,
        &[(60, &[0, 1, 0, 1])],
        &TableTooLarge {
            table: HeaderTable::Snapshots,
            found: 65537,
            limit: 65536,
        },
    );
    defect(
        &sound,
        &[(71, &[1])],
        &TableUnaligned {
            table: HeaderTable::Snapshots,
            found: HostOffset::new(1),
            cluster_size: 65536,
        },
    );
    defect(&sound, &[(35, &[3])], &CryptMethod { found: 3 });
    defect(&sound, &[(35, &[2])], &CryptoMissing);
    defect(&sound, &[(95, &[2])], &RawExternalWithoutData);
    let error = CompressionBit {
        found: 1,
        bit: false,
    };
    defect(&sound, &[(104, &[1])], &error);
    let error = CompressionBit {
        found: 0,
        bit: true,
    };
    defect(&sound, &[(79, &[8])], &error);
    defect(
        &sound,
        &[(13, &[1, 0, 1])],
        &BackingNameOffset {
            found: 0x1_0001,
            limit: 0x1_0000,
        },
    );
    let error = BackingNameTooLong {
        found: 1024,
        limit: 1023,
    };
    defect(&sound, &[(14, &[2, 0]), (18, &[4, 0])], &error);
    let error = BackingNameTooLong { found: 9, limit: 8 };
    defect(&sound, &[(14, &[0xff, 0xf8]), (19, &[9])], &error);
}

#[test]
fn extensions_before_a_broken_one_are_kept() {
    let mut header = header();
    header.extensions = vec![
        Extension::DataFileName(b"data".to_vec()),
        Extension::Unknown {
            kind: 7,
            data: vec![0; 8],
        },
    ];
    let error = HeaderError::ExtensionTooLong {
        offset: 128,
        extension: 7,
        found: 65536,
        available: 65536 - 136,
    };
    let long = [(132, &[0, 1, 0, 0][..])];
    defect(&header, &long, &error);
    let (read, _) = Header::decode_for_check(&patched(&header, &long)).unwrap();
    assert_eq!(read.extensions, header.extensions[..1]);
    assert_eq!(read.data_file_name(), Some(&b"data"[..]));

    // The area ends four bytes into the second extension.
    let cut = [(8, &132_u64.to_be_bytes()[..])];
    let error = HeaderError::ExtensionCut {
        offset: 128,
        available: 4,
    };
    defect(&header, &cut, &error);
}

#[test]
fn each_rule_for_extensions_has_its_own_error() {
    use HeaderError::*;

    let with = |kind, data: Vec<u8>| {
        let mut header = header();
        header.extensions = vec![Extension::Unknown { kind, data }];
        header
    };
    let offset = 112;
    let format = with(extension::BACKING_FORMAT, vec![b'x'; 16]);
    let error = BackingFormatTooLong {
        offset,
        found: 16,
        limit: 15,
    };
    defect(&format, &[], &error);

    let luks = [(35, &[2][..])];
    let mut crypto = with(extension::CRYPTO, vec![0; 15]);
    let error = CryptoLength { offset, found: 15 };
    defect(&crypto, &luks, &error);
    crypto.extensions = vec![Extension::Crypto(CryptoExtension {
        offset: HostOffset::new(0x50000),
        len_bytes: 2068480,
    })];
    let error = CryptoUnexpected {
        offset,
        crypt_method: 0,
    };
    defect(&crypto, &[], &error);
    let error = CryptoUnaligned {
        offset,
        found: HostOffset::new(0x50001),
        cluster_size: 65536,
    };
    defect(&crypto, &[luks[0], (127, &[1])], &error);
    let read = Header::decode(&patched(&crypto, &luks)).unwrap();
    assert_eq!(read.crypto().unwrap().len_bytes, 2068480);

    let mut bitmaps = with(extension::BITMAPS, vec![0; 32]);
    let error = BitmapsLength { offset, found: 32 };
    defect(&bitmaps, &[], &error);
    bitmaps.extensions = vec![Extension::Bitmaps(BitmapsExtension {
        count: 1,
        directory_len_bytes: 32,
        directory_offset: HostOffset::new(0x50000),
    })];
    bitmaps.autoclear.set_bitmaps(true);
    assert_eq!(Header::decode(&bitmaps.encode().unwrap()).unwrap(), bitmaps);
    let error = BitmapsReserved { offset, found: 1 };
    defect(&bitmaps, &[(127, &[1])], &error);
    for found in [0, 65536] {
        let error = BitmapsCount {
            offset,
            found,
            limit: 65535,
        };
        defect(&bitmaps, &[(120, &found.to_be_bytes())], &error);
    }
    let error = BitmapsDirectoryTooLarge {
        offset,
        found: 65535 * 1024 + 1,
        limit: 65535 * 1024,
    };
    defect(&bitmaps, &[(132, &[3, 0xff, 0xfc, 1])], &error);
    let error = BitmapsDirectoryUnaligned {
        offset,
        found: HostOffset::new(0x50200),
        cluster_size: 65536,
    };
    defect(&bitmaps, &[(142, &[2])], &error);
    // Without the feature bit nobody looks at the values, and all bytes are kept.
    let stale = patched(&bitmaps, &[(95, &[0]), (127, &[1])]);
    assert_eq!(Header::decode(&stale).unwrap().encode().unwrap(), stale);
}

#[test]
fn rules_that_nobody_enforces_are_told_to_a_checker() {
    use HeaderError::*;

    let told = |header: &Header, patches: &[(usize, &[u8])], expected: HeaderError| {
        let bytes = patched(header, patches);
        assert!(Header::decode(&bytes).is_ok());
        let (_, defects) = Header::decode_for_check(&bytes).unwrap();
        assert!(!expected.is_refused());
        assert_eq!(defects, [expected]);
    };
    let plain = header();
    told(&plain, &[(95, &[1])], BitmapsMissing);
    let error = HeaderLengthUnaligned { found: 108 };
    told(&plain, &[(103, &[108]), (112, &[0; 8])], error);
    let error = BackingNameInHeader {
        found: 104,
        header_length: 112,
    };
    told(&plain, &[(15, &[104]), (19, &[3])], error);
    let mut twice = header();
    twice.extensions = vec![
        Extension::BackingFormat(b"raw".to_vec()),
        Extension::BackingFormat(b"qcow2".to_vec()),
    ];
    let error = ExtensionRepeated {
        offset: 128,
        extension: extension::BACKING_FORMAT,
    };
    told(&twice, &[], error);
    assert_eq!(twice.backing_format(), Some(&b"qcow2"[..]));
    let mut raw = header();
    raw.incompatible.set_external_data(true);
    raw.autoclear.set_raw_external_data(true);
    raw.backing_name = Some(b"base".to_vec());
    told(&raw, &[], BackingWithRawExternal);
}

#[test]
fn a_header_fits_to_the_last_byte_or_not_at_all() {
    let mut small = header();
    small.geometry = Geometry::new(9, 4, false).unwrap();
    small.virtual_size_raw = 1 << 15;
    small.extensions = vec![Extension::BackingFormat(b"raw".to_vec())];
    // 512 less 112 for the header and 16 for the extension; the end marker takes 8.
    for (len, fits) in [(376, true), (377, true), (384, true), (385, false)] {
        small.backing_name = Some(vec![b'n'; len]);
        match small.encode() {
            Ok(bytes) => {
                assert!(fits, "{len}");
                assert_eq!(Header::decode(&bytes).unwrap(), small);
            }
            Err(error) => {
                assert!(!fits, "{len}");
                assert_eq!(error.kind(), HeaderErrorKind::NoSpace);
            }
        }
    }
    small.backing_name = None;
    // Without an end marker up to the last byte, as 400 bytes are left for the extension and its own 8.
    for (len, fits) in [(384, true), (392, true), (393, false)] {
        small.extensions[0] = Extension::Unknown {
            kind: 1,
            data: vec![1; len],
        };
        let encoded = small.encode();
        assert_eq!(encoded.is_ok(), fits, "{len}");
        if let Ok(bytes) = encoded {
            assert_eq!(Header::decode(&bytes).unwrap(), small);
        }
    }
}
