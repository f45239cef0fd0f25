use qcow2_image::luks::{KeyCost, KeySlots, LuksError, LuksErrorKind, LuksOptions, create};

use crate::area::{active, assert_surroundings, new_area, secret, unlock};
use crate::oracle::{Folder, area_of, is_available};

const QUICK: KeyCost = KeyCost::Iterations(1000);
const ACTIVE: (&str, &str) = ("state", "active");
const INACTIVE: (&str, &str) = ("state", "inactive");
const TIME: (&str, &str) = ("iter-time", "10");

/// A change of key slots, with the passphrase that opens the image before it.
enum Change {
    Add(&'static str, Option<u8>),
    Erase(u8, Option<&'static str>),
    EraseMatching(&'static str),
}
use Change::{Add, Erase, EraseMatching};

/// Makes the change with QEMU; whether it was made.
fn by_qemu(folder: &Folder, name: &str, key: &str, change: &Change, force: bool) -> bool {
    let number;
    let mut options = Vec::new();
    match change {
        Add(new, slot) => {
            options.extend([ACTIVE, ("new-secret", *new), TIME]);
            if let Some(slot) = slot {
                number = slot.to_string();
                options.push(("keyslot", &number));
            }
        }
        Erase(slot, old) => {
            number = slot.to_string();
            options.extend([INACTIVE, ("keyslot", &*number)]);
            options.extend(old.map(|old| ("old-secret", old)));
        }
        EraseMatching(old) => options.extend([INACTIVE, ("old-secret", *old)]),
    }
    folder.amend(name, key, &options, force).is_ok()
}

fn here(
    folder: &Folder,
    name: &str,
    key: &str,
    change: &Change,
    force: bool,
) -> Result<(), LuksError> {
    let file = folder.open(name);
    let area = area_of(&file);
    let slots = KeySlots::new(&file, area).force(force);
    let unlocked = unlock(&file, area, key)?;
    match change {
        Add(new, slot) => {
            let added = slots.add(&unlocked, &secret(new), *slot, QUICK)?;
            assert!(slot.is_none_or(|slot| slot == added));
            Ok(())
        }
        Erase(slot, old) => slots.erase(*slot, old.map(secret).as_ref()),
        EraseMatching(old) => slots.erase_matching(&secret(old)).map(drop),
    }
}

#[test]
fn qemu_and_this_crate_make_and_refuse_the_same_changes() {
    let steps = [
        ("old", Add("new", None), false, None),
        (
            "old",
            Add("x", Some(1)),
            false,
            Some(LuksErrorKind::Refused),
        ),
        ("old", Add("x", Some(8)), true, Some(LuksErrorKind::Invalid)),
        ("new", Add("x", Some(1)), true, None),
        ("old", Add("x", Some(6)), false, None),
        ("old", Erase(7, None), false, Some(LuksErrorKind::Refused)),
        ("old", Erase(7, None), true, None),
        ("old", Erase(8, None), true, Some(LuksErrorKind::Invalid)),
        (
            "old",
            Erase(0, Some("x")),
            true,
            Some(LuksErrorKind::WrongPassphrase),
        ),
        (
            "old",
            Erase(2, Some("old")),
            false,
            Some(LuksErrorKind::WrongPassphrase),
        ),
        ("x", Erase(0, Some("old")), false, None),
        (
            "x",
            EraseMatching("old"),
            false,
            Some(LuksErrorKind::WrongPassphrase),
        ),
        ("x", EraseMatching("x"), false, Some(LuksErrorKind::Refused)),
        ("x", Add("z", None), false, None),
        ("z", EraseMatching("x"), false, None),
        ("z", Erase(0, None), false, Some(LuksErrorKind::Refused)),
        ("z", Add("y", Some(0)), true, None),
        ("y", EraseMatching("y"), true, None),
    ];
    if !is_available(steps.len(), "changes of key slots") {
        return;
    }
    let folder = Folder::new();
    folder.create("theirs", "old", &[TIME]).unwrap();
    folder.copy("theirs", "ours");
    let images = ["theirs", "ours"].map(|name| folder.open(name));
    let area = area_of(&images[0]);
    for (number, (key, change, force, refused)) in steps.iter().enumerate() {
        let theirs = by_qemu(&folder, "theirs", key, change, *force);
        let ours = here(&folder, "ours", key, change, *force);
        assert_eq!(
            ours.as_ref().err().map(LuksError::kind),
            *refused,
            "{number}: {ours:?}"
        );
        assert_eq!(theirs, ours.is_ok(), "{number}");
        let [theirs, ours] = images.each_ref().map(|file| active(file, area));
        assert_eq!(theirs, ours, "{number}");
        for passphrase in ["old", "new", "x", "y", "z"] {
            let opened = images.each_ref().map(|file| unlock(file, area, passphrase));
            let [theirs, ours] = opened.map(|opened| opened.ok().map(|it| it.slot()));
            assert_eq!(theirs, ours, "{number}: {passphrase}");
        }
    }
    // Nothing opens them any more.
    for file in &images {
        assert!(active(file, area).is_empty());
        assert!(matches!(
            unlock(file, area, "y"),
            Err(LuksError::NoActiveSlot)
        ));
    }
    assert!(!folder.opens("ours", "y"));
}

#[test]
fn passphrases_added_by_either_open_in_the_other() {
    if !is_available(1, "image whose key slots change") {
        return;
    }
    let folder = Folder::new();
    folder.create("a", "theirs-0", &[TIME]).unwrap();
    let file = folder.open("a");
    let area = area_of(&file);
    let ours = LuksOptions::new().cost(QUICK);
    create(&file, area.offset, &ours, &secret("ours-0")).unwrap();
    let add = [ACTIVE, ("new-secret", "theirs-1"), TIME];
    folder.amend("a", "ours-0", &add, false).unwrap();
    let unlocked = unlock(&file, area, "theirs-1").unwrap();
    assert_eq!(unlocked.slot(), 1);
    let slots = KeySlots::new(&file, area);
    for slot in 2..8 {
        let new = secret(&format!("ours-{slot}"));
        assert_eq!(slots.add(&unlocked, &new, None, QUICK).unwrap(), slot);
    }
    let full = slots.add(&unlocked, &secret("x"), None, QUICK).unwrap_err();
    assert!(matches!(full, LuksError::NoFreeSlot));
    assert!(folder.amend("a", "ours-7", &add, false).is_err());
    for slot in 2..8 {
        assert!(folder.opens("a", &format!("ours-{slot}")), "{slot}");
    }

    slots.erase(6, None).unwrap();
    assert!(!folder.opens("a", "ours-6"));
    assert!(folder.opens("a", "ours-7"));
    let erase = [INACTIVE, ("old-secret", "ours-7")];
    folder.amend("a", "theirs-1", &erase, false).unwrap();
    assert!(matches!(
        unlock(&file, area, "ours-7"),
        Err(LuksError::WrongPassphrase)
    ));
    assert_eq!(unlock(&file, area, "ours-5").unwrap().slot(), 5);
}

#[test]
fn erased_key_material_is_gone_and_nothing_else() {
    let (memory, area) = new_area();
    let slots = KeySlots::new(&memory, area);
    let unlocked = unlock(&memory, area, "old").unwrap();
    assert_eq!(
        slots
            .add(&unlocked, &secret("new"), Some(3), QUICK)
            .unwrap(),
        3
    );
    let start = usize::try_from(area.offset + 4096).unwrap();
    let before = memory.to_vec().unwrap();
    slots.erase(0, Some(&secret("old"))).unwrap();
    let after = memory.to_vec().unwrap();
    let same = before[start..start + 64000]
        .iter()
        .zip(&after[start..start + 64000])
        .filter(|(before, after)| before == after);
    assert!(same.count() < 1000, "one byte in 256 is the same by chance");
    assert_eq!(before[start + 64000..], after[start + 64000..]);
    assert_eq!(active(&memory, area), [3]);
    assert_eq!(unlock(&memory, area, "new").unwrap().slot(), 3);
    assert_surroundings(&memory, area);
}

#[test]
fn what_was_unlocked_elsewhere_adds_no_passphrase() {
    let (first, area) = new_area();
    let (second, _) = new_area();
    let unlocked = unlock(&first, area, "old").unwrap();
    let before = second.to_vec().unwrap();
    let error = KeySlots::new(&second, area)
        .add(&unlocked, &secret("new"), None, QUICK)
        .unwrap_err();
    assert!(matches!(error, LuksError::OtherKey));
    assert_eq!(second.to_vec().unwrap(), before);
}

#[test]
fn a_new_area_takes_its_bytes_and_no_others() {
    let (memory, area) = new_area();
    assert_eq!(area.len, 528384);
    assert_surroundings(&memory, area);
    let bytes = memory.to_vec().unwrap();
    let start = usize::try_from(area.offset).unwrap();
    let end = start + usize::try_from(area.len).unwrap();
    assert!(
        bytes[start + 592..start + 4096]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(
        bytes[start + 4096 + 64000..end]
            .iter()
            .all(|byte| *byte == 0)
    );
}
