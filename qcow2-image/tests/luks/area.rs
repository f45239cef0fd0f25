use qcow2_image::luks::{KeyCost, LuksArea, LuksError, LuksOptions, Unlocked, WorkLimit, create};
use qcow2_io::cipher::{Algorithm, Mode, Secret};
use qcow2_io::{Memory, Storage};

/// Where the area of every image in memory lies; no multiple of anything large.
pub(crate) const OFFSET: u64 = 0x1200;

pub(crate) fn secret(passphrase: &str) -> Secret {
    Secret::new(passphrase.into())
}

/// The smallest area there is, and the quickest to open.
pub(crate) fn small() -> LuksOptions {
    LuksOptions::new()
        .algorithm(Algorithm::Aes128)
        .mode(Mode::Cbc)
        .cost(KeyCost::Iterations(1000))
}

/// A small area with the passphrase `old` in slot 0, and bytes on both sides that nobody may touch.
pub(crate) fn new_area() -> (Memory, LuksArea) {
    let len = small().area_len().unwrap();
    let area = LuksArea {
        offset: OFFSET,
        len,
    };
    let size = usize::try_from(OFFSET * 2 + len).unwrap();
    let memory = Memory::from(vec![0xee; size]);
    create(&memory, OFFSET, &small(), &secret("old")).unwrap();
    (memory, area)
}

pub(crate) fn unlock(
    storage: &dyn Storage,
    area: LuksArea,
    passphrase: &str,
) -> Result<Unlocked, LuksError> {
    qcow2_image::luks::unlock(storage, area, &secret(passphrase), WorkLimit::default())
}

/// The slots that are active.
pub(crate) fn active(storage: &dyn Storage, area: LuksArea) -> Vec<usize> {
    let info = qcow2_image::luks::info(storage, area).unwrap();
    let slots = info.slots.iter().enumerate();
    let active = slots.filter(|(_, slot)| slot.active);
    active.map(|(number, _)| number).collect()
}

/// Asserts that nothing beside the area was written.
pub(crate) fn assert_surroundings(memory: &Memory, area: LuksArea) {
    let bytes = memory.to_vec().unwrap();
    let start = usize::try_from(area.offset).unwrap();
    let end = usize::try_from(area.offset + area.len).unwrap();
    assert!(bytes[..start].iter().all(|byte| *byte == 0xee));
    assert!(bytes[end..].iter().all(|byte| *byte == 0xee));
    assert_eq!(bytes.len(), end + start);
}
