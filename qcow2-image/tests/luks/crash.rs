use qcow2_image::luks::{KeyCost, KeySlots, LuksArea, LuksError, Unlocked};
use qcow2_io::{Event, Memory, Storage, Trace, replay};

use crate::area::{active, new_area, secret, unlock};

const QUICK: KeyCost = KeyCost::Iterations(1000);

/// Every state that a crash can leave behind `change`: all that was flushed, and of each write behind that any of its
/// sectors. Key material counts as one piece: nothing looks at it before its slot is active.
fn states(
    before: &Memory,
    change: impl FnOnce(&Trace<Memory>),
    mut judge: impl FnMut(&Memory, bool),
) {
    let trace = Trace::new(Memory::from(before.to_vec().unwrap()));
    change(&trace);
    let events = trace.events();
    let flushed = |end: usize| {
        let memory = Memory::from(before.to_vec().unwrap());
        replay(&events[..end], &memory).unwrap();
        memory
    };
    let mut durable = 0;
    for (number, event) in events.iter().enumerate() {
        if event.is_flush() {
            judge(&flushed(number), number + 1 == events.len());
            durable = number + 1;
            continue;
        }
        assert_eq!(number, durable, "one write at a time");
        let Event::Write { offset, bytes } = event else {
            panic!("{event:?}");
        };
        let header = bytes.len() < 512;
        assert!(!header || offset / 512 == (offset + bytes.len() as u64 - 1) / 512);
        if !header {
            let memory = flushed(durable);
            let half = &bytes[..bytes.len() / 2];
            memory.write_at(half, *offset).unwrap();
            judge(&memory, false);
        }
    }
    assert_eq!(durable, events.len(), "all is durable");
}

fn opens(memory: &Memory, area: LuksArea, passphrase: &str) -> Option<u8> {
    match unlock(memory, area, passphrase) {
        Ok(unlocked) => Some(unlocked.slot()),
        Err(LuksError::WrongPassphrase | LuksError::NoActiveSlot) => None,
        Err(error) => panic!("{error}"),
    }
}

fn old_key(memory: &Memory, area: LuksArea) -> Unlocked {
    unlock(memory, area, "old").unwrap()
}

#[test]
fn a_crash_while_a_passphrase_is_added_leaves_it_whole_or_absent() {
    // The bytes of slot 6 lie in two sectors.
    for slot in [1, 6, 7] {
        let (before, area) = new_area();
        let unlocked = old_key(&before, area);
        let mut seen = [false; 2];
        let add = |storage: &Trace<Memory>| {
            let slots = KeySlots::new(storage, area);
            slots
                .add(&unlocked, &secret("new"), Some(slot), QUICK)
                .unwrap();
        };
        states(&before, add, |memory, last| {
            assert_eq!(opens(memory, area, "old"), Some(0));
            let new = opens(memory, area, "new");
            assert!(new == Some(slot) || !last);
            assert_eq!(new.is_some(), active(memory, area).contains(&slot.into()));
            seen[usize::from(new.is_some())] = true;
        });
        assert_eq!(seen, [true, true], "{slot}");
    }
}

#[test]
fn a_crash_while_a_slot_is_erased_leaves_it_whole_or_inactive() {
    for slot in [1, 6] {
        let (before, area) = new_area();
        let unlocked = old_key(&before, area);
        let slots = KeySlots::new(&before, area);
        slots
            .add(&unlocked, &secret("new"), Some(slot), QUICK)
            .unwrap();
        let erase = |storage: &Trace<Memory>| {
            KeySlots::new(storage, area).erase(slot, None).unwrap();
        };
        let mut seen = 0;
        states(&before, erase, |memory, last| {
            assert_eq!(opens(memory, area, "old"), Some(0));
            let open = opens(memory, area, "new").is_some();
            assert!(!open || !last);
            assert_eq!(open, active(memory, area).contains(&slot.into()));
            seen += 1;
        });
        assert!(seen > 80, "40 passes, each torn and whole");
    }
}

#[test]
fn a_crash_while_the_only_passphrase_is_replaced_leaves_one_of_the_two() {
    let (before, area) = new_area();
    let unlocked = old_key(&before, area);
    let replace = |storage: &Trace<Memory>| {
        let slots = KeySlots::new(storage, area).force(true);
        slots
            .add(&unlocked, &secret("new"), Some(0), QUICK)
            .unwrap();
    };
    states(&before, replace, |memory, last| {
        let (old, new) = (opens(memory, area, "old"), opens(memory, area, "new"));
        assert!(old.is_some() || new.is_some());
        if last {
            assert_eq!((old, new), (None, Some(0)));
            assert_eq!(active(memory, area), [0]);
        }
    });
}
