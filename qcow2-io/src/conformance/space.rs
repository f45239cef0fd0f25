//! Length, zeros, holes.

use super::{REACH, assert_zeros, bytes, growable, pattern, reach};
use crate::{Extent, Storage, StorageErrorKind, ZeroFlags};

pub(super) fn writes_past_the_end_grow(storage: &dyn Storage) {
    if !growable(storage) {
        let len = storage.len().expect("len");
        let error = storage
            .write_at(&[1; 2], len - 1)
            .expect_err("a fixed storage can't grow");
        assert!(
            matches!(
                error.kind(),
                StorageErrorKind::OutOfRange | StorageErrorKind::NoSpace
            ),
            "the refusal is about the range: {error}"
        );
        return;
    }
    storage.write_at(&[1; 10], 100).expect("a write succeeds");
    assert_eq!(storage.len().expect("len"), 110, "the length is exact");
    assert_zeros(storage, 0, 100, "the gap");
    storage
        .write_at(&[2; 10], 70_000)
        .expect("a write succeeds");
    assert_eq!(storage.len().expect("len"), 70_010);
    assert_bytes!(bytes(storage, 100, 10), [1; 10]);
    assert_zeros(storage, 110, 69_890, "the gap");
    storage
        .write_at(&[3; 4096], 69_632)
        .expect("a write succeeds");
    assert_eq!(storage.len().expect("len"), 73_728);
    storage.write_at(&[4], 0).expect("a write succeeds");
    assert_eq!(
        storage.len().expect("len"),
        73_728,
        "a write inside doesn't change the length"
    );
}

pub(super) fn zeroed_ranges_read_as_zeros(storage: &dyn Storage) {
    reach(storage);
    let len = storage.len().expect("len");
    let all = [
        ZeroFlags::NONE,
        ZeroFlags::MAY_UNMAP,
        ZeroFlags::NO_FALLBACK,
        ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
    ];
    for flags in all {
        let data = pattern(0, 300_000);
        storage.write_at(&data, 0).expect("a write succeeds");
        match storage.write_zeroes(5000..250_001, flags) {
            Ok(()) => assert_zeros(storage, 5000, 245_001, "a zeroed range"),
            Err(error) => {
                assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}");
                assert!(
                    flags.contains(ZeroFlags::NO_FALLBACK),
                    "zeros can always be written"
                );
                assert_bytes!(
                    bytes(storage, 0, 300_000),
                    data,
                    "a refused request did nothing"
                );
                continue;
            }
        }
        assert_bytes!(
            bytes(storage, 0, 5000),
            data.get(..5000).unwrap_or_default()
        );
        assert_bytes!(
            bytes(storage, 250_001, 49_999),
            data.get(250_001..).unwrap_or_default()
        );
    }
    assert_eq!(storage.len().expect("len"), len, "inside, the length stays");
}

pub(super) fn zeroing_past_the_end_grows(storage: &dyn Storage) {
    for flags in [ZeroFlags::NONE, ZeroFlags::MAY_UNMAP] {
        if !growable(storage) {
            let len = storage.len().expect("len");
            storage
                .write_zeroes(len - 1..len + 1, flags)
                .expect_err("a fixed storage can't grow");
            return;
        }
        storage.write_at(&[9; 3000], 0).expect("a write succeeds");
        storage
            .write_zeroes(2000..10_001, flags)
            .expect("zeroing succeeds");
        assert_eq!(storage.len().expect("len"), 10_001, "zeroing grows exactly");
        assert_bytes!(bytes(storage, 0, 2000), [9; 2000]);
        assert_zeros(storage, 2000, 8001, "across the end");
        storage
            .write_zeroes(20_000..20_001, flags)
            .expect("zeroing succeeds");
        assert_eq!(
            storage.len().expect("len"),
            20_001,
            "zeroing behind the end grows"
        );
    }
}

pub(super) fn discarded_ranges_read_as_zeros(storage: &dyn Storage) {
    reach(storage);
    let data = pattern(0, 300_000);
    storage.write_at(&data, 0).expect("a write succeeds");
    let len = storage.len().expect("len");
    match storage.discard(5000..250_001) {
        Ok(()) => assert_zeros(storage, 5000, 245_001, "a discarded range"),
        Err(error) => {
            assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}");
            assert_bytes!(
                bytes(storage, 0, 300_000),
                data,
                "a refused request did nothing"
            );
            return;
        }
    }
    assert_bytes!(
        bytes(storage, 0, 5000),
        data.get(..5000).unwrap_or_default()
    );
    assert_bytes!(
        bytes(storage, 250_001, 49_999),
        data.get(250_001..).unwrap_or_default()
    );
    storage
        .discard(len - 10..len + 10)
        .expect("what lies past the end is ignored");
    storage
        .discard(len + 1000..len + 2000)
        .expect("what lies past the end is ignored");
    assert_eq!(storage.len().expect("len"), len, "a discard never grows");
}

pub(super) fn a_cut_storage_grows_back_with_zeros(storage: &dyn Storage) {
    if !growable(storage) {
        let len = storage.len().expect("len");
        storage
            .set_len(len)
            .expect("setting the length it has is no change");
        storage.set_len(len + 1).expect_err("a fixed length stays");
        return;
    }
    for cut in [10_000, 8192, 8191, 1, 0] {
        let data = pattern(0, 20_000);
        storage.write_at(&data, 0).expect("a write succeeds");
        storage.set_len(cut).expect("shrinking succeeds");
        assert_eq!(storage.len().expect("len"), cut);
        storage.set_len(20_000).expect("growing succeeds");
        assert_eq!(storage.len().expect("len"), 20_000);
        let kept = usize::try_from(cut).unwrap_or(0);
        assert_bytes!(
            bytes(storage, 0, kept),
            data.get(..kept).unwrap_or_default()
        );
        assert_zeros(storage, cut, 20_000 - kept, "what was cut off");
    }
}

pub(super) fn extents_cover_and_tell_the_truth(storage: &dyn Storage) {
    reach(storage);
    for offset in [0, 65_536, 200_000, 524_288, 700_000] {
        storage
            .write_at(&pattern(offset, 5000), offset)
            .expect("a write succeeds");
    }
    match storage.discard(525_000..527_000) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}"),
    }
    let len = storage.len().expect("len");
    for range in [
        0..len,
        1..REACH - 1,
        66_000..66_001,
        len - 1..len + 5000,
        len + 5..len + 10,
    ] {
        for max in [1, 2, usize::MAX] {
            let mut position = range.start;
            while position < range.end {
                let extents = storage.extents(position..range.end, max).expect("extents");
                assert!(
                    !extents.is_empty(),
                    "a range that isn't empty has an extent"
                );
                assert!(extents.len() <= max, "no more extents than asked for");
                for extent in extents {
                    assert_extent(storage, &extent, position, range.end);
                    position = extent.end();
                }
            }
        }
        assert!(storage.extents(range, 0).expect("extents").is_empty());
    }
    assert!(
        storage.extents(5..5, 10).expect("extents").is_empty(),
        "nothing has no extents"
    );
}

fn assert_extent(storage: &dyn Storage, extent: &Extent, position: u64, end: u64) {
    assert_eq!(extent.offset, position, "extents come without gaps");
    assert!(extent.len > 0, "no extent is empty");
    assert!(extent.end() <= end, "no extent leaves the range");
    if extent.kind.reads_as_zeros() {
        let len = usize::try_from(extent.len).expect("test ranges are small");
        assert_zeros(storage, extent.offset, len, "an extent of zeros");
    }
}
