use std::fmt;

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::KeyInit;
use serpent::Serpent;
use sha2::Digest as _;
use zeroize::Zeroizing;

use super::hash::with_digest;
use super::twofish::Twofish;
use super::{Algorithm, CipherError, Hash, IvGenerator, Mode, Secret, modes, xts};

/// Bytes that are enciphered together.
pub const SECTOR_LEN: usize = 512;

/// Sectors that are worked on in one go: enough for a cipher to be chosen once for many.
pub(super) const BATCH: usize = 64;

/// What makes a sector different from others of the same content. Ciphers with shorter blocks use its first bytes.
pub(super) type Iv = [u8; 16];

/// A cipher with its key, for sectors of 512 bytes, each enciphered by itself under its number.
///
/// The key is overwritten on drop. Threads may share one.
pub struct SectorCipher {
    algorithm: Algorithm,
    mode: Mode,
    iv_generator: IvGenerator,
    data: Keyed,
    /// The second key of XTS.
    tweak: Option<Keyed>,
    /// What enciphers sector numbers for ESSIV.
    essiv: Option<Keyed>,
}

/// A block cipher that has its key. Boxed, so that keys don't move about and leave copies.
enum Keyed {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
    Serpent(Box<Serpent>),
    Twofish(Box<Twofish>),
    Cast5(Box<Cast5>),
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// Runs `$body` with the cipher in `$keyed` as `$cipher`.
macro_rules! with_keyed {
    ($keyed:expr, $cipher:ident => $body:expr) => {
        match $keyed {
            Keyed::Cast5($cipher) => $body,
            wide => with_wide!(wide, $cipher => $body, else unreachable!("the arm above")),
        }
    };
}

/// The same, if its blocks have 16 bytes.
macro_rules! with_wide {
    ($keyed:expr, $cipher:ident => $body:expr, else $otherwise:expr) => {
        match $keyed {
            Keyed::Aes128($cipher) => $body,
            Keyed::Aes192($cipher) => $body,
            Keyed::Aes256($cipher) => $body,
            Keyed::Serpent($cipher) => $body,
            Keyed::Twofish($cipher) => $body,
            Keyed::Cast5(_) => $otherwise,
        }
    };
}

impl SectorCipher {
    /// The cipher for `key`, which has [`Mode::key_len`] bytes.
    ///
    /// ECB has no use for IVs, but the generator must make sense all the same, as it must for QEMU.
    ///
    /// # Errors
    ///
    /// [`KeyLength`](CipherError::KeyLength), [`BlockLength`](CipherError::BlockLength) for XTS with CAST-128, and
    /// [`EssivDigest`](CipherError::EssivDigest).
    pub fn new(
        algorithm: Algorithm,
        mode: Mode,
        iv_generator: IvGenerator,
        key: &[u8],
    ) -> Result<Self, CipherError> {
        if mode == Mode::Xts && algorithm.block_len() != 16 {
            return Err(CipherError::BlockLength {
                algorithm,
                found: algorithm.block_len(),
            });
        }
        let wrong_length = || CipherError::KeyLength {
            algorithm,
            mode,
            expected: mode.key_len(algorithm),
            found: key.len(),
        };
        if key.len() != mode.key_len(algorithm) {
            return Err(wrong_length());
        }
        let (first, second) = key.split_at(algorithm.key_len());
        let data = Keyed::new(algorithm, first).ok_or_else(wrong_length)?;
        let tweak = match mode {
            Mode::Xts => Some(Keyed::new(algorithm, second).ok_or_else(wrong_length)?),
            _ => None,
        };
        let essiv = match iv_generator {
            IvGenerator::Essiv(hash) => Some(Keyed::essiv(algorithm, hash, key)?),
            IvGenerator::Plain | IvGenerator::Plain64 => None,
        };
        Ok(Self {
            algorithm,
            mode,
            iv_generator,
            data,
            tweak,
            essiv,
        })
    }

    /// The cipher of qcow2's first encryption method: AES-128-CBC under the first 16 bytes of the passphrase, filled up
    /// with zeros. Nothing can tell whether the passphrase was right.
    pub fn legacy_aes(passphrase: &Secret) -> Self {
        let mut key = Zeroizing::new([0; 16]);
        for (byte, given) in key.iter_mut().zip(passphrase.as_bytes()) {
            *byte = *given;
        }
        Self {
            algorithm: Algorithm::Aes128,
            mode: Mode::Cbc,
            iv_generator: IvGenerator::Plain64,
            data: Keyed::Aes128(Box::new(Aes128::new((&*key).into()))),
            tweak: None,
            essiv: None,
        }
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Where IVs come from.
    pub fn iv_generator(&self) -> IvGenerator {
        self.iv_generator
    }

    /// Enciphers whole sectors in place; the first one has the number `first_sector`.
    ///
    /// # Errors
    ///
    /// [`PartialSector`](CipherError::PartialSector), [`SectorNumber`](CipherError::SectorNumber); then `data` is as it was.
    pub fn encrypt(&self, first_sector: u64, data: &mut [u8]) -> Result<(), CipherError> {
        self.run(Direction::Encrypt, first_sector, data)
    }

    /// Deciphers whole sectors in place; the first one has the number `first_sector`.
    ///
    /// # Errors
    ///
    /// As [`encrypt`](Self::encrypt).
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) -> Result<(), CipherError> {
        self.run(Direction::Decrypt, first_sector, data)
    }

    fn run(&self, direction: Direction, first: u64, data: &mut [u8]) -> Result<(), CipherError> {
        if !data.len().is_multiple_of(SECTOR_LEN) {
            return Err(CipherError::PartialSector { len: data.len() });
        }
        let count = u64::try_from(data.len() / SECTOR_LEN).unwrap_or(u64::MAX);
        if first.checked_add(count).is_none() {
            return Err(CipherError::SectorNumber { first, count });
        }
        let mut ivs = [[0; 16]; BATCH];
        let mut numbers = first..;
        for data in data.chunks_mut(BATCH * SECTOR_LEN) {
            let sectors = data.len() / SECTOR_LEN;
            let ivs = ivs.get_mut(..sectors).unwrap_or_default();
            for (iv, number) in ivs.iter_mut().zip(&mut numbers) {
                *iv = self.plain_iv(number);
            }
            self.run_batch(direction, ivs, data);
        }
        Ok(())
    }

    #[expect(clippy::little_endian_bytes, reason = "IVs are little-endian numbers")]
    fn plain_iv(&self, sector: u64) -> Iv {
        let number = match self.iv_generator {
            IvGenerator::Plain => sector & u64::from(u32::MAX),
            IvGenerator::Plain64 | IvGenerator::Essiv(_) => sector,
        };
        u128::from(number).to_le_bytes()
    }

    /// At most [`BATCH`] sectors, with IVs as yet plain.
    fn run_batch(&self, direction: Direction, ivs: &mut [Iv], data: &mut [u8]) {
        for keyed in [&self.essiv, &self.tweak].into_iter().flatten() {
            keyed.encrypt_ivs(ivs);
        }
        match self.mode {
            Mode::Xts => self.data.xts(direction, ivs, data),
            Mode::Cbc => self.data.cbc(direction, ivs, data),
            Mode::Ctr => self.data.ctr(ivs, data),
            Mode::Ecb => self.data.ecb(direction, data),
        }
    }
}

impl Keyed {
    /// `None` when `key` is not as long as `algorithm` wants it.
    fn new(algorithm: Algorithm, key: &[u8]) -> Option<Self> {
        fn boxed<C: KeyInit>(key: &[u8]) -> Option<Box<C>> {
            C::new_from_slice(key).ok().map(Box::new)
        }
        if key.len() != algorithm.key_len() {
            return None;
        }
        match algorithm {
            Algorithm::Aes128 => boxed(key).map(Self::Aes128),
            Algorithm::Aes192 => boxed(key).map(Self::Aes192),
            Algorithm::Aes256 => boxed(key).map(Self::Aes256),
            Algorithm::Serpent128 | Algorithm::Serpent192 | Algorithm::Serpent256 => {
                boxed(key).map(Self::Serpent)
            }
            Algorithm::Twofish128 | Algorithm::Twofish192 | Algorithm::Twofish256 => {
                Twofish::new(key).map(Self::Twofish)
            }
            Algorithm::Cast5 => boxed(key).map(Self::Cast5),
        }
    }

    /// What enciphers sector numbers: the variant of the cipher that takes a digest for its key.
    fn essiv(algorithm: Algorithm, hash: Hash, key: &[u8]) -> Result<Self, CipherError> {
        let len = hash.digest_len();
        let wrong = || CipherError::EssivDigest {
            name: algorithm.luks_name(),
            hash,
            len,
        };
        let variant = algorithm.with_key_len(len).ok_or_else(wrong)?;
        let mut salt = Zeroizing::new([0; 64]);
        let salt = salt.get_mut(..len).ok_or_else(wrong)?;
        with_digest!(hash, D => salt.copy_from_slice(&D::digest(key)));
        Self::new(variant, salt).ok_or_else(wrong)
    }

    fn encrypt_ivs(&self, ivs: &mut [Iv]) {
        with_keyed!(self, cipher => modes::encrypt_ivs(&**cipher, ivs));
    }

    fn xts(&self, direction: Direction, tweaks: &[Iv], data: &mut [u8]) {
        with_wide!(self, cipher => match direction {
            Direction::Encrypt => xts::encrypt(&**cipher, tweaks, data),
            Direction::Decrypt => xts::decrypt(&**cipher, tweaks, data),
        }, else unreachable!("`SectorCipher::new` refuses XTS with short blocks"));
    }

    fn cbc(&self, direction: Direction, ivs: &[Iv], data: &mut [u8]) {
        with_keyed!(self, cipher => match direction {
            Direction::Encrypt => modes::encrypt_cbc(&**cipher, ivs, data),
            Direction::Decrypt => modes::decrypt_cbc(&**cipher, ivs, data),
        });
    }

    fn ctr(&self, ivs: &[Iv], data: &mut [u8]) {
        with_keyed!(self, cipher => modes::apply_ctr(&**cipher, ivs, data));
    }

    fn ecb(&self, direction: Direction, data: &mut [u8]) {
        with_keyed!(self, cipher => match direction {
            Direction::Encrypt => modes::encrypt_ecb(&**cipher, data),
            Direction::Decrypt => modes::decrypt_ecb(&**cipher, data),
        });
    }
}

/// Shows what kind of cipher it is, never its key.
impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            algorithm,
            mode,
            iv_generator,
            ..
        } = self;
        write!(f, "SectorCipher({algorithm}-{mode}-{iv_generator})")
    }
}
