//! Reads and writes: ends, vectors, neighbours, emptiness, absurd places.

use std::io::{IoSlice, IoSliceMut};

use super::{assert_zeros, bytes, growable, pattern, reach};
use crate::{MAX_LEN, Result, Storage, StorageErrorKind, ZeroFlags};

pub(super) fn starts_as_zeros(storage: &dyn Storage) {
    let len = storage.len().expect("len");
    assert_eq!(
        storage.is_empty().expect("is_empty"),
        len == 0,
        "is_empty agrees with len"
    );
    reach(storage);
    assert_zeros(storage, 0, 65536, "a fresh storage");
    assert!(
        storage.limits().alignment.is_power_of_two(),
        "the alignment is a power of two"
    );
    assert!(
        storage.limits().max_transfer > 0,
        "some transfer is possible"
    );
}

pub(super) fn reads_past_the_end_give_zeros(storage: &dyn Storage) {
    if growable(storage) {
        storage
            .write_at(&pattern(0, 1000), 0)
            .expect("a write succeeds");
        assert_eq!(storage.len().expect("len"), 1000);
    }
    let len = storage.len().expect("len");
    storage
        .write_at(&[7; 10], len - 10)
        .expect("a write up to the end succeeds");
    let found = bytes(storage, len - 10, 5000);
    assert_eq!(
        found.iter().position(|byte| *byte != 7),
        Some(10),
        "the last bytes come first"
    );
    assert!(found.iter().skip(10).all(|byte| *byte == 0), "then zeros");
    assert_zeros(storage, len, 100, "right behind the end");
    assert_zeros(storage, len + (1 << 30), 100, "far behind the end");
    let (mut a, mut b) = ([1; 700], [1; 700]);
    storage
        .read_vectored_at(
            &mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)],
            len - 10,
        )
        .expect("a vectored read succeeds");
    assert!(
        a.iter().skip(10).chain(&b).all(|byte| *byte == 0),
        "vectored reads, too"
    );
    assert_eq!(storage.len().expect("len"), len, "reads don't grow");
}

pub(super) fn vectored_requests_equal_plain_ones(storage: &dyn Storage) {
    reach(storage);
    let data = pattern(3, 9000);
    let (head, rest) = data.split_at(1);
    let (middle, tail) = rest.split_at(4999);
    let bufs = [head, &[], middle, tail].map(IoSlice::new);
    storage
        .write_vectored_at(&bufs, 4095)
        .expect("a vectored write succeeds");
    assert_bytes!(
        bytes(storage, 4095, data.len()),
        data,
        "buffers lie one after the other"
    );

    let (mut a, mut b, mut c) = (vec![0; 5000], vec![0; 3999], vec![0; 1]);
    let mut bufs = [&mut a, &mut b, &mut c].map(|buf| IoSliceMut::new(buf));
    storage
        .read_vectored_at(&mut bufs, 4095)
        .expect("a vectored read succeeds");
    assert_eq!(
        bufs.each_ref().map(|buf| buf.len()),
        [5000, 3999, 1],
        "slices stay as they were"
    );
    assert_eq!(
        [a, b, c].concat(),
        data,
        "a vectored read fills one buffer after the other"
    );

    // More buffers than systems take at once.
    let many = pattern(1, 3000);
    let bufs: Vec<IoSlice<'_>> = many.chunks(1).map(IoSlice::new).collect();
    storage
        .write_vectored_at(&bufs, 100_001)
        .expect("a write of many buffers succeeds");
    let mut found = vec![0; 3000];
    let mut bufs: Vec<IoSliceMut<'_>> = found.chunks_mut(1).map(IoSliceMut::new).collect();
    storage
        .read_vectored_at(&mut bufs, 100_001)
        .expect("a read of many buffers succeeds");
    assert_eq!(found, many, "many buffers arrive whole");
}

pub(super) fn unaligned_writes_leave_their_neighbours(storage: &dyn Storage) {
    reach(storage);
    let mut expected = pattern(0, 40_000);
    storage.write_at(&expected, 0).expect("a write succeeds");
    for (offset, len) in [
        (0, 1),
        (511, 2),
        (513, 4095),
        (4096, 4096),
        (8191, 16_386),
        (30_000, 1),
    ] {
        let data = vec![0x55; len];
        storage
            .write_at(&data, offset as u64)
            .expect("a write succeeds");
        expected.splice(offset..offset + len, data);
        assert_bytes!(
            bytes(storage, 0, 40_000),
            expected,
            "{len} bytes at {offset} and no others"
        );
    }
}

pub(super) fn empty_requests_change_nothing(storage: &dyn Storage) {
    let len = storage.len().expect("len");
    for offset in [0, 10, len, len + 1000] {
        storage
            .read_at(&mut [], offset)
            .expect("an empty read succeeds");
        storage
            .write_at(&[], offset)
            .expect("an empty write succeeds");
        storage
            .read_vectored_at(&mut [], offset)
            .expect("a read of no buffers succeeds");
        storage
            .write_vectored_at(&[], offset)
            .expect("a write of no buffers succeeds");
        let empty = [IoSlice::new(&[]), IoSlice::new(&[])];
        storage
            .write_vectored_at(&empty, offset)
            .expect("a write of empty buffers succeeds");
        storage
            .write_zeroes(offset..offset, ZeroFlags::NONE)
            .expect("zeroing nothing succeeds");
        storage
            .discard(offset..offset)
            .expect("discarding nothing succeeds");
    }
    storage.submit(&mut []);
    assert_eq!(
        storage.len().expect("len"),
        len,
        "an empty request doesn't grow"
    );
}

pub(super) fn huge_offsets_are_errors(storage: &dyn Storage) {
    let out_of_range = |result: Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            StorageErrorKind::OutOfRange,
            "{what}: {error}"
        );
    };
    let len = storage.len().expect("len");
    assert_zeros(storage, MAX_LEN - 16, 16, "the last bytes there can be");
    let mut buf = [0; 16];
    for offset in [
        MAX_LEN - 15,
        MAX_LEN,
        MAX_LEN + 1,
        u64::MAX - 15,
        u64::MAX - 8,
        u64::MAX,
    ] {
        let end = offset.saturating_add(16);
        out_of_range(
            storage.read_at(&mut buf, offset),
            "a read beyond all storages",
        );
        out_of_range(
            storage.read_vectored_at(&mut [IoSliceMut::new(&mut [0; 16])], offset),
            "a vectored read beyond all storages",
        );
        out_of_range(
            storage.write_at(&buf, offset),
            "a write beyond all storages",
        );
        if end > offset {
            out_of_range(
                storage.write_zeroes(offset..end, ZeroFlags::NONE),
                "zeroing beyond all storages",
            );
            out_of_range(
                storage.discard(offset..end),
                "a discard beyond all storages",
            );
            out_of_range(
                storage.extents(offset..end, 10).map(|_| ()),
                "extents beyond all storages",
            );
        }
    }
    storage
        .set_len(u64::MAX)
        .expect_err("no storage is that long");
    storage
        .set_len(MAX_LEN + 1)
        .expect_err("no storage is that long");
    #[expect(clippy::reversed_empty_ranges, reason = "what callers get wrong")]
    {
        let invalid = |result: Result<()>| {
            let error = result.expect_err("a reversed range");
            assert_eq!(error.kind(), StorageErrorKind::Invalid, "{error}");
        };
        invalid(storage.write_zeroes(10..5, ZeroFlags::NONE));
        invalid(storage.discard(10..5));
        invalid(storage.extents(10..5, 10).map(|_| ()));
    }
    assert_eq!(
        storage.len().expect("len"),
        len,
        "refused requests change nothing"
    );
}
