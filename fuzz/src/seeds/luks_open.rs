//! LUKS areas that really open: whatever zeros decrypt to is their split master key, and only the digest depends on it.

use qcow2_format::LuksHeader;
use qcow2_format::luks::{LuksParameters, STRIPES};
use qcow2_image::fuzzing::LUKS_PASSPHRASE;
use qcow2_io::cipher::{Algorithm, Hash, IvGenerator, Mode, SectorCipher, derive_key, merge_key};

use crate::Seed;

const SALT: [u8; 32] = [0x5a; 32];
const ITERATIONS: u32 = 1000;

/// Areas of different algorithms, each header followed by what the target wants to know.
pub(crate) fn luks_open() -> Vec<Seed> {
    let cases = [
        (
            Algorithm::Aes256,
            Mode::Xts,
            IvGenerator::Plain64,
            Hash::Sha256,
        ),
        (
            Algorithm::Aes128,
            Mode::Cbc,
            IvGenerator::Essiv(Hash::Sha256),
            Hash::Sha1,
        ),
        (
            Algorithm::Serpent256,
            Mode::Ecb,
            IvGenerator::Plain,
            Hash::Sha512,
        ),
        (
            Algorithm::Twofish192,
            Mode::Xts,
            IvGenerator::Plain64,
            Hash::Ripemd160,
        ),
        (
            Algorithm::Cast5,
            Mode::Ctr,
            IvGenerator::Essiv(Hash::Md5),
            Hash::Sm3,
        ),
    ];
    let seeds = cases.into_iter().zip([0, 4, 6, 1, 2]);
    let seeds = seeds.map(|((algorithm, mode, generator, hash), flags)| {
        let mut bytes = header(algorithm, mode, generator, hash).encode().to_vec();
        // About a megabyte of zeros behind; whether the file has them; the slot that changes.
        bytes.extend([12, 255, flags, 1]);
        Seed::new(format!("{algorithm}-{mode}"), bytes)
    });
    let mut all: Vec<_> = seeds.collect();
    let mut eight = header(
        Algorithm::Aes128,
        Mode::Cbc,
        IvGenerator::Plain64,
        Hash::Sha256,
    );
    for slot in 1..8 {
        let enabled = eight.enable_slot(slot, 1, SALT);
        enabled.expect("there are eight slots");
    }
    let mut bytes = eight.encode().to_vec();
    bytes.extend([12, 255, 2, 0]);
    all.push(Seed::new("eight-slots", bytes));
    all
}

fn header(algorithm: Algorithm, mode: Mode, generator: IvGenerator, hash: Hash) -> LuksHeader {
    let key_len = mode.key_len(algorithm);
    let mut key = vec![0; key_len];
    derive_key(hash, LUKS_PASSPHRASE, &SALT, ITERATIONS, &mut key);
    let cipher = SectorCipher::new(algorithm, mode, generator, &key);
    let mut material = vec![0; key_len * STRIPES as usize];
    cipher
        .and_then(|cipher| cipher.decrypt(0, &mut material))
        .expect("the algorithms go together and the key material fills sectors");
    let master = merge_key(hash, &material, key_len, STRIPES);
    let master = master.expect("the key material is 4000 keys long");
    let mut digest = [0; 20];
    derive_key(hash, &master, &SALT, ITERATIONS, &mut digest);
    let mut header = LuksHeader::new(&LuksParameters {
        cipher_name: algorithm.luks_name().as_bytes(),
        cipher_mode: format!("{mode}-{generator}").as_bytes(),
        hash_spec: hash.to_string().as_bytes(),
        master_key_len: u32::try_from(key_len).expect("keys are short"),
        master_key_digest: digest,
        master_key_salt: SALT,
        master_key_iterations: ITERATIONS,
        uuid: b"01234567-89ab-cdef-0123-456789abcdef",
    })
    .expect("the parameters are those of a LUKS header");
    let enabled = header.enable_slot(0, ITERATIONS, SALT);
    enabled.expect("there is a first slot");
    header
}
