//! Repairs that are cut short: the way back works, and so does another run. And no write that the plan does not tell of.

use std::sync::Arc;

use qcow2_check::repair::{Level, RepairOptions, default_undo_path, plan, read_undo, undo};
use qcow2_check::{Options, Severity, check};
use qcow2_io::{Event, Fault, Faulty, Memory, Operation, Storage, Trace, replay};

use super::classes::{self, Class};
use crate::mutants::bases;
use crate::oracle;

/// States made of each stretch between two flushes.
const STATES: usize = 6;

pub(super) struct Random(pub(super) u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

fn options(class: &Class) -> RepairOptions<'static> {
    at_level(class.level)
}

fn at_level(level: Level) -> RepairOptions<'static> {
    RepairOptions {
        level,
        threads: 1,
        ..RepairOptions::default()
    }
}

/// What a crash may leave: all up to some flush, and of what follows any pieces.
pub(super) fn states(events: &[Event], random: &mut Random) -> Vec<Vec<Event>> {
    let mut states = Vec::new();
    let mut durable: Vec<Event> = Vec::new();
    for stretch in events.split_inclusive(Event::is_flush) {
        let pieces: Vec<Event> = stretch.iter().flat_map(|event| event.torn(512)).collect();
        for _ in 0..STATES {
            let mut state = durable.clone();
            state.extend(pieces.iter().filter(|_| random.below(2) == 0).cloned());
            states.push(state);
        }
        durable.extend(stretch.iter().cloned());
        states.push(durable.clone());
    }
    states
}

#[test]
fn a_crash_at_any_write_leaves_a_way_back_and_a_way_on() {
    if !oracle::is_available(classes::ALL.len(), "crashes of repairs") {
        return;
    }
    let mut random = Random(1);
    let mut tried = 0;
    for class in classes::ALL {
        let damaged = class.damaged();
        let image = Trace::new(Memory::from(damaged.clone()));
        let saved = Memory::new();
        let plan_made = plan(&image, &options(class)).unwrap();
        let promised = plan_made.writes();
        plan_made.apply(Some(&saved)).unwrap();
        let events = image.events();
        // Nothing but what the plan says.
        for event in &events {
            match event {
                Event::Write { offset, bytes } => {
                    let end = offset + bytes.len() as u64;
                    let inside = promised.iter().any(|r| r.start <= *offset && end <= r.end);
                    assert!(inside, "{}: a write at {offset:#x}", class.name);
                }
                Event::SetLen { len } => assert_eq!(*len, plan_made.new_len(), "{}", class.name),
                Event::Flush => {}
                other => panic!("{}: {other:?}", class.name),
            }
        }
        // The undo file as it was before its last record, that of the end.
        let whole = saved.to_vec().unwrap();
        let sealed = &whole[..whole.len() - 56];
        assert!(!read_undo(&Memory::from(sealed.to_vec())).unwrap().finished);
        for state in states(&events, &mut random) {
            tried += 1;
            let crashed = Memory::from(damaged.clone());
            replay(&state, &crashed).unwrap();
            let left = crashed.to_vec().unwrap();

            let file = Memory::from(sealed.to_vec());
            undo(&crashed, &file, false).unwrap();
            assert!(
                crashed.to_vec().unwrap() == damaged,
                "{}: not the way back",
                class.name
            );

            let crashed = Memory::from(left);
            let file = Memory::from(sealed.to_vec());
            let again = plan(&crashed, &options(class)).unwrap();
            again.apply(Some(&file)).unwrap();
            let report = check(&crashed, &Options::default());
            let grave: Vec<_> = report
                .totals
                .iter()
                .filter(|(code, _)| code.severity() >= Severity::Leak)
                .collect();
            assert!(grave.is_empty(), "{}: {grave:?}\n{again}", class.name);
            undo(&crashed, &file, false).unwrap();
            assert!(
                crashed.to_vec().unwrap() == damaged,
                "{}: not the way back from a second run",
                class.name
            );
        }
    }
    assert!(tried > 200, "only {tried} states");
}

#[test]
fn a_crash_at_any_level_leaves_a_way_back_and_a_way_to_the_same_end() {
    if !oracle::is_available(classes::ALL.len() * 3, "crashes at all levels") {
        return;
    }
    let mut random = Random(2);
    let mut tried = [0; 3];
    let leaky = leaked();
    let damaged = classes::ALL
        .iter()
        .map(|class| (class.name, class.damaged()));
    for (name, damaged) in damaged.chain([("leaked clusters", leaky)]) {
        for (tried, level) in tried
            .iter_mut()
            .zip([Level::Leaks, Level::All, Level::Salvage])
        {
            let image = Trace::new(Memory::from(damaged.clone()));
            let saved = Memory::new();
            // Some of them have nothing to begin with at some level.
            let Ok(made) = plan(&image, &at_level(level)) else {
                continue;
            };
            let promised = made.after().verdict();
            made.apply(Some(&saved)).unwrap();
            drop(made);
            for state in states(&image.events(), &mut random).into_iter().step_by(3) {
                *tried += 1;
                let crashed = Memory::from(damaged.clone());
                replay(&state, &crashed).unwrap();
                let file = Memory::from(saved.to_vec().unwrap());
                let again = plan(&crashed, &at_level(level)).unwrap();
                let verdict = again.after().verdict();
                assert!(
                    verdict <= promised,
                    "{name}, {level}: {verdict:?} instead of {promised:?}\n{again}"
                );
                drop(again);
                undo(&crashed, &file, true).unwrap();
                assert!(
                    crashed.to_vec().unwrap() == damaged,
                    "{name}, {level}: not the way back"
                );
            }
        }
    }
    assert!(
        tried.iter().all(|tried| *tried > 3),
        "only {tried:?} states"
    );
}

/// An image that level `leaks` has something to do on: clusters at its end that are counted, and nobody's.
fn leaked() -> Vec<u8> {
    const LEAKED: usize = 3;
    let mut bytes = bases::named("64k").bytes;
    let number = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 8].try_into().unwrap();
        usize::try_from(u64::from_be_bytes(word)).unwrap()
    };
    let block = number(&bytes, number(&bytes, 48));
    let first = bytes.len().div_ceil(1 << 16);
    bytes.resize((first + LEAKED) << 16, 0);
    for cluster in first..first + LEAKED {
        bytes[block + cluster * 2 + 1] = 1;
    }
    bytes
}

#[test]
fn a_storage_that_fails_leaves_a_way_back() {
    if !oracle::is_available(3, "failing repairs") {
        return;
    }
    for class in classes::ALL.iter().take(3) {
        let damaged = class.damaged();
        for operation in [Operation::Write, Operation::Flush, Operation::SetLen] {
            for nth in 0..50 {
                let image = Faulty::new(Memory::from(damaged.clone()));
                let made = plan(&image, &options(class)).unwrap();
                image.add(Fault::on(operation).nth(nth));
                let file = Memory::new();
                let outcome = made.apply(Some(&file));
                if image.struck() == 0 {
                    outcome.unwrap();
                    break;
                }
                outcome.unwrap_err();
                drop(made);
                image.clear();
                undo(&image, &file, false).unwrap();
                assert!(
                    image.into_inner().to_vec().unwrap() == damaged,
                    "{}",
                    class.name
                );
            }
        }
    }
}

#[test]
fn an_undo_file_that_fails_keeps_the_image_as_it_is() {
    if !oracle::is_available(1, "failing undo files") {
        return;
    }
    let class = &classes::ALL[0];
    let damaged = class.damaged();
    for operation in [Operation::Write, Operation::Flush] {
        let image = Trace::new(Memory::from(damaged.clone()));
        let file = Faulty::new(Memory::new());
        file.add(Fault::on(operation));
        plan(&image, &options(class))
            .unwrap()
            .apply(Some(&file))
            .unwrap_err();
        assert_eq!(image.events(), []);
    }
}

#[test]
fn an_undo_file_fits_only_its_own_image_and_only_once() {
    if !oracle::is_available(1, "undo files") {
        return;
    }
    let class = &classes::ALL[0];
    let damaged = class.damaged();
    let image = Memory::from(damaged.clone());
    let file = Memory::new();
    let made = plan(&image, &options(class)).unwrap();
    made.apply(Some(&file)).unwrap();
    // Another repair needs another file.
    made.apply(Some(&file)).unwrap_err();
    let repaired = image.to_vec().unwrap();

    let other = Memory::from(vec![1; repaired.len()]);
    undo(&other, &file, false).unwrap_err();
    assert!(other.to_vec().unwrap().iter().all(|byte| *byte == 1));

    // The guest has written since: its table would be overwritten by an old one.
    let at = made.writes()[0].start;
    image.write_at(&[0xaa; 16], at + 256).unwrap();
    let changed = image.to_vec().unwrap();
    undo(&image, &file, false).unwrap_err();
    assert!(image.to_vec().unwrap() == changed);

    let image = Memory::from(repaired);
    undo(&image, &file, false).unwrap();
    assert!(image.to_vec().unwrap() == damaged);
    undo(&image, &file, false).unwrap_err();
    assert_eq!(
        default_undo_path("/a/b.qcow2".as_ref()).to_str(),
        Some("/a/b.qcow2.undo")
    );
}

#[test]
fn a_changed_image_is_not_repaired_by_an_old_plan() {
    if !oracle::is_available(1, "old plans") {
        return;
    }
    let class = &classes::ALL[0];
    let image = Arc::new(Memory::from(class.damaged()));
    let made = plan(&image, &options(class)).unwrap();
    image.write_at(&[0xff], 31).unwrap();
    let before = image.to_vec().unwrap();
    made.apply(None).unwrap_err();
    assert!(image.to_vec().unwrap() == before);
    assert_eq!(made.level(), Level::All);
}
