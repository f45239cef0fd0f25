use std::borrow::Cow;

use qcow2_format::LuksHeader;
use qcow2_format::luks::{LuksSlotState, STRIPES};
use qcow2_io::cipher::{
    Algorithm, Hash, IvGenerator, Mode, Secret, SectorCipher, Zeroizing, derive_key, merge_key,
    split_key,
};

use super::LuksError;
use super::area::Area;

/// Bytes of the digest that tells the right master key.
const DIGEST_LEN: usize = 20;

/// A master key.
pub(super) type Key = Zeroizing<Vec<u8>>;

/// All algorithms of a header, known and fit for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suite {
    pub(super) algorithm: Algorithm,
    pub(super) mode: Mode,
    pub(super) iv_generator: IvGenerator,
    pub(super) hash: Hash,
}

impl Suite {
    /// What the header names, without a look at whether it goes together.
    pub(super) fn named_by(header: &LuksHeader) -> Result<Self, LuksError> {
        let mode = text(header.cipher_mode());
        let (mode, iv_generator) = mode.split_once('-').unwrap_or((&mode, ""));
        let mode: Mode = mode.parse()?;
        let key_len = usize::try_from(header.master_key_len()).unwrap_or(usize::MAX);
        Ok(Self {
            algorithm: Algorithm::from_luks(&text(header.cipher_name()), mode, key_len)?,
            mode,
            iv_generator: iv_generator.parse()?,
            hash: text(header.hash_spec()).parse()?,
        })
    }

    /// What the header names, if it goes together.
    pub(super) fn of(header: &LuksHeader) -> Result<Self, LuksError> {
        let suite = Self::named_by(header)?;
        suite.check()?;
        Ok(suite)
    }

    /// Whether all goes together, and key material can be encrypted.
    pub(super) fn check(self) -> Result<(), LuksError> {
        LuksHeader::area_len(self.key_len_bytes())?;
        self.cipher(&vec![0; self.key_len()]).map(drop)
    }

    /// Bytes of the master key, and of the key that a slot's key material is encrypted with.
    pub(super) fn key_len(self) -> usize {
        self.mode.key_len(self.algorithm)
    }

    pub(super) fn key_len_bytes(self) -> u32 {
        u32::try_from(self.key_len()).unwrap_or(u32::MAX)
    }

    pub(super) fn cipher(self, key: &[u8]) -> Result<SectorCipher, LuksError> {
        let cipher = SectorCipher::new(self.algorithm, self.mode, self.iv_generator, key);
        Ok(cipher?)
    }

    pub(super) fn digest(self, master: &[u8], salt: &[u8], iterations: u32) -> [u8; DIGEST_LEN] {
        let mut digest = [0; DIGEST_LEN];
        derive_key(self.hash, master, salt, iterations, &mut digest);
        digest
    }

    /// Iterations for the digest that take an eighth of what a passphrase takes, as QEMU has it.
    pub(super) fn digest_iterations(self, cost: super::KeyCost) -> Result<u32, LuksError> {
        let iterations = cost.iterations(self.hash, DIGEST_LEN)? / 8;
        Ok(iterations.max(qcow2_io::cipher::MIN_ITERATIONS))
    }

    /// The master key, split and encrypted for a slot.
    pub(super) fn seal(
        self,
        master: &[u8],
        passphrase: &Secret,
        salt: &[u8],
        iterations: u32,
    ) -> Result<Vec<u8>, LuksError> {
        let cipher = self.slot_cipher(passphrase, salt, iterations)?;
        let mut material = split_key(self.hash, master, STRIPES)?;
        cipher.encrypt(0, &mut material)?;
        Ok(std::mem::take(&mut *material))
    }

    /// What the passphrase makes of a slot, if that is the master key. The slot must be an active one of `header`.
    pub(super) fn open(
        self,
        area: &Area<'_>,
        header: &LuksHeader,
        slot: u8,
        passphrase: &Secret,
    ) -> Result<Option<Key>, LuksError> {
        let place = area.material(header, slot)?;
        let slots = header.slots();
        let Some(slot) = slots.get(usize::from(slot)) else {
            return Ok(None);
        };
        let len = usize::try_from(place.len_bytes).unwrap_or_default();
        let mut material = Zeroizing::new(vec![0; len]);
        area.read(place.offset, &mut material, "read key material")?;
        let cipher = self.slot_cipher(passphrase, slot.salt(), slot.iterations())?;
        cipher.decrypt(0, &mut material)?;
        let key = merge_key(self.hash, &material, self.key_len(), STRIPES)?;
        let digest = self.digest(
            &key,
            header.master_key_salt(),
            header.master_key_iterations(),
        );
        Ok((digest == *header.master_key_digest()).then_some(key))
    }

    /// Rounds of PBKDF2 for a passphrase and these slots.
    pub(super) fn work(self, header: &LuksHeader, slots: &[u8]) -> u64 {
        let blocks = |len: usize| len.div_ceil(self.hash.digest_len()) as u64;
        let digest = u64::from(header.master_key_iterations()) * blocks(DIGEST_LEN);
        let all = header.slots();
        let asked = slots.iter().filter_map(|slot| all.get(usize::from(*slot)));
        asked
            .map(|slot| u64::from(slot.iterations()) * blocks(self.key_len()) + digest)
            .sum()
    }

    fn slot_cipher(
        self,
        passphrase: &Secret,
        salt: &[u8],
        iterations: u32,
    ) -> Result<SectorCipher, LuksError> {
        let mut key = Zeroizing::new(vec![0; self.key_len()]);
        derive_key(self.hash, passphrase.as_bytes(), salt, iterations, &mut key);
        self.cipher(&key)
    }
}

/// The slots that a passphrase can open.
pub(super) fn active(header: &LuksHeader) -> Vec<u8> {
    let slots = (0..).zip(header.slots());
    let active = slots.filter(|(_, slot)| slot.state() == LuksSlotState::Enabled);
    active.map(|(number, _)| number).collect()
}

/// Names are ASCII; anything else is no name, and looks odd in the error.
pub(super) fn text(name: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(name)
}
