use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use qcow2_image::Monitor;
use qcow2_image::compare::{CompareError, CompareOptions, Difference, Side, compare};
use qcow2_image::create::CreateOptions;
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage, ZeroFlags};

use crate::rig::{Folder, content, create, is_available, memory, open, options, sources};

const LEN: usize = (2 << 20) + 512;

#[test]
fn disks_of_all_kinds_with_the_same_bytes_are_the_same() {
    let bytes = content(LEN, 31);
    let disks = sources(&bytes);
    let mut longer = bytes.clone();
    longer.resize(LEN + 70_000, 0);
    let longer = memory(&longer);
    for (number, (name, first)) in disks.iter().enumerate() {
        for (other, second) in &disks {
            let options = CompareOptions::new()
                .threads([1, 3][number % 2])
                .chunk(50_000);
            let found = compare(first, second, &options).unwrap();
            assert_eq!(found.difference, None, "{name} and {other}");
        }
        let found = compare(first, &longer, &CompareOptions::new()).unwrap();
        assert_eq!(found.difference, None, "{name}");
        assert_eq!(
            (found.first_len, found.second_len),
            (LEN as u64, LEN as u64 + 70_000)
        );
        let strict = CompareOptions::new().strict(true);
        let found = compare(&longer, first, &strict).unwrap();
        assert_eq!(found.difference, Some(Difference::Size));
        assert_eq!(found.read_bytes, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_first_difference_is_found(
        seed in 0_u64..1000,
        changes in proptest::collection::vec((0..LEN, 1_u8..), 0..4),
        cut in prop_oneof![Just(0_usize), 1..100_000_usize],
        threads in 1_usize..4,
        pair in (0_usize..8, 0_usize..8),
    ) {
        let bytes = content(LEN, seed);
        let mut other = bytes.clone();
        for (at, by) in &changes {
            other[*at] = other[*at].wrapping_add(*by);
        }
        other.truncate(LEN - cut);
        let shown = |index: usize| other.get(index).copied().unwrap_or(0);
        let expected = (0..LEN).find(|index| bytes[*index] != shown(*index));
        let expected = expected.map(|index| Difference::Content { offset: index as u64 });
        let first = if pair.0 % 2 == 0 { memory(&bytes) } else { Memory::from(bytes.clone()) };
        let second = if pair.1 % 2 == 0 { memory(&other) } else { Memory::from(other.clone()) };
        let options = CompareOptions::new().threads(threads).chunk(20_000);
        let found = compare(&first, &second, &options).unwrap();
        prop_assert_eq!(found.difference, expected);
        let found = compare(&second, &first, &options).unwrap();
        prop_assert_eq!(found.difference, expected);
    }
}

#[test]
fn allocation_counts_if_that_is_asked_for() {
    let image = || open(&create(&CreateOptions::new(1 << 24)));
    let (first, second) = (image(), image());
    for disk in [&first, &second] {
        disk.write_at(&[5; 100], 1 << 20).unwrap();
    }
    let strict = CompareOptions::new().strict(true);
    let found = compare(&first, &second, &strict).unwrap();
    assert_eq!(found.difference, None);
    // Zeros that are stored.
    second.write_at(&[0; 100], 1 << 22).unwrap();
    let found = compare(&first, &second, &strict).unwrap();
    assert_eq!(
        found.difference,
        Some(Difference::Allocation { offset: 1 << 22 })
    );
    let found = compare(&first, &second, &CompareOptions::new()).unwrap();
    assert_eq!(found.difference, None);
    // Zeros that are noted.
    first.write_at(&vec![1; 1 << 20], 1 << 21).unwrap();
    first
        .write_zeroes(1 << 21..3 << 20, ZeroFlags::NONE)
        .unwrap();
    let found = compare(&first, &second, &strict).unwrap();
    assert_eq!(
        found.difference,
        Some(Difference::Allocation { offset: 1 << 21 })
    );
    // Content that differs before is told first.
    second.write_at(&[6], (1 << 20) + 7).unwrap();
    let found = compare(&first, &second, &strict).unwrap();
    assert_eq!(
        found.difference,
        Some(Difference::Content {
            offset: (1 << 20) + 7
        })
    );
}

#[test]
fn nothing_is_read_where_both_have_zeros() {
    let image = || open(&create(&CreateOptions::new(1 << 50).cluster_size(2 << 20)));
    let (first, second) = (image(), image());
    first.write_at(&[1], 1 << 40).unwrap();
    second.write_at(&[0], 1 << 41).unwrap();
    let found = compare(&first, &second, &CompareOptions::new()).unwrap();
    assert_eq!(
        found.difference,
        Some(Difference::Content { offset: 1 << 40 })
    );
    first.write_at(&[0], 1 << 40).unwrap();
    let found = compare(&first, &second, &CompareOptions::new()).unwrap();
    assert_eq!((found.difference, found.read_bytes), (None, 4 << 20));
}

#[test]
fn the_side_that_fails_is_named_with_the_place() {
    let bytes = vec![7; LEN];
    for threads in [1, 4] {
        let options = CompareOptions::new().threads(threads);
        for side in [Side::First, Side::Second] {
            let faulty = Faulty::new(Memory::from(bytes.clone()));
            let sound = Memory::from(bytes.clone());
            faulty.add(
                Fault::on(Operation::Read)
                    .within(1 << 20..(1 << 20) + 1)
                    .forever(),
            );
            let compared = || match side {
                Side::First => compare(&faulty, &sound, &options),
                Side::Second => compare(&sound, &faulty, &options),
            };
            let error = compared().unwrap_err();
            let CompareError::Storage {
                side: found,
                offset,
                len,
                ..
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(found, side);
            assert!((offset..offset + len).contains(&(1 << 20)));
            // What differs before counts.
            sound.write_at(&[8], 1000).unwrap();
            let difference = compared().unwrap().difference;
            assert_eq!(difference, Some(Difference::Content { offset: 1000 }));

            faulty.add(Fault::on(Operation::Extents).forever());
            let error = compared().unwrap_err();
            assert!(
                matches!(error, CompareError::Storage { side: found, offset: 0, .. } if found == side)
            );
        }
    }
    let error = compare(
        &Memory::new(),
        &Memory::new(),
        &CompareOptions::new().chunk(1),
    );
    assert!(matches!(error, Err(CompareError::Chunk { value: 1 })));
}

#[derive(Default)]
struct Impatient {
    pieces: AtomicU64,
    last: Mutex<u64>,
    ends_after: u64,
}

impl Monitor for Impatient {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total && total == LEN as u64);
        self.pieces.fetch_add(1, Ordering::Relaxed);
        let mut last = self.last.lock().unwrap();
        *last = done.max(*last);
    }
    fn is_cancelled(&self) -> bool {
        self.pieces.load(Ordering::Relaxed) >= self.ends_after
    }
}

#[test]
fn a_comparison_can_be_watched_and_cancelled() {
    let bytes = content(LEN, 33);
    let (first, second) = (memory(&bytes), Memory::from(bytes));
    let patient = Impatient {
        ends_after: u64::MAX,
        ..Impatient::default()
    };
    let options = CompareOptions::new().threads(3).chunk(4096);
    compare(&first, &second, &options.monitor(&patient)).unwrap();
    assert_eq!(*patient.last.lock().unwrap(), LEN as u64);
    let monitor = Impatient {
        ends_after: 5,
        ..Impatient::default()
    };
    let error = compare(&first, &second, &options.monitor(&monitor)).unwrap_err();
    assert!(matches!(error, CompareError::Cancelled), "{error}");
}

#[test]
fn qemu_finds_the_same_differences() {
    if !is_available("differences that qemu-img compare finds") {
        return;
    }
    let folder = Folder::new();
    let bytes = content(LEN, 34);
    folder.save("a.raw", &memory(&bytes));
    folder.img("convert -f raw -O qcow2 a.raw a.qcow2");
    let mut other = bytes.clone();
    other[1_300_000] ^= 1;
    folder.save("b.raw", &memory(&other));
    folder.img("convert -f raw -O qcow2 -o cluster_size=512 b.raw b.qcow2");
    let open = |name: &str| {
        options()
            .read_only(true)
            .open_path(folder.path(name))
            .unwrap()
    };
    let raw = |name: &str| qcow2_io::File::open(folder.path(name)).unwrap();
    let options = CompareOptions::new();
    let found = compare(&open("a.qcow2"), &raw("a.raw"), &options).unwrap();
    assert_eq!(found.difference, None);
    for (first, second) in [("a", "b"), ("b", "a")] {
        let (first, second) = (format!("{first}.qcow2"), format!("{second}.raw"));
        let said = folder.img_fails(&format!("compare -f qcow2 -F raw {first} {second}"));
        let found = compare(&open(&first), &raw(&second), &options).unwrap();
        let Some(Difference::Content { offset }) = found.difference else {
            panic!("{found:?}");
        };
        // It tells the sector.
        assert!(
            said.contains(&format!("at offset {}!", offset / 512 * 512)),
            "{said}, {offset}"
        );
    }
}
