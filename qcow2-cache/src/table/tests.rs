use super::*;

const SLICE: u64 = 512;

fn at(slice: u64) -> HostOffset {
    HostOffset::new(slice * SLICE)
}

/// A cache of so many slices, all in one set if they are fewer than 16.
fn cache(slices: usize) -> TableCache {
    TableCache::new(512, slices)
}

/// Loads a slice whose words are its number.
fn load(cache: &TableCache, slice: u64) -> Room {
    let load = |offset: HostOffset, bytes: &mut [u8]| {
        assert_eq!(offset, at(slice));
        for word in bytes.as_chunks_mut().0 {
            *word = slice.to_be_bytes();
        }
        Ok::<_, ()>(())
    };
    cache.ensure(at(slice), load).unwrap()
}

fn set(cache: &TableCache, slice: u64, index: usize, value: u64) {
    let changed = cache.update(at(slice), |words| words.set(index, value));
    assert_eq!(changed, Some(()));
}

fn offsets(copies: &[DirtySlice]) -> Vec<u64> {
    copies.iter().map(|copy| copy.offset.get()).collect()
}

#[test]
fn words_are_found_where_they_lie() {
    let cache = TableCache::new(4096, 20);
    let place = HostOffset::new(3 * 4096);
    let room = cache.ensure(place, |_, bytes| {
        for (number, word) in (0_u64..).zip(bytes.as_chunks_mut().0) {
            *word = (number * 3).to_be_bytes();
        }
        Ok::<_, ()>(())
    });
    assert_eq!(room, Ok(Room::Resident));
    for number in 0..512 {
        let at = HostOffset::new(3 * 4096 + number * 8);
        assert_eq!(cache.get(at), Some(number * 3));
    }
    let pair = cache.get_pair(HostOffset::new(3 * 4096 + 16));
    assert_eq!(pair, Some((6, 9)));
    assert_eq!(cache.get(HostOffset::new(2 * 4096)), None);
    assert_eq!(cache.get(HostOffset::new(4 * 4096)), None);
}

#[test]
fn slices_whose_guess_is_another_are_found() {
    let cache = cache(14);
    let mut sharing: Vec<u64> = (0..10_000)
        .filter(|slice| hash(*slice) & cache.guess_mask == hash(7) & cache.guess_mask)
        .collect();
    assert!(sharing.len() > 14, "{}", sharing.len());
    let (late, early) = (sharing.split_off(14), sharing);
    for slice in &early {
        assert_eq!(load(&cache, *slice), Room::Resident);
    }
    // The guess is right for one of them at most.
    for slice in &early {
        assert_eq!(cache.get(at(*slice)), Some(*slice));
    }
    assert_eq!(cache.get(at(late[0])), None);
    assert_eq!(load(&cache, late[0]), Room::Resident);
    assert_eq!(cache.get(at(late[0])), Some(late[0]));
    let left = early
        .iter()
        .filter(|slice| cache.get(at(**slice)).is_some());
    assert_eq!(left.count(), 13);
}

#[test]
fn sizes_are_as_asked_for_or_the_next_that_work() {
    for (slices, least) in [
        (0, 2),
        (2, 2),
        (7, 7),
        (8, 8),
        (100, 96),
        (1 << 12, 1 << 12),
    ] {
        let capacity = cache(slices).capacity();
        assert!((least..=slices.max(2)).contains(&capacity), "{capacity}");
    }
    assert_eq!(TableCache::new(1, 2).slice_bytes(), 512);
    assert_eq!(TableCache::new(4096, 2).slice_bytes(), 4096);
}

#[test]
fn a_slice_is_loaded_once() {
    let cache = cache(4);
    assert_eq!(load(&cache, 1), Room::Resident);
    let again = cache.ensure(at(1), |_, _| -> Result<(), ()> { panic!("it is here") });
    assert_eq!(again, Ok(Room::Resident));
}

#[test]
fn eviction_takes_what_was_not_used_and_keeps_what_is_dirty() {
    let cache = cache(4);
    for slice in 0..4 {
        load(&cache, slice);
    }
    set(&cache, 2, 5, 99);
    for slice in 10..30 {
        assert_eq!(load(&cache, slice), Room::Resident);
        assert_eq!(cache.get(at(slice)), Some(slice));
        assert_eq!(cache.resident(), 4);
    }
    assert_eq!(cache.get(HostOffset::new(2 * SLICE + 40)), Some(99));
    assert_eq!(cache.get(at(0)), None);
    assert_eq!(cache.dirty_count(), 1);
}

#[test]
fn a_cache_full_of_changes_says_so_until_they_are_written() {
    let cache = cache(2);
    for slice in 0..2 {
        load(&cache, slice);
        set(&cache, slice, 0, 50 + slice);
    }
    assert_eq!(load(&cache, 7), Room::Full);
    assert_eq!(cache.get(at(7)), None);
    let copies = cache.take_dirty();
    // On their way, they are neither dirty nor gone.
    assert_eq!((cache.dirty_count(), copies.len()), (0, 2));
    assert_eq!((cache.get(at(0)), cache.get(at(1))), (Some(50), Some(51)));
    cache.written(&copies[0]);
    assert_eq!(load(&cache, 7), Room::Resident);
    assert_eq!((cache.get(at(0)), cache.get(at(1))), (None, Some(51)));
    cache.written(&copies[1]);
    assert_eq!(load(&cache, 8), Room::Resident);
}

#[test]
fn who_needs_room_waits_for_what_is_being_written() {
    let cache = cache(2);
    for slice in 0..2 {
        load(&cache, slice);
        set(&cache, slice, 0, 50 + slice);
    }
    let copies = cache.take_dirty();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| load(&cache, 7));
        cache.not_written(&copies[0]);
        cache.written(&copies[1]);
        assert_eq!(other.join().unwrap(), Room::Resident);
    });
    assert_eq!((cache.get(at(0)), cache.get(at(1))), (Some(50), None));
}

#[test]
fn dirty_slices_come_in_the_order_of_the_file_with_their_bytes() {
    let cache = cache(100);
    let mut expected = Vec::new();
    for slice in [70, 3, 41, 8, 5000, 12] {
        load(&cache, slice);
        set(&cache, slice, 63, !slice);
        expected.push(slice * SLICE);
    }
    load(&cache, 9);
    expected.sort_unstable();
    let copies = cache.take_dirty();
    assert_eq!(offsets(&copies), expected);
    for copy in &copies {
        let slice = copy.offset.get() / SLICE;
        let (words, _) = copy.bytes.as_chunks::<8>();
        assert_eq!(words.len(), 64);
        assert!(
            words[..63]
                .iter()
                .all(|word| u64::from_be_bytes(*word) == slice)
        );
        assert_eq!(u64::from_be_bytes(words[63]), !slice);
        cache.written(copy);
    }
    assert!(cache.take_dirty().is_empty());
}

#[test]
fn looking_at_words_in_an_update_makes_nothing_dirty() {
    let cache = cache(2);
    load(&cache, 4);
    assert_eq!(cache.update(at(4), |words| words.get(1)), Some(4));
    assert_eq!(cache.dirty_count(), 0);
    let pair = cache.update(at(4), |words| {
        words.set_pair(0, 1, 2);
        (words.get(0), words.get(1))
    });
    assert_eq!(pair, Some((1, 2)));
    assert_eq!(cache.dirty_count(), 1);
    assert_eq!(cache.update(at(5), |words| words.get(0)), None);
}

#[test]
fn what_did_not_get_to_disk_is_dirty_again() {
    let cache = cache(2);
    load(&cache, 1);
    set(&cache, 1, 0, 10);
    let copies = cache.take_dirty();
    cache.not_written(&copies[0]);
    assert_eq!(cache.dirty_count(), 1);
    let copies = cache.take_dirty();
    assert_eq!(offsets(&copies), [SLICE]);
    assert_eq!(copies[0].bytes[..8], 10_u64.to_be_bytes());
}

#[test]
fn changes_after_a_copy_are_for_the_next() {
    let cache = cache(2);
    load(&cache, 1);
    set(&cache, 1, 0, 10);
    let first = cache.take_dirty();
    set(&cache, 1, 0, 11);
    assert_eq!(cache.dirty_count(), 1);
    cache.written(&first[0]);
    assert_eq!(first[0].bytes[..8], 10_u64.to_be_bytes());
    let second = cache.take_dirty();
    assert_eq!(second[0].bytes[..8], 11_u64.to_be_bytes());
    // A failed write after a newer change counts once.
    set(&cache, 1, 0, 12);
    cache.not_written(&second[0]);
    assert_eq!(cache.dirty_count(), 1);
    assert_eq!(cache.take_dirty().len(), 1);
}

#[test]
fn a_load_that_fails_leaves_nothing() {
    let cache = cache(2);
    load(&cache, 1);
    load(&cache, 2);
    let failed = cache.ensure(at(3), |_, bytes| {
        bytes.fill(0xee);
        Err("no such luck")
    });
    assert_eq!(failed, Err("no such luck"));
    assert_eq!(cache.get(at(3)), None);
    assert_eq!(cache.resident(), 1);
    assert_eq!(load(&cache, 3), Room::Resident);
    assert_eq!(cache.get(at(3)), Some(3));
    assert_eq!(load(&cache, 4), Room::Resident);
}

#[test]
fn a_load_that_panics_leaves_nothing() {
    let cache = cache(2);
    let load_and_panic = || {
        let load = |_: HostOffset, _: &mut [u8]| -> Result<(), ()> {
            std::panic::resume_unwind(Box::new("on purpose"))
        };
        cache.ensure(at(3), load)
    };
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(load_and_panic)).is_err());
    assert_eq!(cache.get(at(3)), None);
    assert_eq!(load(&cache, 3), Room::Resident);
}

#[test]
fn forgetting_takes_changes_along_and_nothing_else() {
    let cache = cache(100);
    for slice in 0..10 {
        load(&cache, slice);
        set(&cache, slice, 0, 100 + slice);
    }
    // Three slices: a byte of the first and the last is enough.
    cache.forget(HostOffset::new(4 * SLICE - 1), SLICE + 2);
    for slice in 0..10 {
        let expected = (!(3..=5).contains(&slice)).then_some(100 + slice);
        assert_eq!(cache.get(at(slice)), expected, "slice {slice}");
    }
    assert_eq!(cache.dirty_count(), 7);
    let copies = cache.take_dirty();
    assert_eq!(
        offsets(&copies),
        [0, 1, 2, 6, 7, 8, 9].map(|slice| slice * SLICE)
    );
    // Loaded anew, it is as on disk, and clean.
    load(&cache, 4);
    assert_eq!(cache.get(at(4)), Some(4));
    assert!(cache.take_dirty().is_empty());
}

#[test]
fn trimming_gives_up_what_is_clean_and_was_not_used_since() {
    let cache = cache(8);
    for slice in 0..4 {
        load(&cache, slice);
    }
    set(&cache, 0, 0, 9);
    cache.trim();
    assert_eq!(cache.resident(), 4, "all were used before");
    assert_eq!(cache.get(at(1)), Some(1));
    cache.trim();
    assert_eq!(cache.resident(), 2);
    assert_eq!((cache.get(at(0)), cache.get(at(1))), (Some(9), Some(1)));
    assert_eq!((cache.get(at(2)), cache.get(at(3))), (None, None));
    assert_eq!(cache.take_dirty().len(), 1);
}

#[test]
fn words_in_equal_steps_are_those_that_were_stored() {
    const FIRST: u64 = 0x8000_0000_0005_0000;
    const STEP: u64 = 0x10000;
    let cache = TableCache::new(512, 2).with_distance(STEP);
    let place = |word: u64| HostOffset::new(word * 8);
    let mut expected: Vec<u64> = (0..64).map(|word| FIRST + word * STEP).collect();
    let load = |_, bytes: &mut [u8]| {
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(0..) {
            bytes.copy_from_slice(&(FIRST + word * STEP).to_be_bytes());
        }
        Ok::<(), ()>(())
    };
    assert_eq!(cache.ensure(place(0), load), Ok(Room::Resident));
    let found = || -> Vec<u64> {
        (0..64)
            .map(|word| cache.get(place(word)).unwrap())
            .collect()
    };
    assert!(
        cache
            .slots
            .iter()
            .any(|slot| slot.linear_word(0, STEP) == Some(FIRST))
    );
    assert_eq!(found(), expected);

    // One that is out of step, back in step, and a commit that notices.
    for (value, linear) in [(7, false), (FIRST + 9 * STEP, true)] {
        cache.update(place(9), |slice| slice.set(9, value)).unwrap();
        expected[9] = value;
        assert_eq!(found(), expected);
        assert!(
            cache
                .slots
                .iter()
                .all(|slot| slot.linear_word(0, STEP).is_none())
        );
        for copy in cache.take_dirty() {
            cache.written(&copy);
        }
        let noticed = cache
            .slots
            .iter()
            .any(|slot| slot.linear_word(0, STEP).is_some());
        assert_eq!(noticed, linear);
        assert_eq!(found(), expected);
    }
    // Another slice in its slot has nothing of it.
    cache.forget(place(0), 512);
    let zeros = |_, bytes: &mut [u8]| {
        bytes.fill(0);
        Ok::<(), ()>(())
    };
    assert_eq!(cache.ensure(place(0), zeros), Ok(Room::Resident));
    assert_eq!(found(), vec![0; 64]);
}

/// Words in equal steps are not stored until one of them changes; nobody may see that.
#[test]
fn slices_in_equal_steps_and_others_take_turns_in_a_slot() {
    const STEP: u64 = 0x10000;
    let cache = TableCache::new(512, 2).with_distance(STEP);
    let expected = |slice: u64| -> Vec<u64> {
        let word = |index: u64| match slice % 2 {
            0 => (slice + 1) * 7 + index * STEP,
            _ => slice * index * index,
        };
        (0..64).map(word).collect()
    };
    let fill = |slice: u64| {
        move |_: HostOffset, bytes: &mut [u8]| {
            for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(expected(slice)) {
                *bytes = word.to_be_bytes();
            }
            Ok::<(), ()>(())
        }
    };
    // More slices than slots, in an order in which each kind follows each.
    for slice in [0, 2, 4, 1, 3, 6, 5, 8, 10, 7, 0, 1, 2] {
        let place = |word: u64| HostOffset::new(slice * SLICE + word * 8);
        assert_eq!(cache.ensure(at(slice), fill(slice)), Ok(Room::Resident));
        let words = expected(slice);
        assert_eq!(cache.get_pair(place(62)), Some((words[62], words[63])));
        let mut bytes = [0; 512];
        assert!(cache.copy(at(slice), &mut bytes));
        assert!(!cache.copy(at(slice), &mut bytes[..504]), "no slice");
        let copied: Vec<_> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|&word| u64::from_be_bytes(word))
            .collect();
        assert_eq!(copied, words);

        let seen = cache.update(at(slice), |slice| {
            let seen: Vec<_> = (0..64).map(|index| slice.get(index)).collect();
            slice.set(5, 99);
            seen
        });
        assert_eq!(seen, Some(words.clone()));
        let [copy] = <[DirtySlice; 1]>::try_from(cache.take_dirty()).unwrap();
        let mut changed = words;
        changed[5] = 99;
        let written: Vec<_> = copy
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|&word| u64::from_be_bytes(word))
            .collect();
        assert_eq!(written, changed);
        cache.written(&copy);
        assert_eq!(cache.get(place(5)), Some(99));
        assert_eq!(cache.get(place(6)), Some(changed[6]));
    }
}
