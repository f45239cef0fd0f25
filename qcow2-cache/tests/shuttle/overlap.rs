use std::sync::Arc;

use qcow2_cache::{Kinds, OverlapChecks, OverlapMap};
use qcow2_format::{Geometry, HostCluster, HostOffset};
use shuttle::thread;

use crate::explore::explore;

/// Entries that fill the first table as far as it gets filled.
const FULL: u64 = 512;

fn place(number: u64) -> HostOffset {
    HostOffset::new(number << 16)
}

fn filled() -> Arc<OverlapMap> {
    let geometry = Geometry::new(16, 4, false).unwrap();
    let map = OverlapMap::new(geometry, OverlapChecks::default());
    for number in 0..FULL - 2 {
        map.add(place(number), 1, Kinds::ACTIVE_L2).unwrap();
    }
    Arc::new(map)
}

/// Others add and remove while what stays is looked for.
fn look_while_others_change(map: &Arc<OverlapMap>, stays: [u64; 3]) {
    let adding = {
        let map = map.clone();
        thread::spawn(move || {
            for number in 1000..1003 {
                map.add(place(number), 1, Kinds::INACTIVE_L2).unwrap();
            }
        })
    };
    let removing = {
        let map = map.clone();
        thread::spawn(move || {
            map.add(place(2000), 1, Kinds::ACTIVE_L1).unwrap();
            map.remove(place(2000), 1, Kinds::ACTIVE_L1);
            map.add(place(stays[1]), 1, Kinds::BITMAP_DATA).unwrap();
        })
    };
    for number in stays {
        let kinds = map.kinds(HostCluster::new(number));
        assert!(kinds.intersection(Kinds::ACTIVE_L2) == Kinds::ACTIVE_L2);
        assert!(map.kinds(HostCluster::new(number + 5000)).is_empty());
    }
    adding.join().unwrap();
    removing.join().unwrap();
    assert!(map.kinds(HostCluster::new(2000)).is_empty());
    for number in 1000..1003 {
        assert_eq!(map.kinds(HostCluster::new(number)), Kinds::INACTIVE_L2);
    }
    let both = map.kinds(HostCluster::new(stays[1]));
    assert!(!both.intersection(Kinds::BITMAP_DATA).is_empty());
    assert!(!both.intersection(Kinds::ACTIVE_L2).is_empty());
}

#[test]
fn entries_are_found_while_the_table_grows() {
    explore(150, || look_while_others_change(&filled(), [3, 200, 509]));
}

#[test]
fn entries_are_found_while_the_table_is_tidied_up() {
    explore(150, || {
        let map = filled();
        for number in 100..500 {
            map.remove(place(number), 1, Kinds::ACTIVE_L2);
        }
        look_while_others_change(&map, [3, 50, 505]);
    });
}
