use std::path::Path;

use qcow2_format::bitmap::BitmapDirectory;
use qcow2_format::header::{CompressionType, CryptMethod, Version};
use qcow2_format::snapshot::{decode_table, encode_table};
use qcow2_format::{BitmapEntry, Header, HostOffset, Snapshot};

fn archived(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/qemu-10.0");
    std::fs::read(folder.join(name)).unwrap()
}

/// The header, which is known to re-encode identically and to have no defect.
fn header(name: &str) -> Header {
    let mut bytes = archived(&format!("header-{name}.bin"));
    let header = Header::decode(&bytes).unwrap();
    bytes.resize(Header::probe(&bytes).unwrap(), 0);
    assert_eq!(header.encode().unwrap(), bytes, "{name}");
    let (checked, defects) = Header::decode_for_check(&bytes).unwrap();
    assert_eq!((checked, defects), (header.clone(), vec![]), "{name}");
    header
}

#[test]
fn headers_of_every_kind_are_written_as_qemu_writes_them() {
    let header = |name| header(name);
    let default = header("v3-default");
    assert_eq!((default.virtual_size(), default.l1_entries), (1 << 30, 2));
    assert_eq!(default.feature_names().len(), 8);
    let empty = header("v3-empty");
    assert_eq!((empty.l1_entries, empty.l1_table_offset.get()), (0, 0));

    let v2 = header("v2-default");
    assert_eq!((v2.version, v2.header_length), (Version::V2, 72));
    assert_eq!(v2.geometry.refcount_bits(), 16);
    let v2 = header("v2-backing");
    assert_eq!(v2.backing_name.as_deref(), Some(&b"base.raw"[..]));
    assert_eq!(v2.backing_format(), Some(&b"raw"[..]));
    let v2 = header("v2-luks");
    assert!(v2.crypto().is_some());

    let small = header("v3-512-backing");
    assert_eq!(small.geometry.cluster_size(), 512);
    assert_eq!(small.feature_names(), []);
    let lazy = header("v3-lazy-refcount1");
    assert!(lazy.compatible.lazy_refcounts());
    assert_eq!(lazy.geometry.refcount_bits(), 1);
    let extended = header("v3-extended-zstd");
    assert!(extended.geometry.extended_l2() && extended.incompatible.compression());
    assert_eq!(extended.compression_type, CompressionType::Zstd);
    let backing = header("v3-backing");
    assert_eq!(backing.backing_format(), Some(&b"raw"[..]));
    let data = header("v3-data-file");
    assert!(data.incompatible.external_data() && data.autoclear.raw_external_data());
    assert_eq!(data.data_file_name(), Some(&b"d.raw"[..]));
    assert_eq!(header("v3-aes").crypt_method, CryptMethod::Aes);
    let luks = header("v3-luks");
    assert_eq!(luks.crypt_method, CryptMethod::Luks);
    assert_eq!(luks.crypto().unwrap().len_bytes, 2068480);
    let all = header("v3-luks-backing-bitmaps");
    assert_eq!(all.extensions.len(), 4);
    assert_eq!(all.bitmaps().unwrap().count, 1);
    let tables = header("v3-snapshots-bitmaps");
    assert_eq!(tables.snapshot_count, 2);
    assert_eq!(tables.bitmaps().unwrap().directory_len_bytes, 72);
}

#[test]
fn a_snapshot_table_is_written_as_qemu_writes_it() {
    let table = archived("snapshot-table.bin");
    let snapshots: Result<Vec<Snapshot>, _> = decode_table(&table, 2).collect();
    let snapshots = snapshots.unwrap();
    assert_eq!(encode_table(&snapshots).unwrap(), table);
    let names: Vec<_> = snapshots.iter().map(|s| (&s.id[..], &s.name[..])).collect();
    assert_eq!(
        names,
        [(&b"1"[..], &b"one"[..]), (b"2", b"second snapshot")]
    );
    for snapshot in &snapshots {
        assert_eq!(snapshot.disk_size(), Some(64 << 20));
        assert_eq!((snapshot.vm_state_size(), snapshot.icount()), (0, Some(0)));
    }
}

#[test]
fn a_bitmap_directory_is_written_as_qemu_writes_it() {
    let directory = archived("bitmap-directory.bin");
    let bitmaps: Result<Vec<BitmapEntry>, _> = BitmapDirectory::new(&directory, 2).collect();
    let bitmaps = bitmaps.unwrap();
    let encoded: Vec<u8> = bitmaps.iter().flat_map(|b| b.encode().unwrap()).collect();
    assert_eq!(encoded, directory);
    let geometry = header("v3-snapshots-bitmaps").geometry;
    for bitmap in &bitmaps {
        assert_eq!(bitmap.defects(geometry, 64 << 20), []);
        assert!(!bitmap.flags.in_use() && bitmap.table_offset != HostOffset::new(0));
    }
    assert_eq!(bitmaps[1].name, b"a longer name");
    assert_eq!(bitmaps[1].granularity_bits, 12);
    assert_eq!(
        (bitmaps[0].flags.auto(), bitmaps[1].flags.auto()),
        (false, true)
    );
}
