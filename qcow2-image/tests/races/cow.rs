use std::sync::Arc;
use std::thread;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Blocking, Memory, Operation, Pause};

use crate::rig::Rig;

const CLUSTER: usize = 65536;

fn pattern() -> Vec<u8> {
    (0..4 * CLUSTER)
        .map(|at| (at / 512 % 251) as u8 + 1)
        .collect()
}

/// Two first writes to one cluster over a backing file, the first stopped at `pause` of its own storage or the backing file's.
fn two_writers(extended: bool, below: bool, first: (u64, usize), second: (u64, usize)) {
    let backing = Arc::new(Blocking::new(Memory::from(pattern())));
    let create = CreateOptions::new(4 * CLUSTER as u64)
        .cluster_size(CLUSTER as u64)
        .extended_l2(extended)
        .backing_file("base.raw", "raw");
    let options = Image::options().backing(backing.clone());
    let rig = Rig::new(&create, options);
    thread::scope(|scope| {
        let pause = if below {
            backing.arm(Pause::on(Operation::Read))
        } else {
            rig.store.arm(Pause::on(Operation::Write))
        };
        let one = scope.spawn(|| rig.write(first.0, 0xf1, first.1));
        pause.wait_until_stopped();
        let two = scope.spawn(|| rig.write(second.0, 0xf2, second.1));
        // Others are not held up.
        rig.write(2 * CLUSTER as u64, 0xf3, 512);
        assert!(!one.is_finished());
        pause.release();
        one.join().unwrap();
        two.join().unwrap();
    });
    let mut expected = pattern();
    expected[first.0 as usize..][..first.1].fill(0xf1);
    expected[second.0 as usize..][..second.1].fill(0xf2);
    expected[2 * CLUSTER..][..512].fill(0xf3);
    assert!(rig.read(0, 4 * CLUSTER) == expected);
    rig.flush();
    // One cluster for both, and one for the other.
    let ends = [rig.host(0), rig.host(2 * CLUSTER as u64)];
    assert!(ends[0] != 0 && ends[1] != 0 && ends[0] != ends[1]);
    assert_eq!(rig.host(CLUSTER as u64), 0);
    rig.finish();
}

#[test]
fn both_halves_of_a_first_write_survive() {
    let (low, high) = ((0, CLUSTER / 2), (CLUSTER as u64 / 2, CLUSTER / 2));
    for extended in [false, true] {
        two_writers(extended, false, low, high);
        two_writers(extended, false, high, low);
    }
}

#[test]
fn small_first_writes_survive_and_the_rest_comes_from_below() {
    for extended in [false, true] {
        for below in [false, true] {
            two_writers(extended, below, (512, 512), (40_960, 1536));
            two_writers(extended, below, (3 * 512, 512), (4 * 512, 512));
        }
    }
}
