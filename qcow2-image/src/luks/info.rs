use qcow2_format::luks::{LuksKeySlot, LuksSlotState};
use qcow2_io::Storage;
use qcow2_io::cipher::{Algorithm, Hash, IvGenerator, Mode};

use super::area::Area;
use super::suite::{Suite, text};
use super::{LuksArea, LuksError};

/// What an area tells without a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LuksInfo {
    /// What data is encrypted with.
    pub algorithm: Algorithm,
    /// How it is put to the blocks of a sector.
    pub mode: Mode,
    /// Where initialization vectors come from.
    pub iv_generator: IvGenerator,
    /// What keys are derived with.
    pub hash: Hash,
    /// UUID as text.
    pub uuid: String,
    /// Byte behind the key material, from the start of the area. Inside qcow2 guest data lies elsewhere.
    pub payload_offset: u64,
    /// Iterations of the digest that tells the right master key.
    pub master_key_iterations: u32,
    /// Rounds of PBKDF2 that a wrong passphrase costs: what [`WorkLimit`](super::WorkLimit) limits.
    pub work: u64,
    /// The key slots.
    pub slots: [LuksSlotInfo; 8],
}

/// What a slot tells without a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LuksSlotInfo {
    /// Whether a passphrase opens it.
    pub active: bool,
    /// Iterations that derive its key; 0 when it is not active.
    pub iterations: u32,
    /// First byte of its key material, from the start of the area.
    pub key_offset: u64,
    /// Anti-forensic stripes of its key material.
    pub stripes: u32,
}

/// What an area tells without a passphrase.
///
/// # Errors
///
/// A header that is damaged, or names algorithms unknown to this crate; key material of active slots outside area or file; a
/// storage that fails.
pub fn info(storage: &dyn Storage, area: LuksArea) -> Result<LuksInfo, LuksError> {
    let header = Area::new(storage, area).header()?;
    let suite = Suite::named_by(&header)?;
    let material = header.key_material();
    let slots = header.slots();
    let slot = |number: usize| {
        let (slot, material) = (slots.get(number), material.get(number));
        LuksSlotInfo {
            active: slot.is_some_and(|slot| slot.state() == LuksSlotState::Enabled),
            iterations: slot.map_or(0, LuksKeySlot::iterations),
            key_offset: material.map_or(0, |material| material.offset),
            stripes: slot.map_or(0, LuksKeySlot::stripes),
        }
    };
    Ok(LuksInfo {
        algorithm: suite.algorithm,
        mode: suite.mode,
        iv_generator: suite.iv_generator,
        hash: suite.hash,
        uuid: text(header.uuid()).into_owned(),
        payload_offset: header.payload_offset(),
        master_key_iterations: header.master_key_iterations(),
        work: suite.work(&header, &super::suite::active(&header)),
        slots: std::array::from_fn(slot),
    })
}
