use qcow2_io::cipher::Secret;
use qcow2_io::{Memory, Storage};

use crate::luks::{KeyCost, KeySlots, LuksArea, WorkLimit, info, unlock};

/// Bytes before the area, and behind it.
const GUARD: usize = 512;
/// What the guards are full of.
const GUARD_BYTE: u8 = 0xee;
/// Areas are not made longer than this; bytes.
const AREA_MAX: u64 = 1 << 20;
/// Enough for a few slots of a thousand iterations; more would only cost time.
const LIMIT: WorkLimit = WorkLimit::rounds(8000);
/// What opens the seeds.
pub const LUKS_PASSPHRASE: &[u8] = b"fuzz";

/// Opens arbitrary bytes as a LUKS area, and adds and erases a passphrase where that works.
///
/// The last four bytes say how much longer than its content the area is, whether the file is as long, and which slot changes.
///
/// # Panics
///
/// If opening writes, anything outside the area changes, an added passphrase does not open its slot, or an erased one opens
/// anything.
pub fn luks_open(data: &[u8]) {
    let Some((content, [shift, factor, flags, slot])) = data.split_last_chunk() else {
        return;
    };
    let longer = u64::from(*factor) << (shift % 16);
    let len = (content.len() as u64).saturating_add(longer).min(AREA_MAX);
    let area = LuksArea {
        offset: GUARD as u64,
        len,
    };
    let whole = flags & 1 == 0;
    let Some(storage) = storage(content, area, whole) else {
        return;
    };
    let guarded = |bytes: &[u8]| {
        let area_len = usize::try_from(len).unwrap_or(usize::MAX);
        let behind = bytes.iter().skip(area_len.saturating_add(GUARD));
        bytes
            .iter()
            .take(GUARD)
            .chain(behind)
            .all(|byte| *byte == GUARD_BYTE)
    };
    let before = bytes_of(&storage);

    let told = info(&storage, area);
    let passphrase = Secret::new(LUKS_PASSPHRASE.to_vec());
    let unlocked = unlock(&storage, area, &passphrase, LIMIT);
    assert!(before == bytes_of(&storage), "a reader wrote");
    let Ok(unlocked) = unlocked else {
        return;
    };
    assert!(told.is_ok(), "what opens can tell of itself");

    let new = Secret::new(b"new".to_vec());
    let slots = KeySlots::new(&storage, area)
        .limit(LIMIT)
        .force(flags & 2 != 0);
    let wanted = (flags & 4 != 0).then_some(*slot);
    let added = slots.add(&unlocked, &new, wanted, KeyCost::Iterations(1000));
    if let Ok(slot) = added {
        if let Ok(opened) = unlock(&storage, area, &new, WorkLimit::NONE) {
            assert_eq!(opened.slot(), slot);
        } else {
            panic!("the new passphrase opens nothing");
        }
        let erased = slots.erase(slot, Some(&new));
        let opened = unlock(&storage, area, &new, WorkLimit::NONE);
        assert_eq!(erased.is_err(), opened.is_ok(), "{erased:?}");
    }
    assert!(guarded(&bytes_of(&storage)), "wrote outside the area");
}

/// The area between its guards, or a file that ends with the content.
fn storage(content: &[u8], area: LuksArea, whole: bool) -> Option<Memory> {
    let content = content.get(..content.len().min(usize::try_from(area.len).ok()?))?;
    let guard = [GUARD_BYTE; GUARD];
    let storage = Memory::from([&guard, content].concat());
    if whole {
        storage.write_at(&guard, area.offset + area.len).ok()?;
    }
    Some(storage)
}

fn bytes_of(storage: &Memory) -> Vec<u8> {
    storage.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::luks::{LuksOptions, create};
    use qcow2_io::cipher::{Algorithm, Mode};

    #[test]
    fn an_area_that_opens_gets_through_all_of_it() {
        let disk = Memory::new();
        let options = LuksOptions::new()
            .algorithm(Algorithm::Aes128)
            .mode(Mode::Cbc)
            .cost(KeyCost::Iterations(1000));
        let passphrase = Secret::new(LUKS_PASSPHRASE.to_vec());
        create(&disk, 0, &options, &passphrase).unwrap();
        let mut input = disk.to_vec().unwrap();
        for flags in 0..8 {
            let len = input.len();
            input.extend([0, 0, flags, 6]);
            luks_open(&input);
            input.truncate(len);
        }
    }
}
