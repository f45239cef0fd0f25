//! What the fuzz targets call: decode any bytes, ask everything, write it back.
//!
//! Each function panics only where a promise of this crate is broken.

use alloc::vec::Vec;
use core::hint::black_box;

use crate::bitmap::{BitmapDirectory, BitmapEntry, BitmapTableEntry, required_table_entries};
use crate::header::HeaderError;
use crate::snapshot::{Snapshot, decode_table, encode_table};
use crate::{Geometry, Header, LuksHeader, RefcountBlock, set_refcount};

/// Headers and extensions. `data` is the start of a file.
pub fn header(data: &[u8]) {
    let probed = Header::probe(data);
    let opened = Header::decode(data);
    let checked = Header::decode_for_check(data);
    if let Err(error) = &opened {
        assert!(error.is_refused());
        describe(error);
    }
    let Ok((header, defects)) = checked else {
        assert!(opened.is_err());
        return;
    };
    assert_eq!(probed, Ok(header.geometry.cluster_len()));
    defects.iter().for_each(describe);
    match defects.iter().find(|defect| defect.is_refused()) {
        Some(first) => assert_eq!(opened.as_ref(), Err(first)),
        None => assert_eq!(opened.as_ref(), Ok(&header)),
    }
    black_box((
        header.virtual_size(),
        header.entry_rules(),
        header.backing_format(),
        header.data_file_name(),
        header.bitmaps(),
        header.crypto(),
    ));
    for name in header.feature_names() {
        black_box(name.name());
    }
    let Ok(header) = opened else {
        let _ = black_box(header.encode());
        return;
    };
    match header.encode() {
        Ok(bytes) => {
            assert_eq!(bytes.len(), header.geometry.cluster_len());
            let again = Header::decode(&bytes);
            assert_eq!(again.as_ref(), Ok(&header));
            assert_eq!(again.map(|again| again.encode()), Ok(Ok(bytes)));
        }
        // Padding and a name of its own place may need more room than the original had.
        Err(error) => assert!(matches!(error, HeaderError::NoSpace { .. })),
    }
}

fn describe(error: &HeaderError) {
    use alloc::string::ToString;

    assert!(!error.field().is_empty() && !error.to_string().is_empty());
    black_box((error.kind(), error.offset()));
}

/// Refcount blocks. The first byte chooses the width, the second a value; the rest is the block.
pub fn refcount_block(data: &[u8]) {
    let [order, seed, block @ ..] = data else {
        return;
    };
    let Ok(geometry) = Geometry::new(9, u32::from(order % 7), false) else {
        return;
    };
    let typed = RefcountBlock::new(block, geometry);
    let values: Vec<u64> = typed.iter().collect();
    assert_eq!(values.len(), typed.len());
    assert_eq!(typed.get(typed.len()), None);
    for (index, chunk) in values.chunks(64).enumerate() {
        let (ones, others) = typed.ones_and_others(index.saturating_mul(64));
        for (bit, value) in chunk.iter().enumerate() {
            assert_eq!(ones >> bit & 1 == 1, *value == 1);
            assert_eq!(others >> bit & 1 == 1, *value > 1);
        }
    }
    let value = u64::from(*seed) & geometry.refcount_max();
    let count = values.len() & !63;
    let equal = values.iter().take(count).all(|v| *v == value);
    assert_eq!(typed.all_equal(0, count, value), equal);

    let mut copy = block.to_vec();
    for (index, value) in values.iter().enumerate() {
        assert_eq!(set_refcount(&mut copy, geometry, index, *value), Some(()));
    }
    assert_eq!(copy, block);
    assert_eq!(set_refcount(&mut copy, geometry, values.len(), 0), None);
    if geometry.refcount_max() != u64::MAX {
        let too_large = geometry.refcount_max().saturating_add(1);
        assert_eq!(set_refcount(&mut copy, geometry, 0, too_large), None);
    }
}

/// Snapshot tables, bitmap directories and bitmap tables. The first byte counts entries; the rest is the table.
pub fn tables(data: &[u8]) {
    let [count, table @ ..] = data else {
        return;
    };
    let count = u32::from(*count);
    snapshots(table, count);
    bitmaps(table, count);
    for bits in table.as_chunks::<8>().0 {
        let entry = BitmapTableEntry::from_be_bytes(*bits);
        assert_eq!(entry.to_be_bytes(), *bits);
        if entry.reserved_bits() == 0 {
            assert_eq!(BitmapTableEntry::new(entry.kind()), entry);
        }
    }
}

fn snapshots(table: &[u8], count: u32) {
    let snapshots: Vec<Snapshot> = decode_table(table, count).map_while(Result::ok).collect();
    let Ok(encoded) = encode_table(&snapshots) else {
        // Few entries of bounded length fit in any table.
        unreachable!("a table that was read can be written")
    };
    let again: Vec<_> = decode_table(&encoded, count)
        .map_while(Result::ok)
        .collect();
    assert_eq!(again, snapshots);
    assert!(encoded.len() <= table.len());
    for snapshot in &snapshots {
        black_box((
            snapshot.vm_state_size(),
            snapshot.disk_size(),
            snapshot.icount(),
        ));
    }
    match (Snapshot::decode(table), Snapshot::decode_truncating(table)) {
        (Ok((snapshot, unpadded)), cut) => {
            assert_eq!(
                snapshot.encode().as_deref(),
                Ok(table.get(..unpadded).unwrap_or_default())
            );
            assert_eq!(cut, Ok((snapshot, unpadded)));
        }
        (Err(_), Ok((cut, _))) => assert!(cut.encode().is_ok()),
        (Err(_), Err(_)) => {}
    }
}

fn bitmaps(directory: &[u8], count: u32) {
    let walk: Vec<_> = BitmapDirectory::new(directory, count).collect();
    let good = walk.iter().filter(|entry| entry.is_ok()).count();
    let bad = walk.len().saturating_sub(good);
    assert!(bad <= 1 && good <= count as usize && (bad == 1 || good == count as usize));
    for entry in walk.into_iter().flatten() {
        let Ok(geometry) = Geometry::new(16, 4, false) else {
            return;
        };
        black_box(entry.defects(geometry, u64::MAX));
        black_box(required_table_entries(
            geometry,
            u64::MAX,
            entry.granularity_bits.into(),
        ));
        black_box((entry.flags.unknown(), entry.flags.auto()));
        match entry.encode() {
            Ok(bytes) => assert_eq!(BitmapEntry::decode(&bytes), Ok((entry, bytes.len()))),
            Err(error) => assert!(entry.defects(geometry, 0).contains(&error)),
        }
    }
}

/// LUKS headers. `data` is the start of the encryption area.
pub fn luks(data: &[u8]) {
    let decoded = LuksHeader::decode(data);
    let Some(bytes) = data.first_chunk() else {
        assert!(decoded.is_err());
        return;
    };
    let header = LuksHeader::from_bytes(*bytes);
    assert_eq!(header.encode(), *bytes);
    let defects = header.defects();
    match defects.first() {
        Some(first) => assert_eq!(decoded, Err(*first)),
        None => assert_eq!(decoded, Ok(header)),
    }
    for (material, slot) in header.key_material().iter().zip(header.slots()) {
        assert!(material.area_len_bytes >= material.len_bytes);
        if defects.is_empty() {
            let end = material.offset.saturating_add(material.area_len_bytes);
            assert!(end <= header.payload_offset());
        }
        black_box((slot.state(), slot.iterations(), slot.salt()));
    }
    black_box((
        header.cipher_name(),
        header.cipher_mode(),
        header.hash_spec(),
        header.uuid(),
        header.master_key_len(),
        header.master_key_iterations(),
    ));
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::collection::vec as bytes;
    use proptest::prelude::*;

    use super::*;

    const HEADER: &[u8] =
        include_bytes!("../testdata/qemu-10.0/header-v3-luks-backing-bitmaps.bin");
    const SMALL: &[u8] = include_bytes!("../testdata/qemu-10.0/header-v3-512-backing.bin");
    const LUKS: &[u8] = include_bytes!("../testdata/qemu-10.0/luks-header.bin");
    const SNAPSHOTS: &[u8] = include_bytes!("../testdata/qemu-10.0/snapshot-table.bin");
    const BITMAPS: &[u8] = include_bytes!("../testdata/qemu-10.0/bitmap-directory.bin");

    /// `original` with some bytes replaced, and perhaps cut.
    fn damaged(original: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
        let patches = bytes((0..original.len(), byte()), 0..6);
        (patches, 0..original.len().saturating_mul(4)).prop_map(move |(patches, cut)| {
            let mut damaged = original.to_vec();
            for (at, byte) in patches {
                damaged[at] = byte;
            }
            damaged.truncate(cut);
            damaged
        })
    }

    /// Any byte, and often one from the border of a range.
    fn byte() -> impl Strategy<Value = u8> {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![0, 1, 2, 4, 8, 0x7f, 0x80, 0xff])
        ]
    }

    proptest! {
        #[test]
        fn any_header_is_told_apart(data in prop_oneof![
            damaged(HEADER), damaged(SMALL), bytes(any::<u8>(), 0..600),
        ]) {
            header(&data);
        }

        #[test]
        fn any_refcount_block_is_read_back(data in bytes(byte(), 0..514)) {
            refcount_block(&data);
        }

        #[test]
        fn any_table_is_told_apart(count in 0_u8..5, data in prop_oneof![
            damaged(SNAPSHOTS), damaged(BITMAPS), bytes(byte(), 0..300),
        ]) {
            tables(&[&[count], &data[..]].concat());
        }

        #[test]
        fn any_luks_header_is_told_apart(data in prop_oneof![
            damaged(LUKS), bytes(byte(), 0..700),
        ]) {
            luks(&data);
        }
    }
}
