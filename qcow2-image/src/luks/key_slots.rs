use qcow2_format::LuksHeader;
use qcow2_format::luks::SLOTS;
use qcow2_io::Storage;
use qcow2_io::cipher::{Secret, random};

use super::area::Area;
use super::suite::{Suite, active};
use super::{KeyCost, LuksArea, LuksError, Unlocked, WorkLimit};

/// How often erased key material is overwritten.
const ERASURES: usize = 40;

/// The key slots of an area, to be changed as `qemu-img amend` changes them.
///
/// The header is read anew by every call and belongs to nobody else meanwhile: the caller keeps other writers out.
///
/// # Durability
///
/// All is durable on return. When the machine fails meanwhile, an active slot is a whole one: key material is on the disk before its
/// slot is made active, and a slot is made inactive before its key material is touched.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct KeySlots<'a> {
    area: Area<'a>,
    limit: WorkLimit,
    force: bool,
}

/// A slot that is not on the disk yet.
struct Sealed {
    iterations: u32,
    salt: [u8; 32],
    material: Vec<u8>,
}

impl<'a> KeySlots<'a> {
    /// Those of the area there.
    pub fn new(storage: &'a dyn Storage, area: LuksArea) -> Self {
        Self {
            area: Area::new(storage, area),
            limit: WorkLimit::default(),
            force: false,
        }
    }

    /// How much work old passphrases may be.
    pub fn limit(mut self, limit: WorkLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Whether active slots may be overwritten, inactive ones erased, and **the last active slot erased, after which nobody
    /// can read the disk any more**.
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// Adds a passphrase to `slot`, or to the first that is not active; gives the slot.
    ///
    /// If the only active slot is overwritten, the passphrase lies in another slot meanwhile, so that at any moment one of
    /// the two opens the disk.
    ///
    /// # Errors
    ///
    /// No such slot; an active one, unless forced; no free one. `unlocked` is not of this area. All reasons for which an area
    /// can't be [opened](super::unlock).
    pub fn add(
        &self,
        unlocked: &Unlocked,
        passphrase: &Secret,
        slot: Option<u8>,
        cost: KeyCost,
    ) -> Result<u8, LuksError> {
        let mut header = self.area.header()?;
        let suite = Suite::of(&header)?;
        let master = unlocked.master_of(suite, &header)?;
        let active = active(&header);
        let free = numbers().find(|slot| !active.contains(slot));
        let slot = match slot {
            None => free.ok_or(LuksError::NoFreeSlot)?,
            Some(slot) if usize::from(slot) >= SLOTS => return Err(LuksError::NoSuchSlot { slot }),
            Some(slot) if active.contains(&slot) && !self.force => {
                return Err(LuksError::SlotActive { slot });
            }
            Some(slot) => slot,
        };
        self.area.material(&header, slot)?;

        let mut salt = [0; 32];
        random(&mut salt)?;
        let iterations = cost.iterations(suite.hash, suite.key_len())?;
        let sealed = Sealed {
            iterations,
            salt,
            material: suite.seal(master, passphrase, &salt, iterations)?,
        };
        match free {
            Some(spare) if active == [slot] => {
                self.place(&mut header, spare, &sealed)?;
                self.place(&mut header, slot, &sealed)?;
                self.wipe(&mut header, spare)?;
            }
            _ => self.place(&mut header, slot, &sealed)?,
        }
        Ok(slot)
    }

    /// Erases a slot; if `old` is given, only if that passphrase opens it.
    ///
    /// # Errors
    ///
    /// No such slot; another passphrase; unless forced, a slot that is not active, or the last active one. All reasons for
    /// which an area can't be [opened](super::unlock).
    pub fn erase(&self, slot: u8, old: Option<&Secret>) -> Result<(), LuksError> {
        let mut header = self.area.header()?;
        if usize::from(slot) >= SLOTS {
            return Err(LuksError::NoSuchSlot { slot });
        }
        self.area.material(&header, slot)?;
        let active = active(&header);
        if let Some(old) = old
            && self.matching(&header, &[slot], old)?.is_empty()
        {
            return Err(LuksError::SlotOfOther { slot });
        }
        if !self.force {
            if !active.contains(&slot) {
                return Err(LuksError::SlotInactive { slot });
            }
            if active == [slot] {
                return Err(LuksError::LastSlot { slot });
            }
        }
        self.wipe(&mut header, slot)
    }

    /// Erases every slot that a passphrase opens; gives the slots.
    ///
    /// # Errors
    ///
    /// It opens none; it opens all active ones, unless forced. All reasons for which an area can't be
    /// [opened](super::unlock).
    pub fn erase_matching(&self, old: &Secret) -> Result<Vec<u8>, LuksError> {
        let mut header = self.area.header()?;
        let active = active(&header);
        let matching = self.matching(&header, &active, old)?;
        if matching.is_empty() {
            return Err(LuksError::NoSlotMatches);
        }
        if matching == active && !self.force {
            return Err(LuksError::AllSlotsMatch);
        }
        for slot in &matching {
            self.wipe(&mut header, *slot)?;
        }
        Ok(matching)
    }

    /// Those of `slots` that the passphrase opens.
    fn matching(
        &self,
        header: &LuksHeader,
        slots: &[u8],
        passphrase: &Secret,
    ) -> Result<Vec<u8>, LuksError> {
        let suite = Suite::of(header)?;
        let active = active(header);
        let mut matching: Vec<u8> = slots.to_vec();
        matching.retain(|slot| active.contains(slot));
        self.limit.check(suite.work(header, &matching))?;
        let mut open = Vec::new();
        for slot in matching {
            if suite.open(&self.area, header, slot, passphrase)?.is_some() {
                open.push(slot);
            }
        }
        Ok(open)
    }

    /// Writes a slot with its key material.
    fn place(&self, header: &mut LuksHeader, slot: u8, sealed: &Sealed) -> Result<(), LuksError> {
        const ACTION: &str = "write key material";
        let place = self.area.material(header, slot)?;
        if active(header).contains(&slot) {
            self.disable(header, slot)?;
        }
        self.area.write(place.offset, &sealed.material, ACTION)?;
        self.area.flush(ACTION)?;
        header.enable_slot(slot.into(), sealed.iterations, sealed.salt)?;
        self.area.write_slot(header, slot)
    }

    /// Makes a slot inactive and its key material unreadable for good. Each pass is flushed, or the medium might see only the
    /// last.
    fn wipe(&self, header: &mut LuksHeader, slot: u8) -> Result<(), LuksError> {
        const ACTION: &str = "overwrite key material";
        let place = self.area.material(header, slot)?;
        self.disable(header, slot)?;
        let mut noise = vec![0; usize::try_from(place.len_bytes).unwrap_or_default()];
        for _ in 0..ERASURES {
            random(&mut noise)?;
            self.area.write(place.offset, &noise, ACTION)?;
            self.area.flush(ACTION)?;
        }
        Ok(())
    }

    fn disable(&self, header: &mut LuksHeader, slot: u8) -> Result<(), LuksError> {
        header.disable_slot(slot.into())?;
        self.area.write_slot(header, slot)
    }
}

fn numbers() -> impl Iterator<Item = u8> {
    (0_u8..).take(SLOTS)
}
