//! What can't be seen from outside.

use super::*;
use crate::{FileOptions, StorageErrorKind};

fn uring(options: &FileOptions) -> Option<Uring> {
    let dir = tempfile::tempdir().unwrap();
    let options = options.clone().write(true).create(true);
    let file = match options.open(dir.path().join("disk")) {
        Ok(file) => file,
        Err(error) => {
            assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}");
            eprintln!("SKIPPED: {error}");
            return None;
        }
    };
    let uring = Uring::new(file);
    if !uring.is_active() {
        eprintln!("SKIPPED: the kernel gives no ring");
        return None;
    }
    Some(uring)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from(i % 251).unwrap() + 1)
        .collect()
}

/// A part of `memory` that direct I/O can use, `len` bytes long.
fn aligned(memory: &mut [u8], len: usize) -> &mut [u8] {
    let address = memory.as_ptr().addr();
    let start = address.next_multiple_of(4096) - address;
    &mut memory[start..start + len]
}

/// Runs operations in a ring alone, without the plain calls afterwards. Says which were completed.
fn run_in_ring(uring: &Uring, ops: &mut [Op<'_>]) -> Vec<bool> {
    uring.run_in_ring(ops);
    ops.iter()
        .map(|op| match op.result() {
            None => false,
            Some(result) => {
                assert!(result.is_ok(), "a ring reports no errors itself");
                true
            }
        })
        .collect()
}

#[test]
fn a_ring_moves_whole_reads_and_leaves_the_rest() {
    let Some(uring) = uring(&FileOptions::new()) else {
        return;
    };
    let bytes = pattern(10_000);
    uring.write_at(&bytes, 0).unwrap();
    let (mut inside, mut across, mut a, mut b) = ([0; 700], [0; 700], [0; 10], [0; 20]);
    let mut empty = [];
    let mut ops = [
        Op::read(&mut inside, 5000),
        Op::read(&mut across, 9700),
        Op::new(crate::Request::ReadVectored {
            bufs: vec![IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)],
            offset: 77,
        }),
        Op::write(&[1; 10], 9990),
        Op::read(&mut empty, 5),
        Op::write_zeroes(0..5, ZeroFlags::NONE),
        Op::discard(5..6),
    ];
    assert_eq!(
        run_in_ring(&uring, &mut ops),
        [true, false, true, false, false, false, false]
    );
    drop(ops);
    assert_eq!(inside, bytes[5000..5700]);
    assert_eq!([&a[..], &b[..]].concat(), bytes[77..107]);

    let mut ops = [Op::read(&mut inside, 0), Op::read(&mut across, 9700)];
    uring.submit(&mut ops);
    for op in &mut ops {
        op.take_result().unwrap().unwrap();
    }
    assert_eq!(across[..300], bytes[9700..]);
    assert_eq!(across[300..], [0; 400]);
}

#[test]
fn a_short_batch_takes_whole_reads_from_the_page_cache() {
    let Some(uring) = uring(&FileOptions::new()) else {
        return;
    };
    let bytes = pattern(10_000);
    uring.write_at(&bytes, 0).unwrap();
    let (mut inside, mut across, mut a, mut b) = ([0; 700], [0; 700], [0; 10], [0; 20]);
    let mut ops = [
        Op::read(&mut inside, 5000),
        Op::new(crate::Request::ReadVectored {
            bufs: vec![IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)],
            offset: 77,
        }),
        Op::read(&mut across, 9700),
        Op::write(&[1; 10], 9990),
    ];
    uring.run_now(&mut ops);
    let done = ops.each_ref().map(|op| op.result().is_some());
    drop(ops);
    // Just written, they are in the cache, unless the file system can't tell or the machine is short of memory.
    if done[0] {
        assert_eq!(inside, bytes[5000..5700]);
    }
    if done[1] {
        assert_eq!([&a[..], &b[..]].concat(), bytes[77..107]);
    }
    assert!(!done[2] && !done[3], "the end of the file, and a write");

    let (mut one, mut two) = ([0; 700], [0; 700]);
    let mut cold = [
        Op::read(&mut one, 9700),
        Op::read(&mut two, 9800),
        Op::read(&mut inside, 0),
    ];
    uring.run_now(&mut cold);
    assert!(
        cold.iter().all(|op| op.result().is_none()),
        "it is not asked again after two misses"
    );
}

#[test]
fn direct_writes_go_through_a_ring_too() {
    let Some(uring) = uring(&FileOptions::new().direct(true)) else {
        return;
    };
    let len = 8 << 12;
    let (mut memory, mut other) = (vec![0; len + 4096], vec![0; len + 4096]);
    let data = aligned(&mut memory, len);
    data.copy_from_slice(&pattern(len));
    let mut ops: Vec<Op<'_>> = (0..)
        .zip(data.chunks(4096))
        .map(|(page, chunk)| Op::write(chunk, page * 4096))
        .collect();
    ops.push(Op::write(&data[1..4097], 0));
    let ran = run_in_ring(&uring, &mut ops);
    assert_eq!(ran, [[true; 8].as_slice(), &[false]].concat());
    let back = aligned(&mut other, len);
    let mut ops: Vec<Op<'_>> = (0..)
        .zip(back.chunks_mut(4096))
        .map(|(page, chunk)| Op::read(chunk, page * 4096))
        .collect();
    assert_eq!(run_in_ring(&uring, &mut ops), [true; 8]);
    drop(ops);
    assert!(back == data);
}

#[test]
fn a_batch_longer_than_a_ring_goes_in_turns() {
    let Some(uring) = uring(&FileOptions::new()) else {
        return;
    };
    let count = 3 * ring::DEPTH + 5;
    let bytes = pattern(count * 100);
    uring.write_at(&bytes, 0).unwrap();
    let mut found = vec![0; bytes.len()];
    let mut ops: Vec<Op<'_>> = (0..)
        .zip(found.chunks_mut(100))
        .map(|(place, chunk)| Op::read(chunk, place * 100))
        .collect();
    assert_eq!(run_in_ring(&uring, &mut ops), vec![true; count]);
    drop(ops);
    assert!(found == bytes);
}

#[test]
fn after_a_failed_wait_nothing_is_under_way_and_plain_calls_go_on() {
    // Direct reads are the ones that are under way for a while.
    for direct in [true, false] {
        let Some(uring) = uring(&FileOptions::new().direct(direct)) else {
            continue;
        };
        let len = 32 << 12;
        let bytes = pattern(len);
        uring.write_at(&bytes, 0).unwrap();
        uring.flush().unwrap();
        match &mut *uring.rings[0].lock().unwrap() {
            Place::Ready(ring) => ring.break_wait = true,
            other => panic!("a new ring is ready: {other:?}"),
        }
        let mut memory = vec![0; len + 4096];
        let found = aligned(&mut memory, len);
        let mut ops: Vec<Op<'_>> = (0..)
            .zip(found.chunks_mut(4096))
            .map(|(page, chunk)| Op::read(chunk, page * 4096))
            .collect();
        // The transfers were taken, and so they are complete, for all that the wait failed.
        assert_eq!(run_in_ring(&uring, &mut ops), [true; 32]);
        assert!(matches!(*uring.rings[0].lock().unwrap(), Place::Refused));
        drop(ops);
        assert!(found == bytes);

        found.fill(0);
        let mut ops: Vec<Op<'_>> = (0..)
            .zip(found.chunks_mut(4096))
            .map(|(page, chunk)| Op::read(chunk, page * 4096))
            .collect();
        uring.submit(&mut ops);
        for mut op in ops {
            op.take_result().unwrap().unwrap();
        }
        assert!(found == bytes);
    }
}

#[test]
fn a_batch_that_finds_no_free_ring_goes_by_plain_calls() {
    let Some(uring) = uring(&FileOptions::new()) else {
        return;
    };
    uring.write_at(&pattern(100), 0).unwrap();
    let taken: Vec<_> = std::iter::from_fn(|| uring.free_place()).collect();
    assert_eq!(taken.len(), uring.rings.len());
    let (mut a, mut b) = ([0; 50], [0; 50]);
    let mut ops = [Op::read(&mut a, 0), Op::read(&mut b, 50)];
    assert_eq!(run_in_ring(&uring, &mut ops), [false, false]);
    uring.submit(&mut ops);
    drop((ops, taken));
    assert_eq!([a, b].concat(), pattern(100));
}

#[test]
fn an_old_result_is_no_new_one() {
    let Some(uring) = uring(&FileOptions::new()) else {
        return;
    };
    let mut buf = [0; 10];
    let mut ops = [
        Op::read(&mut buf, 0),
        Op::write(&[1; 10], u64::MAX - 3),
        Op::write(&[1; 10], 0),
    ];
    for op in &mut ops {
        op.complete(Ok(()));
    }
    uring.submit(&mut ops);
    let failed: Vec<bool> = ops.iter().map(|op| op.result().unwrap().is_err()).collect();
    assert_eq!(failed, [false, true, false]);
}

/// Files with two helpers, be it as if they lay in memory, or not.
fn helped(bytes: &[u8]) -> [Uring; 2] {
    [true, false].map(|in_memory| {
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions::new().write(true).create(true);
        let file = options.open(dir.path().join("disk")).unwrap();
        file.write_at(bytes, 0).unwrap();
        let mut uring = if in_memory {
            Uring::inactive(file)
        } else {
            Uring::new(file)
        };
        uring.is_in_memory |= in_memory;
        let uring = uring.start_helpers(2);
        assert_eq!(uring.helpers(), 2);
        uring
    })
}

#[test]
fn with_helpers_each_operation_has_its_own_result() {
    let bytes = pattern(100_000);
    for uring in helped(&bytes) {
        let lens = [1, 512, 4096, 700, 20_000, 0, 3000, 65];
        let mut bufs: Vec<Vec<u8>> = lens
            .iter()
            .cycle()
            .take(48)
            .map(|len| vec![9; *len])
            .collect();
        let places: Vec<u64> = (0..48).map(|index| index * 1999).collect();
        let (mut far, mut vectored) = ([9; 10], [[9; 300], [9; 300]]);
        let mut ops: Vec<Op<'_>> = bufs
            .iter_mut()
            .zip(&places)
            .map(|(buf, place)| Op::read(buf, *place))
            .collect();
        ops.insert(7, Op::read(&mut far, u64::MAX - 5));
        ops.insert(20, Op::write(&[200; 50], 200_000));
        ops.insert(
            30,
            Op::write_zeroes(u64::MAX - 5..u64::MAX, ZeroFlags::NONE),
        );
        ops.push(Op::new(Request::ReadVectored {
            bufs: vectored
                .iter_mut()
                .map(|buf| IoSliceMut::new(buf))
                .collect(),
            offset: 99_500,
        }));
        uring.submit(&mut ops);
        for (index, op) in ops.iter_mut().enumerate() {
            let result = op.take_result().unwrap();
            assert_eq!(
                result.is_err(),
                [7, 30].contains(&index),
                "operation {index}"
            );
        }
        drop(ops);
        for (buf, place) in bufs.iter().zip(places) {
            let mut expected = vec![0; buf.len()];
            uring.read_at(&mut expected, place).unwrap();
            assert!(*buf == expected, "the read at {place}");
        }
        let all = vectored.concat();
        assert_eq!(all[..500], bytes[99_500..]);
        assert_eq!(all[500..], [0; 100]);
        let mut written = [0; 50];
        uring.read_at(&mut written, 200_000).unwrap();
        assert_eq!(written, [200; 50]);
    }
}

#[test]
fn with_helpers_a_cold_batch_is_shared_no_more_until_one_is_warm() {
    let [_, uring] = helped(&pattern(40_000));
    let run = |place: u64| {
        let mut bufs = [[0; 100]; 16];
        let mut ops: Vec<Op<'_>> = bufs.iter_mut().map(|buf| Op::read(buf, place)).collect();
        uring.submit(&mut ops);
        assert!(ops.iter().all(|op| matches!(op.result(), Some(Ok(())))));
        bufs
    };
    // Past the end the page cache can't give all.
    assert_eq!(run(39_950)[15][50..], [0; 50]);
    assert!(!uring.is_warm.load(Ordering::Relaxed));
    let mut buf = [0; 100];
    let found = uring.file.read_now(&mut Request::Read {
        buf: &mut buf,
        offset: 0,
    });
    assert_eq!(run(0)[3], pattern(100)[..]);
    // Unless the file system can't tell what it has.
    assert_eq!(uring.is_warm.load(Ordering::Relaxed), found);
}

#[test]
fn threads_share_a_file_and_its_helpers() {
    const PAGE: usize = 512;
    for uring in helped(&[]) {
        thread::scope(|scope| {
            for lane in 0..4u8 {
                let uring = &uring;
                scope.spawn(move || {
                    for round in 0..20u8 {
                        let data = [lane * 20 + round + 1; PAGE];
                        let place = |page: u64| (page * 4 + u64::from(lane)) * PAGE as u64;
                        let mut found = [[0; PAGE]; 16];
                        let mut ops: Vec<Op<'_>> =
                            (0..16).map(|page| Op::write(&data, place(page))).collect();
                        uring.submit(&mut ops);
                        assert!(ops.iter().all(|op| matches!(op.result(), Some(Ok(())))));
                        let mut ops: Vec<Op<'_>> = (0..)
                            .zip(&mut found)
                            .map(|(page, buf)| Op::read(buf, place(page)))
                            .collect();
                        uring.submit(&mut ops);
                        assert!(ops.iter().all(|op| matches!(op.result(), Some(Ok(())))));
                        assert_eq!(found, [data; 16]);
                    }
                });
            }
        });
        let file = uring.into_inner();
        assert_eq!(file.len().unwrap(), 64 * PAGE as u64);
    }
}

#[test]
fn helpers_are_fewer_than_processors_and_none_for_direct_files() {
    let make = |direct| {
        let uring = uring(&FileOptions::new().direct(direct))?;
        Some(uring.with_helpers(1000).helpers())
    };
    let most = helper::MAX_HELPERS.min(processors() - 1);
    assert!(make(false).is_none_or(|count| count == most));
    assert!(make(true).is_none_or(|count| count == 0));
}
