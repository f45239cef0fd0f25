//! Many requests at once, and flushes between them.

use std::io::{IoSlice, IoSliceMut};

use super::{bytes, growable, pattern, reach};
use crate::{Op, Storage, ZeroFlags};

pub(super) fn disjoint_writers_do_not_disturb_each_other(storage: &dyn Storage) {
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
                    assert_bytes!(
                        bytes(storage, offset, STEP),
                        data,
                        "a writer reads its own bytes"
                    );
                }
            });
        }
    });
    let len = STEP * 4 * usize::try_from(ROUNDS).expect("small");
    assert_bytes!(
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
    assert_bytes!(
        bytes(storage, 0, len),
        pattern(0, len),
        "concurrent growth loses nothing"
    );
}

pub(super) fn a_batch_equals_a_loop(storage: &dyn Storage) {
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
    assert_bytes!(bytes(storage, 8192, 4096), page, "and a plain read agrees");
}

pub(super) fn flushing_keeps_everything(storage: &dyn Storage) {
    reach(storage);
    storage.flush().expect("a flush of nothing succeeds");
    let data = pattern(0, 10_000);
    storage.write_at(&data, 77).expect("a write succeeds");
    storage.flush().expect("a flush succeeds");
    assert_bytes!(bytes(storage, 77, 10_000), data);
    storage.flush().expect("a second flush succeeds");
}
