use std::thread;

use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ImageError};
use qcow2_io::{Memory, Op, Operation, Pause, Storage, ZeroFlags};

use crate::rig::{Rig, assert_sound, flush_in};

const CLUSTER: u64 = 4096;
const LEN: usize = CLUSTER as usize;

fn rig() -> Rig {
    let create = CreateOptions::new(256 * CLUSTER).cluster_size(CLUSTER);
    Rig::new(&create, Image::options())
}

/// Clusters of `rig` with one byte each, and where the first lies.
fn with_data(rig: &Rig) -> u64 {
    rig.write(0, 0xa1, LEN);
    rig.flush();
    rig.host(0)
}

/// Guest clusters without neighbours: nothing asks for a place beside that of the one before.
fn others() -> impl Iterator<Item = u64> {
    (1..20).map(|number| number * 2 * CLUSTER)
}

/// Writes clusters, `len` bytes at `skip` of each, until one lies at `place`; gives its guest offset.
fn reuse(rig: &Rig, place: u64, skip: u64, len: usize) -> u64 {
    for number in 50..58 {
        let at = number * 2 * CLUSTER;
        rig.write(at + skip, 0xc3, len);
        rig.flush();
        if rig.host(at) == place {
            return at;
        }
    }
    panic!("the cluster at {place:#x} is not used again");
}

#[test]
fn a_hole_is_never_punched_into_a_cluster_that_was_reused() {
    let rig = rig();
    let place = with_data(&rig);
    rig.image.discard(0..CLUSTER).unwrap();
    thread::scope(|scope| {
        let range = place..place + CLUSTER;
        let punch = rig.store.arm(Pause::on(Operation::Discard).within(range));
        let flush = flush_in(scope, &rig);
        punch.wait_until_stopped();
        // As long as the hole isn't punched, no one gets the cluster.
        others().for_each(|at| rig.write(at, 0xb2, LEN));
        rig.flush();
        others().for_each(|at| assert_ne!(rig.host(at), place));
        punch.release();
        flush.join().unwrap();
    });
    let again = reuse(&rig, place, 0, LEN);
    others().for_each(|at| assert_eq!(rig.read(at, LEN), [0xb2; LEN]));
    assert_eq!(rig.read(again, LEN), [0xc3; LEN]);
    assert_eq!(rig.read(0, LEN), [0; LEN]);
    rig.finish();
}

/// How a guest gives a cluster up.
fn give_up(rig: &Rig, by_zeroes: bool) {
    if by_zeroes {
        let flags = ZeroFlags::MAY_UNMAP;
        rig.image.write_zeroes(0..CLUSTER, flags).unwrap();
    } else {
        rig.image.discard(0..CLUSTER).unwrap();
    }
}

/// A reader that is stopped in the storage while the cluster that it found changes owners.
fn slow_reader(by_zeroes: bool, read: impl Fn(&Rig, &mut [u8]) + Sync) {
    let rig = rig();
    let place = with_data(&rig);
    thread::scope(|scope| {
        let range = place..place + CLUSTER;
        let pause = rig.store.arm(Pause::on(Operation::Read).within(range));
        let reader = scope.spawn(|| {
            let mut bytes = [0x5a; LEN];
            read(&rig, &mut bytes);
            bytes
        });
        pause.wait_until_stopped();
        give_up(&rig, by_zeroes);
        rig.flush();
        for at in others() {
            rig.write(at, 0xb2, LEN);
            rig.flush();
            assert_ne!(rig.host(at), place, "a reader is still there");
        }
        pause.release();
        assert_eq!(reader.join().unwrap(), [0xa1; LEN]);
    });
    // Now that the reader is gone, the cluster is free.
    rig.flush();
    let again = reuse(&rig, place, 0, LEN);
    assert_eq!(rig.read(again, LEN), [0xc3; LEN]);
    rig.finish();
}

#[test]
fn a_slow_reader_never_sees_the_next_owner_of_a_discarded_cluster() {
    slow_reader(false, |rig, bytes| rig.image.read_at(bytes, 0).unwrap());
}

#[test]
fn a_slow_reader_never_sees_the_next_owner_of_a_zeroed_cluster() {
    slow_reader(true, |rig, bytes| rig.image.read_at(bytes, 0).unwrap());
}

#[test]
fn a_slow_batch_never_sees_the_next_owner() {
    slow_reader(false, |rig, bytes| {
        let (first, rest) = bytes.split_at_mut(512);
        let mut ops = [Op::read(first, 0), Op::read(rest, 512)];
        rig.image.submit(&mut ops);
        for op in &mut ops {
            op.take_result().unwrap().unwrap();
        }
    });
}

/// A writer that is stopped in the storage while the cluster that it found changes owners.
fn slow_writer(by_zeroes: bool, write: impl Fn(&Rig) + Sync) {
    let rig = rig();
    let place = with_data(&rig);
    thread::scope(|scope| {
        let range = place..place + CLUSTER;
        let pause = rig.store.arm(Pause::on(Operation::Write).within(range));
        let writer = scope.spawn(|| write(&rig));
        pause.wait_until_stopped();
        give_up(&rig, by_zeroes);
        rig.flush();
        for at in others() {
            rig.write(at, 0xb2, LEN);
            rig.flush();
            assert_ne!(rig.host(at), place, "a writer is still there");
        }
        pause.release();
        writer.join().unwrap();
    });
    rig.flush();
    // The late write left its bytes in a free cluster; they must not show around a small write.
    let again = reuse(&rig, place, 1024, 512);
    let mut expected = [0; LEN];
    expected[1024..1536].fill(0xc3);
    assert_eq!(rig.read(again, LEN), expected);
    others().for_each(|at| assert_eq!(rig.read(at, LEN), [0xb2; LEN]));
    assert_eq!(rig.read(0, LEN), [0; LEN]);
    rig.finish();
}

#[test]
fn a_slow_writer_never_hits_the_next_owner_of_a_discarded_cluster() {
    slow_writer(false, |rig| rig.write(512, 0xd4, 1024));
}

#[test]
fn a_slow_writer_never_hits_the_next_owner_of_a_zeroed_cluster() {
    slow_writer(true, |rig| rig.write(512, 0xd4, 1024));
}

#[test]
fn a_slow_batch_of_writes_never_hits_the_next_owner() {
    slow_writer(false, |rig| {
        let mut ops = [Op::write(&[0xd4; 512], 0), Op::write(&[0xd5; 512], 512)];
        rig.image.submit(&mut ops);
        for op in &mut ops {
            op.take_result().unwrap().unwrap();
        }
    });
}

#[test]
fn a_disk_is_not_cut_under_a_slow_reader() {
    let rig = rig();
    let place = with_data(&rig);
    thread::scope(|scope| {
        let range = place..place + CLUSTER;
        let pause = rig.store.arm(Pause::on(Operation::Read).within(range));
        let reader = scope.spawn(|| rig.read(0, LEN));
        pause.wait_until_stopped();
        let cut = scope.spawn(|| rig.image.set_len(0).unwrap());
        // Whether or not the cut has begun, it waits for the reader.
        assert!(!cut.is_finished());
        pause.release();
        assert_eq!(reader.join().unwrap(), [0xa1; LEN]);
        cut.join().unwrap();
    });
    assert_eq!(rig.image.virtual_size(), 0);
    rig.image.set_len(256 * CLUSTER).unwrap();
    assert_eq!(rig.read(0, LEN), [0; LEN]);
    rig.finish();
}

/// Sets the refcount of the cluster at `host`, 16 bits wide and in the first block, to 0.
fn lose_refcount(memory: &Memory, host: u64) {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    memory
        .write_at(&[0, 0], block + host / CLUSTER * 2)
        .unwrap();
}

#[test]
fn a_live_l2_table_is_not_handed_out_even_if_its_refcount_is_lost() {
    let rig = rig();
    with_data(&rig);
    let table = {
        let header = rig.image.header();
        let mut bytes = [0; 8];
        let at = header.l1_table_offset.get();
        rig.memory().read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    };
    let memory = Memory::from(rig.finish());
    lose_refcount(&memory, table);

    let rig = Rig::over(memory, Image::options());
    let before = rig.memory().to_vec().unwrap();
    let error = rig.image.write_at(&[1; LEN], 2 * CLUSTER).unwrap_err();
    assert!(rig.image.is_poisoned(), "{error}");
    assert_eq!(rig.read(0, LEN), [0xa1; LEN]);
    let Rig { image, store, .. } = rig;
    assert!(matches!(image.close(), Err(ImageError::Metadata(_))));
    let after = store.get_ref().get_ref().to_vec().unwrap();
    let (from, to) = (table as usize, (table + CLUSTER) as usize);
    assert_eq!(before[from..to], after[from..to]);
    // The mark keeps others from writing.
    let marked = std::sync::Arc::new(Memory::from(after));
    let error = Image::options().open(marked).unwrap_err();
    assert!(matches!(error, ImageError::MarkedCorrupt), "{error}");
}

#[test]
fn l2_tables_that_come_and_go_are_never_shared() {
    let create = CreateOptions::new(1 << 20).cluster_size(512);
    let rig = Rig::new(&create, Image::options());
    // A table maps 64 clusters.
    let table = 64 * 512;
    for round in 0..20_u8 {
        for number in 0..32 {
            rig.write(number * table + u64::from(round) * 512, round + 1, 512);
        }
        if round % 3 == 0 {
            rig.flush();
        }
        rig.image.set_len(5 * table + 100 * 512).unwrap();
        rig.image.set_len(1 << 20).unwrap();
        for number in 0..32 {
            let offset = number * table + u64::from(round) * 512;
            let byte = if offset < 5 * table + 100 * 512 {
                round + 1
            } else {
                0
            };
            assert_eq!(
                rig.read(offset, 512),
                [byte; 512],
                "table {number} in {round}"
            );
        }
        rig.flush();
        assert_sound(rig.memory());
    }
    rig.finish();
}
