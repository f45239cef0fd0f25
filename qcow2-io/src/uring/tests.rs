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
