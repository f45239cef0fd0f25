//! The contract of [`Storage`] as a program: every backend and every wrapper runs it in its tests.
//!
//! A violated promise panics with a sentence that names it. Storages of fixed length are welcome: what they may refuse is
//! skipped, the rest holds for them too.

use std::io::{IoSlice, IoSliceMut};

use crate::{Extent, MAX_LEN, Op, Result, Storage, StorageErrorKind, ZeroFlags};

/// Where fixed storages must at least reach, and growable ones are made to.
const REACH: u64 = 1 << 20;

/// Runs all checks. Each call of `make` gives a fresh storage that is either empty and growable, or of a fixed length of at
/// least 1 MiB of zeros.
///
/// # Panics
///
/// When the storage breaks its contract.
pub fn run(make: impl Fn() -> Box<dyn Storage>) {
    starts_as_zeros(&*make());
    reads_past_the_end_give_zeros(&*make());
    vectored_requests_equal_plain_ones(&*make());
    unaligned_writes_leave_their_neighbours(&*make());
    writes_past_the_end_grow(&*make());
    zeroed_ranges_read_as_zeros(&*make());
    zeroing_past_the_end_grows(&*make());
    discarded_ranges_read_as_zeros(&*make());
    a_cut_storage_grows_back_with_zeros(&*make());
    extents_cover_and_tell_the_truth(&*make());
    empty_requests_change_nothing(&*make());
    huge_offsets_are_errors(&*make());
    disjoint_writers_do_not_disturb_each_other(&*make());
    a_batch_equals_a_loop(&*make());
    flushing_keeps_everything(&*make());
}

/// Whether the storage can change its length; if so, it is left at length 0.
fn growable(storage: &dyn Storage) -> bool {
    match storage.set_len(0) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(
                error.kind(),
                StorageErrorKind::Unsupported,
                "a fixed length says so"
            );
            assert!(
                storage.len().expect("len") >= REACH,
                "a fixed storage holds 1 MiB"
            );
            false
        }
    }
}

/// Makes the storage at least [`REACH`] long.
fn reach(storage: &dyn Storage) {
    if growable(storage) {
        storage.set_len(REACH).expect("a growable storage grows");
    }
}

fn bytes(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    storage.read_at(&mut buf, offset).expect("a read succeeds");
    buf
}

fn assert_zeros(storage: &dyn Storage, offset: u64, len: usize, what: &str) {
    let found = bytes(storage, offset, len);
    let stray = found.iter().position(|byte| *byte != 0);
    assert_eq!(
        stray, None,
        "{what}: {len} bytes at {offset:#x} read as zeros"
    );
}

/// Bytes that are never zero and differ with their place.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..)
        .take(len)
        .map(|position| {
            u8::try_from(position.wrapping_mul(0x9e37_79b9) >> 7 & 0xff).map_or(1, |byte| byte | 1)
        })
        .collect()
}

fn starts_as_zeros(storage: &dyn Storage) {
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

fn reads_past_the_end_give_zeros(storage: &dyn Storage) {
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

fn vectored_requests_equal_plain_ones(storage: &dyn Storage) {
    reach(storage);
    let data = pattern(3, 9000);
    let (head, rest) = data.split_at(1);
    let (middle, tail) = rest.split_at(4999);
    let bufs = [head, &[], middle, tail].map(IoSlice::new);
    storage
        .write_vectored_at(&bufs, 4095)
        .expect("a vectored write succeeds");
    assert_eq!(
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

fn unaligned_writes_leave_their_neighbours(storage: &dyn Storage) {
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
        assert_eq!(
            bytes(storage, 0, 40_000),
            expected,
            "{len} bytes at {offset} and no others"
        );
    }
}

fn writes_past_the_end_grow(storage: &dyn Storage) {
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
    assert_eq!(bytes(storage, 100, 10), [1; 10]);
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

fn zeroed_ranges_read_as_zeros(storage: &dyn Storage) {
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
                assert_eq!(
                    bytes(storage, 0, 300_000),
                    data,
                    "a refused request did nothing"
                );
                continue;
            }
        }
        assert_eq!(
            bytes(storage, 0, 5000),
            data.get(..5000).unwrap_or_default()
        );
        assert_eq!(
            bytes(storage, 250_001, 49_999),
            data.get(250_001..).unwrap_or_default()
        );
    }
    assert_eq!(storage.len().expect("len"), len, "inside, the length stays");
}

fn zeroing_past_the_end_grows(storage: &dyn Storage) {
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
        assert_eq!(bytes(storage, 0, 2000), [9; 2000]);
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

fn discarded_ranges_read_as_zeros(storage: &dyn Storage) {
    reach(storage);
    let data = pattern(0, 300_000);
    storage.write_at(&data, 0).expect("a write succeeds");
    let len = storage.len().expect("len");
    match storage.discard(5000..250_001) {
        Ok(()) => assert_zeros(storage, 5000, 245_001, "a discarded range"),
        Err(error) => {
            assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}");
            assert_eq!(
                bytes(storage, 0, 300_000),
                data,
                "a refused request did nothing"
            );
            return;
        }
    }
    assert_eq!(
        bytes(storage, 0, 5000),
        data.get(..5000).unwrap_or_default()
    );
    assert_eq!(
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

fn a_cut_storage_grows_back_with_zeros(storage: &dyn Storage) {
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
        assert_eq!(
            bytes(storage, 0, kept),
            data.get(..kept).unwrap_or_default()
        );
        assert_zeros(storage, cut, 20_000 - kept, "what was cut off");
    }
}

fn extents_cover_and_tell_the_truth(storage: &dyn Storage) {
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

fn empty_requests_change_nothing(storage: &dyn Storage) {
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

fn huge_offsets_are_errors(storage: &dyn Storage) {
    let out_of_range = |result: Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            StorageErrorKind::OutOfRange,
            "{what}: {error}"
        );
    };
    let len = storage.len().expect("len");
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

fn disjoint_writers_do_not_disturb_each_other(storage: &dyn Storage) {
    const STEP: usize = 700;
    const ROUNDS: u64 = 120;
    reach(storage);
    // Neighbours share sectors and pages, and every fourth round grows or stays as the storage likes.
    std::thread::scope(|scope| {
        for lane in 0..4u64 {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let offset = (round * 4 + lane) * STEP as u64;
                    let data = pattern(offset, STEP);
                    storage.write_at(&data, offset).expect("a write succeeds");
                    assert_eq!(
                        bytes(storage, offset, STEP),
                        data,
                        "a writer reads its own bytes"
                    );
                }
            });
        }
    });
    let len = STEP * 4 * usize::try_from(ROUNDS).expect("small");
    assert_eq!(
        bytes(storage, 0, len),
        pattern(0, len),
        "all writes arrived"
    );
    if !growable(storage) {
        return;
    }
    std::thread::scope(|scope| {
        for lane in 0..4u64 {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let offset = (round * 4 + lane) * STEP as u64;
                    storage
                        .write_at(&pattern(offset, STEP), offset)
                        .expect("a write succeeds");
                }
            });
        }
    });
    assert_eq!(
        storage.len().expect("len"),
        len as u64,
        "concurrent growth is exact"
    );
    assert_eq!(
        bytes(storage, 0, len),
        pattern(0, len),
        "concurrent growth loses nothing"
    );
}

fn a_batch_equals_a_loop(storage: &dyn Storage) {
    reach(storage);
    let (page, odd) = (pattern(0, 4096), pattern(9, 777));
    let (head, tail) = page.split_at(1000);
    storage
        .write_at(&[1; 300], 500_000)
        .expect("a write succeeds");
    let mut ops = [
        Op::write(&page, 8192),
        Op::write(&odd, 100_001),
        Op::new(crate::Request::WriteVectored {
            bufs: vec![IoSlice::new(tail), IoSlice::new(head)],
            offset: 300_000,
        }),
        Op::write_zeroes(500_100..500_200, ZeroFlags::NONE),
        Op::write(&page, u64::MAX - 5),
    ];
    storage.submit(&mut ops);
    let failed: Vec<bool> = ops
        .iter()
        .map(|op| op.result().expect("each operation has a result").is_err())
        .collect();
    assert_eq!(
        failed,
        [false, false, false, false, true],
        "each operation has its own result"
    );

    let (mut first, mut second, mut zeroed) = (vec![0; 4096], vec![0; 777], vec![0; 300]);
    let (mut tail, mut head) = (vec![0; 3096], vec![0; 1000]);
    let mut ops = [
        Op::read(&mut first, 8192),
        Op::read(&mut second, 100_001),
        Op::read(&mut zeroed, 500_000),
        Op::new(crate::Request::ReadVectored {
            bufs: vec![IoSliceMut::new(&mut tail), IoSliceMut::new(&mut head)],
            offset: 300_000,
        }),
    ];
    storage.submit(&mut ops);
    for op in &mut ops {
        op.take_result()
            .expect("each operation has a result")
            .expect("a read succeeds");
    }
    assert_eq!(first, page, "what a batch wrote, a batch reads");
    assert_eq!([head, tail].concat(), page, "vectored, too");
    assert_eq!(second, odd, "all of it");
    assert_eq!(zeroed, [[1; 100], [0; 100], [1; 100]].concat(), "and zeros");
    assert_eq!(bytes(storage, 8192, 4096), page, "and a plain read agrees");
}

fn flushing_keeps_everything(storage: &dyn Storage) {
    reach(storage);
    storage.flush().expect("a flush of nothing succeeds");
    let data = pattern(0, 10_000);
    storage.write_at(&data, 77).expect("a write succeeds");
    storage.flush().expect("a flush succeeds");
    assert_eq!(bytes(storage, 77, 10_000), data);
    storage.flush().expect("a second flush succeeds");
}
