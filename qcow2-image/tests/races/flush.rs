use std::thread;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Operation, Pause, Storage};

use crate::rig::{Rig, assert_no_corruption, flush_in};

/// The smallest clusters and the widest refcounts: a block describes 64 clusters.
const CLUSTER: u64 = 512;

/// A flush that is stopped at `pause`, while others allocate so many clusters that refcount blocks and L2 tables have to be
/// made. No crash, then or later, may show a cluster before its refcount or its data, or lose what the flush covers.
fn others_allocate(pause: Pause, lazy: bool) {
    let create = CreateOptions::new(256 << 10)
        .cluster_size(CLUSTER)
        .refcount_bits(64)
        .lazy_refcounts(lazy);
    let rig = Rig::new(&create, Image::options());
    for number in 0..10 {
        rig.write(number * CLUSTER, 0xa1, 512);
    }
    let returned = thread::scope(|scope| {
        let pause = rig.store.arm(pause);
        let flush = flush_in(scope, &rig);
        pause.wait_until_stopped();
        for number in 10..210 {
            rig.write(number * CLUSTER, 0xb2, 512);
        }
        pause.release();
        flush.join().unwrap();
        rig.position()
    });
    for number in 210..220 {
        rig.write(number * CLUSTER, 0xc3, 512);
    }
    rig.flush();
    rig.each_crash(|moment, crashed| {
        if !lazy {
            assert_no_corruption(&**crashed, format_args!("crash after {moment} events"));
        }
        // An image that is dirty is recovered here, or refused.
        let image = Image::options().open(crashed.clone()).unwrap();
        let mut disk = vec![0; 220 * 512];
        image.read_at(&mut disk, 0).unwrap();
        for (number, block) in disk.chunks(512).enumerate() {
            let byte = match number {
                0..10 => 0xa1,
                10..210 => 0xb2,
                _ => 0xc3,
            };
            let there = block.iter().all(|found| *found == byte);
            let empty = block.iter().all(|found| *found == 0);
            let must_be_there = number < 10 && moment >= returned;
            assert!(
                there || empty && !must_be_there,
                "cluster {number} is {:#x} after {moment} events",
                block[0]
            );
        }
        image.close().unwrap();
        assert_no_corruption(&**crashed, format_args!("recovered after {moment} events"));
    });
    rig.finish();
}

#[test]
fn others_allocate_before_refcounts_are_written() {
    others_allocate(Pause::on(Operation::Write), false);
}

#[test]
fn others_allocate_once_refcounts_are_written() {
    others_allocate(Pause::on(Operation::Write).after_effect(), false);
}

#[test]
fn others_allocate_during_the_first_sync() {
    others_allocate(Pause::on(Operation::Flush), false);
}

#[test]
fn others_allocate_after_the_first_sync() {
    others_allocate(Pause::on(Operation::Flush).after_effect(), false);
}

#[test]
fn others_allocate_while_pointers_are_written() {
    others_allocate(Pause::on(Operation::Write).nth(2), false);
}

#[test]
fn others_allocate_during_the_last_sync() {
    others_allocate(Pause::on(Operation::Flush).nth(2), false);
}

#[test]
fn others_allocate_beside_lazy_refcounts() {
    others_allocate(Pause::on(Operation::Flush), true);
    others_allocate(Pause::on(Operation::Write).after_effect(), true);
}
