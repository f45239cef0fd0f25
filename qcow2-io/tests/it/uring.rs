use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use qcow2_io::{File, FileOptions, Op, Storage, StorageErrorKind, Uring, conformance};

use crate::model::{judge, step};

fn file(options: &FileOptions) -> File {
    let dir = tempfile::tempdir().unwrap();
    let options = options.clone().write(true).create(true);
    options.open(dir.path().join("disk")).unwrap()
}

/// Says so where the kernel refuses; what follows then tests plain calls.
fn uring(options: &FileOptions) -> Uring {
    let uring = Uring::new(file(options));
    if !uring.is_active() {
        eprintln!("SKIPPED: no ring for a file of this file system, plain calls instead");
    }
    uring
}

#[test]
fn a_file_with_rings_conforms() {
    conformance::run(|| Box::new(uring(&FileOptions::new())));
}

#[test]
fn a_direct_file_with_rings_conforms() {
    if crate::direct_io_works() {
        conformance::run(|| Box::new(uring(&FileOptions::new().direct(true))));
    }
}

#[test]
fn a_file_whose_rings_were_refused_conforms() {
    let make = || Uring::inactive(file(&FileOptions::new()));
    assert!(!make().is_active());
    conformance::run(|| Box::new(make()));
}

#[test]
fn a_file_with_helpers_conforms() {
    conformance::run(|| Box::new(uring(&FileOptions::new()).with_helpers(2)));
    let make = || Uring::inactive(file(&FileOptions::new())).with_helpers(2);
    conformance::run(|| Box::new(make()));
}

#[test]
fn a_dropped_ring_leaves_no_lock_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let options = FileOptions::new().write(true).create(true);
    for _ in 0..50 {
        // A lock of the one before would make this fail.
        let uring = Uring::new(options.open(&path).unwrap());
        uring.write_at(&[1; 8192], 0).unwrap();
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        uring.submit(&mut [Op::read(&mut a, 0), Op::read(&mut b, 4096)]);
        assert_eq!((a, b), ([1; 4096], [1; 4096]));
        let file = uring.into_inner();
        assert_eq!(file.len().unwrap(), 8192);
    }
}

#[test]
fn a_read_only_file_refuses_writes_of_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [5; 1000]).unwrap();
    let uring = Uring::new(File::open(&path).unwrap());
    let mut buf = [0; 1000];
    let mut ops = [Op::read(&mut buf, 0), Op::write(&[1; 10], 0)];
    uring.submit(&mut ops);
    ops[0].take_result().unwrap().unwrap();
    let error = ops[1].take_result().unwrap().unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::ReadOnly);
    assert_eq!(error.path(), Some(path.as_path()));
    assert_eq!(buf, [5; 1000]);
}

#[test]
fn threads_submit_at_once() {
    const PAGE: usize = 4096;
    let uring = uring(&FileOptions::new()).with_helpers(1);
    let completed = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for lane in 0..4u8 {
            let (uring, completed) = (&uring, &completed);
            scope.spawn(move || {
                let place = |page: u64| (page * 4 + u64::from(lane)) * PAGE as u64;
                let data = [lane + 1; PAGE];
                for _ in 0..10 {
                    let mut ops: Vec<Op<'_>> =
                        (0..16).map(|page| Op::write(&data, place(page))).collect();
                    uring.submit(&mut ops);
                    let mut found = vec![0; 16 * PAGE];
                    let mut reads: Vec<Op<'_>> = (0..)
                        .zip(found.chunks_mut(PAGE))
                        .map(|(page, chunk)| Op::read(chunk, place(page)))
                        .collect();
                    uring.submit(&mut reads);
                    for mut op in ops.into_iter().chain(reads) {
                        op.take_result().unwrap().unwrap();
                        completed.fetch_add(1, Ordering::Relaxed);
                    }
                    assert!(found.iter().all(|byte| *byte == lane + 1));
                }
            });
        }
    });
    assert_eq!(completed.into_inner(), 4 * 10 * 32);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_with_rings_equals_the_model(
        direct: bool,
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let options = FileOptions::new().direct(direct && crate::direct_io_works());
        judge(&uring(&options), &steps);
    }
}
