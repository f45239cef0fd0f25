use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Add(u64, u64, bool),
    Run(u64, u64, u64),
}

fn cluster() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..200_u64,
        4000..4300_u64,
        Just(1 << 40),
        (1_u64 << 37)..(1 << 37) + 50
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (
            cluster(),
            prop_oneof![Just(1), 1..4_u64, Just(300)],
            any::<bool>()
        )
            .prop_map(|(c, w, p)| Step::Add(c, w, p)),
        (
            cluster(),
            1..200_u64,
            prop_oneof![Just(1), 2..4_u64, Just(260)]
        )
            .prop_map(|(c, n, w)| Step::Run(c, n, w)),
    ]
}

/// What a cluster is in the plain model: references, exclusive owners, packed owners.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
struct Plain {
    weight: u64,
    exclusive: u64,
    packed: u64,
}

proptest! {
    #[test]
    fn the_map_agrees_with_a_plain_one_however_it_is_divided(
        steps in prop::collection::vec((0..3_usize, step()), 1..60),
    ) {
        let mut model = BTreeMap::<u64, Plain>::new();
        let mut maps = [RefMap::new(5000), RefMap::new(5000), RefMap::new(5000)];
        for (worker, step) in steps {
            match step {
                Step::Add(cluster, weight, packed) => {
                    let sharing = if packed { Sharing::Packed } else { Sharing::Exclusive };
                    if weight == 1 && !packed && cluster % 2 == 0 {
                        maps[worker].add_later(cluster);
                    } else if packed && cluster % 2 == 0 {
                        maps[worker].add_packed(cluster, weight);
                    } else {
                        maps[worker].add(cluster, weight, sharing);
                    }
                    let plain = model.entry(cluster).or_default();
                    plain.weight += weight;
                    if packed { plain.packed += 1 } else { plain.exclusive += 1 }
                }
                Step::Run(first, count, weight) => {
                    maps[worker].add_run(first, count, weight);
                    for cluster in first..first + count {
                        let plain = model.entry(cluster).or_default();
                        plain.weight += weight;
                        plain.exclusive += 1;
                    }
                }
            }
        }
        let [a, b, c] = maps;
        let mut map = RefMap::new(5000);
        map.merge(a);
        map.merge(b);
        map.merge(c);
        for (cluster, plain) in &model {
            prop_assert_eq!(map.weight(*cluster), plain.weight, "cluster {}", cluster);
        }
        for cluster in 0..5000 {
            prop_assert_eq!(map.is_seen(cluster), model.contains_key(&cluster));
        }
        let conflicts: Vec<u64> = map.conflicts().collect();
        let expected: Vec<u64> = model
            .iter()
            .filter(|(_, p)| p.exclusive > 1 || (p.exclusive > 0 && p.packed > 0))
            .map(|(c, _)| *c)
            .collect();
        prop_assert_eq!(conflicts, expected);
        for (cluster, plain) in &model {
            let mixed = plain.exclusive == 1 && plain.packed > 0;
            prop_assert_eq!(map.is_mixed(*cluster), mixed, "cluster {}", cluster);
        }
        let mut pages: Vec<u64> = model.keys().map(|c| c / PAGE_CLUSTERS).collect();
        pages.dedup();
        let end = model.keys().next_back().map_or(0, |last| last + 1);
        prop_assert_eq!(map.end(), end);
        let mut walked = Vec::new();
        let mut next = 0;
        while let Some(page) = map.next_page(next, u64::MAX) {
            walked.push(page);
            next = page + 1;
        }
        prop_assert_eq!(walked, pages);
    }
}

#[test]
fn a_mask_covers_exactly_its_bits() {
    assert_eq!(mask(0, 64), u64::MAX);
    assert_eq!(mask(3, 5), 0b11000);
    assert_eq!(mask(63, 64), 1 << 63);
    assert_eq!(mask(7, 7), 0);
}
