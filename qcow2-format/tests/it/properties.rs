use proptest::collection::vec;
use proptest::prelude::*;
use qcow2_format::bitmap::{BitmapCluster, BitmapFlags, BitmapTableEntry};
use qcow2_format::header::{
    AutoclearFeatures, BitmapsExtension, CompatibleFeatures, CompressionType, CryptMethod,
    CryptoExtension, Extension, FeatureName, IncompatibleFeatures, Version,
};
use qcow2_format::snapshot::{decode_table, encode_table};
use qcow2_format::{
    BitmapEntry, ClusterKind, CompressedExtent, EntryRules, Geometry, Header, HeaderErrorKind,
    HostOffset, L1Entry, L2Entry, LuksHeader, RefcountBlock, RefcountTableEntry, Snapshot,
    set_refcount,
};

fn bytes(len: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), len)
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (9_u32..=21, 0_u32..=6, any::<bool>()).prop_map(|(bits, order, extended)| {
        Geometry::new(bits, order, extended && bits >= 14).unwrap()
    })
}

/// Any extension that a sound image may have; the encryption one goes with LUKS.
fn extension(geometry: Geometry, luks: bool) -> BoxedStrategy<Extension> {
    let bits = geometry.cluster_bits();
    let cluster = any::<u64>().prop_map(move |n| HostOffset::new(n >> bits << bits));
    let name = (0_u8..4, 0_u8..70, bytes(0..50))
        .prop_map(|(kind, bit, name)| FeatureName::new(kind, bit, &name));
    let crypto = (cluster.clone(), any::<u64>())
        .prop_map(|(offset, len_bytes)| CryptoExtension { offset, len_bytes });
    let bitmaps = (1_u32..=65535, 0_u64..=65535 * 1024, cluster).prop_map(
        |(count, directory_len_bytes, directory_offset)| BitmapsExtension {
            count,
            directory_len_bytes,
            directory_offset,
        },
    );
    let unknown = (1_u32..0x0500_0000, bytes(0..40))
        .prop_map(|(kind, data)| Extension::Unknown { kind, data });
    let others = prop_oneof![
        bytes(0..=15).prop_map(Extension::BackingFormat),
        bytes(0..40).prop_map(Extension::DataFileName),
        vec(name, 0..3).prop_map(Extension::FeatureNames),
        bitmaps.prop_map(Extension::Bitmaps),
        unknown,
    ];
    if luks {
        prop_oneof![others, crypto.prop_map(Extension::Crypto)].boxed()
    } else {
        others.boxed()
    }
}

/// Any header that `decode` accepts, unless it doesn't fit in its cluster.
fn header() -> impl Strategy<Value = Header> {
    let shape = (geometry(), any::<bool>(), 0_u32..3);
    shape.prop_flat_map(|(geometry, old, crypt)| {
        let geometry = if old {
            Geometry::new(geometry.cluster_bits(), 4, false).unwrap()
        } else {
            geometry
        };
        let crypt_method = CryptMethod::from_number(crypt);
        let luks = crypt_method == CryptMethod::Luks;
        let bits = geometry.cluster_bits();
        let table = (0..1_u64 << 62).prop_map(move |n| HostOffset::new(n >> bits << bits));
        let tables = (
            table.clone(),
            table.clone(),
            table,
            0_u32..1000,
            0_u32..=65536,
        );
        let features = (any::<[bool; 6]>(), any::<u64>(), any::<u64>(), any::<u64>());
        let tail = (bytes(0..20), any::<[u8; 7]>(), bytes(1..60));
        let extensions = vec(extension(geometry, luks), 0..6);
        (tables, features, tail, extensions).prop_map(
            move |(tables, features, (unknown, padding, name), mut extensions)| {
                let (l1, refcounts, snapshots, l1_entries, snapshot_count) = tables;
                let ([external, zstd, raw, backing, long, dirty], size, compatible, autoclear) =
                    features;
                if luks {
                    extensions.push(Extension::Crypto(CryptoExtension {
                        offset: HostOffset::new(0),
                        len_bytes: 0,
                    }));
                }
                let mut header = Header {
                    version: if old { Version::V2 } else { Version::V3 },
                    geometry,
                    virtual_size_raw: size
                        % (u64::from(l1_entries) * geometry.l2_coverage()).max(1),
                    crypt_method,
                    l1_table_offset: l1,
                    l1_entries,
                    refcount_table_offset: refcounts,
                    refcount_table_clusters: 1 + l1_entries % 4,
                    snapshot_count,
                    snapshot_table_offset: snapshots,
                    incompatible: IncompatibleFeatures::default(),
                    compatible: CompatibleFeatures::default(),
                    autoclear: AutoclearFeatures::default(),
                    header_length: 72,
                    compression_type: CompressionType::Zlib,
                    padding: [0; 7],
                    unknown_fields: Vec::new(),
                    backing_name: backing.then_some(name),
                    extensions,
                };
                if !old {
                    header.incompatible.set_dirty(dirty);
                    header.incompatible.set_external_data(external);
                    header.incompatible.set_extended_l2(geometry.extended_l2());
                    header.compatible = CompatibleFeatures::from_bits(compatible);
                    header.autoclear = AutoclearFeatures::from_bits(autoclear);
                    header.autoclear.set_raw_external_data(raw && external);
                    header.header_length = 104;
                    if long || zstd {
                        header.header_length = 112 + u32::try_from(unknown.len()).unwrap();
                        header.unknown_fields = unknown;
                        header.padding = padding;
                        header.incompatible.set_compression(zstd);
                        header.compression_type = if zstd {
                            CompressionType::Zstd
                        } else {
                            CompressionType::Zlib
                        };
                    }
                }
                header
            },
        )
    })
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let numbers = (any::<[u32; 4]>(), any::<[u64; 2]>());
    (numbers, bytes(0..30), bytes(0..300), bytes(0..=1024)).prop_map(
        |((words, longs), id, name, extra_data)| Snapshot {
            l1_table_offset: HostOffset::new(longs[0]),
            l1_entries: words[0],
            id,
            name,
            date_sec: words[1],
            date_nsec: words[2],
            vm_clock_nsec: longs[1],
            vm_state_size_32: words[3],
            extra_data,
        },
    )
}

proptest! {
    #[test]
    fn headers_are_read_back(header in header()) {
        match header.encode() {
            Ok(bytes) => {
                prop_assert_eq!(Header::decode(&bytes), Ok(header.clone()));
                let (checked, defects) = Header::decode_for_check(&bytes).unwrap();
                prop_assert_eq!(&checked, &header);
                prop_assert!(defects.iter().all(|defect| !defect.is_refused()));
                prop_assert_eq!(checked.encode(), Ok(bytes));
            }
            Err(error) => prop_assert_eq!(error.kind(), HeaderErrorKind::NoSpace),
        }
    }

    #[test]
    fn snapshot_tables_are_read_back(snapshots in vec(snapshot(), 0..5)) {
        let table = encode_table(&snapshots).unwrap();
        let count = u32::try_from(snapshots.len()).unwrap();
        let read: Result<Vec<_>, _> = decode_table(&table, count).collect();
        prop_assert_eq!(read.as_ref(), Ok(&snapshots));
        for snapshot in &snapshots {
            let bytes = snapshot.encode().unwrap();
            prop_assert_eq!(Snapshot::decode(&bytes), Ok((snapshot.clone(), bytes.len())));
            for cut in [0, 39, bytes.len() - 1] {
                prop_assert!(Snapshot::decode(&bytes[..cut]).is_err());
            }
        }
    }

    #[test]
    fn bitmap_entries_are_read_back(
        table in any::<(u64, u32, u32)>(),
        kinds in any::<(u8, u8)>(),
        name in bytes(0..=1023),
        extra_data in bytes(0..100),
    ) {
        let entry = BitmapEntry {
            table_offset: HostOffset::new(table.0),
            table_entries: table.1,
            flags: BitmapFlags::from_bits(table.2),
            kind: kinds.0,
            granularity_bits: kinds.1,
            name,
            extra_data,
        };
        let bytes = entry.encode().unwrap();
        prop_assert_eq!(bytes.len() % 8, 0);
        prop_assert_eq!(BitmapEntry::decode(&bytes), Ok((entry, bytes.len())));
        prop_assert!(BitmapEntry::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn luks_headers_are_read_back(bytes in bytes(592)) {
        let header = LuksHeader::from_bytes(*bytes.first_chunk().unwrap());
        prop_assert_eq!(&header.encode()[..], &bytes[..]);
    }

    #[test]
    fn table_entries_are_read_back(bits in any::<u64>(), cluster in 1_u64..1 << 47, copied: bool) {
        let be = bits.to_be_bytes();
        prop_assert_eq!(L1Entry::from_be_bytes(be).to_be_bytes(), be);
        prop_assert_eq!(RefcountTableEntry::from_be_bytes(be).to_be_bytes(), be);
        prop_assert_eq!(BitmapTableEntry::from_be_bytes(be).to_be_bytes(), be);

        let offset = HostOffset::new(cluster << 9);
        let l1 = L1Entry::new(offset, copied);
        prop_assert_eq!((l1.l2_table(), l1.is_copied(), l1.reserved_bits()), (offset, copied, 0));
        let bitmap = BitmapTableEntry::new(BitmapCluster::Cluster(offset));
        prop_assert_eq!(bitmap.kind(), BitmapCluster::Cluster(offset));
        prop_assert_eq!(bitmap.reserved_bits(), 0);
    }

    #[test]
    fn refcounts_of_every_width_are_read_back(
        order in 0_u32..=6,
        values in vec(any::<u64>(), 1..70),
        at in 0_usize..64,
    ) {
        let geometry = Geometry::new(10, order, false).unwrap();
        let mut block = vec![0xa5; geometry.cluster_len()];
        let before: Vec<u64> = RefcountBlock::new(&block, geometry).iter().collect();
        let last = before.len() - 1;
        for (index, value) in values.iter().enumerate() {
            let index = (at + index).min(last);
            let value = value & geometry.refcount_max();
            prop_assert_eq!(set_refcount(&mut block, geometry, index, value), Some(()));
            prop_assert_eq!(RefcountBlock::new(&block, geometry).get(index), Some(value));
        }
        // Neighbours stay as they are.
        let after: Vec<u64> = RefcountBlock::new(&block, geometry).iter().collect();
        prop_assert_eq!(&after[..at], &before[..at]);
        let end = (at + values.len()).min(before.len());
        prop_assert_eq!(&after[end..], &before[end..]);
    }

    #[test]
    fn compressed_descriptors_of_every_cluster_size_are_read_back(
        geometry in geometry(),
        position in any::<u64>(),
        len in any::<u64>(),
    ) {
        let rules = EntryRules { geometry, external_data: false, version2: false };
        let limit = geometry.compressed_offset_bits().min(56);
        let offset = HostOffset::new(position & ((1 << limit) - 1));
        // As many bytes as a descriptor can count: a whole number of sectors from the first byte's on.
        let max = (1 << (geometry.cluster_bits() - 8)) * 512 - (offset.get() & 511);
        let len_bytes = 1 + len % max;
        let entry = L2Entry::compressed(geometry, offset, len_bytes).unwrap();
        let sector_end = (offset.get() + len_bytes).next_multiple_of(512);
        let extent = CompressedExtent { offset, len_bytes: sector_end - offset.get() };
        prop_assert_eq!(entry.kind(rules), ClusterKind::Compressed(extent));
        prop_assert!(!entry.is_copied() && entry.reserved_bits() == 0);
        prop_assert_eq!(L2Entry::compressed(geometry, offset, max + 1), None);
        prop_assert_eq!(L2Entry::compressed(geometry, offset, 0), None);
        let beyond = HostOffset::new(1 << limit);
        prop_assert_eq!(L2Entry::compressed(geometry, beyond, 1), None);
    }
}
