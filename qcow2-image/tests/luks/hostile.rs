use qcow2_format::LuksError as HeaderError;
use qcow2_image::luks::{KeyCost, KeySlots, LuksArea, LuksError, LuksErrorKind, WorkLimit, info};
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage, StorageErrorKind};

use crate::area::{active, assert_surroundings, new_area, secret, unlock};

/// The area with some of its bytes replaced.
fn damaged(at: u64, bytes: &[u8]) -> (Memory, LuksArea) {
    let (memory, area) = new_area();
    memory.write_at(bytes, area.offset + at).unwrap();
    (memory, area)
}

/// First byte of a slot in the header.
const fn slot(number: u64) -> u64 {
    208 + 48 * number
}

/// Asserts that nothing works and nothing is written, and gives the reason.
fn refused(memory: &Memory, area: LuksArea) -> LuksError {
    let before = memory.to_vec().unwrap();
    let slots = KeySlots::new(memory, area).force(true);
    let error = unlock(memory, area, "old").unwrap_err();
    assert!(slots.erase_matching(&secret("old")).is_err());
    let (other, place) = new_area();
    let unlocked = unlock(&other, place, "old").unwrap();
    let cost = KeyCost::Iterations(1000);
    assert!(slots.add(&unlocked, &secret("new"), None, cost).is_err());
    assert_eq!(memory.to_vec().unwrap(), before);
    error
}

/// Whether it is the error that was expected.
type Expected = fn(&HeaderError) -> bool;

#[test]
fn a_header_that_breaks_a_rule_is_refused() {
    let max = u32::MAX.to_be_bytes();
    let cases: [(u64, &[u8], Expected); 14] = [
        (0, b"LUKS\xba\xbf", |e| {
            matches!(e, HeaderError::Magic { .. })
        }),
        (6, &[0, 2], |e| matches!(e, HeaderError::Version { .. })),
        (8, &[b'a'; 32], |e| {
            matches!(e, HeaderError::Unterminated { .. })
        }),
        (40, &[b'a'; 32], |e| {
            matches!(e, HeaderError::Unterminated { .. })
        }),
        (72, &[b'a'; 32], |e| {
            matches!(e, HeaderError::Unterminated { .. })
        }),
        (104, &[0; 4], |e| {
            matches!(e, HeaderError::PayloadInHeader { .. })
        }),
        (108, &[0; 4], |e| {
            matches!(e, HeaderError::MasterKeyLength { .. })
        }),
        (164, &[0; 4], |e| {
            matches!(e, HeaderError::MasterIterationsZero)
        }),
        (slot(0) + 4, &[0; 4], |e| {
            matches!(e, HeaderError::SlotIterationsZero { .. })
        }),
        (slot(0), &[1; 4], |e| {
            matches!(e, HeaderError::SlotState { .. })
        }),
        (slot(5) + 44, &[0, 0, 15, 161], |e| {
            matches!(e, HeaderError::SlotStripes { .. })
        }),
        (slot(0) + 44, &max, |e| {
            matches!(e, HeaderError::SlotStripes { .. })
        }),
        (slot(0) + 40, &[0; 4], |e| {
            matches!(e, HeaderError::SlotInHeader { .. })
        }),
        (slot(0) + 40, &[0, 0, 0, 9], |e| {
            matches!(e, HeaderError::SlotsOverlap { .. })
        }),
    ];
    for (at, bytes, expected) in cases {
        let (memory, area) = damaged(at, bytes);
        let error = refused(&memory, area);
        assert_eq!(error.kind(), LuksErrorKind::Damaged);
        let LuksError::Header(error) = error else {
            panic!("{at}: {error:?}");
        };
        assert!(expected(&error), "{at}: {error:?}");
        assert!(info(&memory, area).is_err());
    }
}

#[test]
fn a_key_of_any_length_but_the_ciphers_is_refused() {
    for len in [1_u32, 15, 17, 64, 65, 4096, 0x8000_0000, u32::MAX] {
        let (memory, area) = damaged(108, &len.to_be_bytes());
        let error = refused(&memory, area);
        assert!(
            matches!(
                error.kind(),
                LuksErrorKind::Damaged | LuksErrorKind::Unsupported
            ),
            "{len}: {error:?}"
        );
    }
    // AES has keys of 24 bytes, but their key material fills no sectors.
    let (memory, area) = damaged(108, &24_u32.to_be_bytes());
    for number in 0..8 {
        let sector = u32::try_from(8 + number * 192).unwrap();
        let at = area.offset + slot(number) + 40;
        memory.write_at(&sector.to_be_bytes(), at).unwrap();
    }
    let payload = (8 + 8 * 192_u32).to_be_bytes();
    memory.write_at(&payload, area.offset + 104).unwrap();
    let longer = LuksArea {
        len: area.len * 2,
        ..area
    };
    memory.set_len(area.offset + area.len * 3).unwrap();
    let LuksError::Header(error) = refused(&memory, longer) else {
        panic!("another error");
    };
    assert_eq!(
        error,
        HeaderError::KeyMaterialNotSectors { len_bytes: 96000 }
    );
}

#[test]
fn unknown_names_are_named() {
    let cases: [(u64, &[u8], &str); 7] = [
        (8, b"rot13\0", "rot13"),
        (40, b"xex-plain\0", "xex"),
        (40, b"cbc\0", "IV generator"),
        (40, b"cbc-essiv\0", "essiv"),
        (40, b"cbc-essiv:sha1\0", "essiv"),
        (72, b"crc32\0", "crc32"),
        (8, b"\xff\xfe\0", "cipher"),
    ];
    for (at, name, word) in cases {
        let (memory, area) = damaged(at, name);
        let error = refused(&memory, area);
        assert_eq!(error.kind(), LuksErrorKind::Unsupported, "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn work_is_refused_before_it_is_done() {
    // Days of work, if anyone did it.
    for at in [164, slot(0) + 4] {
        let (memory, area) = damaged(at, &u32::MAX.to_be_bytes());
        let error = refused(&memory, area);
        let LuksError::TooMuchWork { needed, limit } = error else {
            panic!("{error:?}");
        };
        assert_eq!((needed, limit), (u64::from(u32::MAX) + 1000, 100_000_000));
        let words = error.to_string();
        assert!(words.contains(&needed.to_string()) && words.contains("a work limit of"));
    }
}

#[test]
fn the_work_of_all_active_slots_counts() {
    let (memory, area) = new_area();
    let unlocked = unlock(&memory, area, "old").unwrap();
    let slots = KeySlots::new(&memory, area);
    for iterations in [2000, 3000] {
        let cost = KeyCost::Iterations(iterations);
        slots.add(&unlocked, &secret("new"), None, cost).unwrap();
    }
    let needed = info(&memory, area).unwrap().work;
    assert_eq!(needed, 1000 + 2000 + 3000 + 3 * 1000);
    let old = secret("old");
    let with = |rounds| {
        let limit = WorkLimit::rounds(rounds);
        let opened = qcow2_image::luks::unlock(&memory, area, &old, limit);
        opened.map(|unlocked| unlocked.slot())
    };
    assert_eq!(with(needed).unwrap(), 0);
    let error = with(needed - 1).unwrap_err();
    assert_eq!(error.kind(), LuksErrorKind::TooMuchWork);
    let limited = slots.limit(WorkLimit::rounds(needed - 1));
    let error = limited.erase_matching(&old).unwrap_err();
    assert_eq!(error.kind(), LuksErrorKind::TooMuchWork);
    // One slot alone is less.
    limited.erase(0, Some(&old)).unwrap();
    assert_eq!(active(&memory, area), [1, 2]);
    let opened = qcow2_image::luks::unlock(&memory, area, &secret("new"), WorkLimit::NONE);
    assert_eq!(opened.unwrap().slot(), 1);
}

#[test]
fn nothing_outside_the_area_is_touched_for_a_header_that_says_so() {
    // The last slot lies behind the area, as far as sectors reach.
    for (sector, number) in [(1032, 7), (u32::MAX - 128, 7), (1032, 0)] {
        let (memory, area) = damaged(slot(number) + 40, &u32::to_be_bytes(sector));
        memory
            .write_at(&u32::MAX.to_be_bytes(), area.offset + 104)
            .unwrap();
        let slots = KeySlots::new(&memory, area).force(true);
        let number = u8::try_from(number).unwrap();
        let erased = slots.erase(number, None).unwrap_err();
        assert!(matches!(erased, LuksError::BeyondArea { .. }), "{erased:?}");
        if number == 0 {
            assert!(matches!(
                refused(&memory, area),
                LuksError::BeyondArea { .. }
            ));
        } else {
            let unlocked = unlock(&memory, area, "old").unwrap();
            let cost = KeyCost::Iterations(1000);
            let added = slots.add(&unlocked, &secret("new"), Some(number), cost);
            assert!(matches!(added, Err(LuksError::BeyondArea { .. })));
        }
        assert_surroundings(&memory, area);
    }
}

#[test]
fn an_area_that_does_not_fit_is_refused() {
    let (memory, area) = new_area();
    let beyond_area = [0, 591, 592, 4096 + 63999];
    for len in beyond_area {
        let error = refused(&memory, LuksArea { len, ..area });
        assert!(
            matches!(error, LuksError::BeyondArea { .. }),
            "{len}: {error:?}"
        );
    }
    let len = 4096 + 64000;
    unlock(&memory, LuksArea { len, ..area }, "old").unwrap();

    for offset in [u64::MAX, u64::MAX - 591, 1 << 62, 1 << 40] {
        let error = refused(&memory, LuksArea { offset, ..area });
        assert!(
            matches!(error, LuksError::BeyondFile { .. }),
            "{offset}: {error:?}"
        );
    }
    for len in [0, 591, 592, 4096, 4096 + 63999] {
        let (memory, area) = new_area();
        memory.set_len(area.offset + len).unwrap();
        let error = refused(&memory, area);
        assert!(
            matches!(error, LuksError::BeyondFile { .. }),
            "{len}: {error:?}"
        );
        // What was cut off comes back as zeros, which open nothing.
        memory.set_len(area.offset + area.len).unwrap();
        assert!(unlock(&memory, area, "old").is_err());
    }
    let options = crate::area::small();
    for offset in [u64::MAX, i64::MAX.cast_unsigned(), 1 << 63] {
        let error = qcow2_image::luks::create(&memory, offset, &options, &secret("x"));
        assert!(matches!(error, Err(LuksError::BeyondFile { .. })));
    }
}

#[test]
fn changed_key_material_opens_nothing() {
    for at in [4096, 4096 + 32000, 4096 + 63999] {
        let (memory, area) = new_area();
        let mut byte = [0];
        memory.read_at(&mut byte, area.offset + at).unwrap();
        memory.write_at(&[byte[0] ^ 1], area.offset + at).unwrap();
        assert!(matches!(refused(&memory, area), LuksError::WrongPassphrase));
    }
}

#[test]
fn a_storage_that_fails_is_told_of() {
    for operation in [Operation::Read, Operation::Len] {
        let (memory, area) = new_area();
        let faulty = Faulty::new(memory);
        faulty.add(Fault::on(operation).kind(StorageErrorKind::Io));
        let error = unlock(&faulty, area, "old").unwrap_err();
        assert_eq!(error.kind(), LuksErrorKind::Storage);
    }
    for operation in [Operation::Write, Operation::Flush] {
        let (memory, area) = new_area();
        let unlocked = unlock(&memory, area, "old").unwrap();
        let faulty = Faulty::new(memory);
        faulty.add(Fault::on(operation).kind(StorageErrorKind::Io));
        let slots = KeySlots::new(&faulty, area);
        let cost = KeyCost::Iterations(1000);
        let error = slots
            .add(&unlocked, &secret("new"), None, cost)
            .unwrap_err();
        assert_eq!(error.kind(), LuksErrorKind::Storage);
        assert_eq!(active(&faulty, area), [0]);
    }
}
