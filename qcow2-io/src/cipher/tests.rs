use std::io::{self, Read};
use std::time::Duration;

use ::cipher::KeyInit as _;
use aes::{Aes128, Aes256};
use sha2::{Digest as _, Sha256};

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| digit(pair[0]) << 4 | digit(pair[1]))
        .collect()
}

/// A sector whose bytes count up.
fn counting_sector() -> Vec<u8> {
    (0..=255).chain(0..=255).collect()
}

/// A sector that starts with `bytes`.
fn sector_with(bytes: &[u8]) -> Vec<u8> {
    let mut sector = bytes.to_vec();
    sector.resize(SECTOR_LEN, 0);
    sector
}

fn iv(text: &str) -> [u8; 16] {
    hex(text).try_into().unwrap()
}

/// Every cipher that can be, but for hashes that don't matter.
fn all_ciphers() -> Vec<SectorCipher> {
    let key: Vec<u8> = (100..164).collect();
    let generators = [
        IvGenerator::Plain,
        IvGenerator::Plain64,
        IvGenerator::Essiv(Hash::Md5),
        IvGenerator::Essiv(Hash::Sha256),
    ];
    let mut ciphers = Vec::new();
    for algorithm in Algorithm::ALL {
        for mode in Mode::ALL {
            for generator in generators {
                let key = &key[..mode.key_len(algorithm)];
                ciphers.extend(SectorCipher::new(algorithm, mode, generator, key));
            }
        }
    }
    ciphers
}

/// What the four blocks of NIST's examples (SP 800-38A, appendix F) are.
const NIST_PLAIN: &str = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
    30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710";
const NIST_KEY_128: &str = "2b7e151628aed2a6abf7158809cf4f3c";
const NIST_KEY_256: &str = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4";

#[test]
fn ecb_is_as_nist_says() {
    let key = hex(NIST_KEY_256);
    let cipher = SectorCipher::new(Algorithm::Aes256, Mode::Ecb, IvGenerator::Plain, &key).unwrap();
    let plain = sector_with(&hex(NIST_PLAIN));
    let mut data = plain.clone();
    cipher.encrypt(7, &mut data).unwrap();
    let expected = hex(
        "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870\
         b6ed21b99ca6f4f9f153e7b1beafed1d23304b7a39f9f3ff067d8d8f9e24ecc7",
    );
    assert_eq!(data[..64], expected);
    cipher.decrypt(1, &mut data).unwrap();
    assert_eq!(data, plain);
}

#[test]
fn cbc_is_as_nist_says() {
    let cipher = Aes128::new_from_slice(&hex(NIST_KEY_128)).unwrap();
    let ivs = [iv("000102030405060708090a0b0c0d0e0f")];
    let plain = sector_with(&hex(NIST_PLAIN));
    let mut data = plain.clone();
    modes::encrypt_cbc(&cipher, &ivs, &mut data);
    let expected = hex(
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2\
         73bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
    );
    assert_eq!(data[..64], expected);
    modes::decrypt_cbc(&cipher, &ivs, &mut data);
    assert_eq!(data, plain);
}

#[test]
fn ctr_is_as_nist_says() {
    let cipher = Aes256::new_from_slice(&hex(NIST_KEY_256)).unwrap();
    let ivs = [iv("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")];
    let mut data = sector_with(&hex(NIST_PLAIN));
    modes::apply_ctr(&cipher, &ivs, &mut data);
    let expected = hex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5\
         2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
    );
    assert_eq!(data[..64], expected);
}

#[test]
fn xts_is_as_ieee_1619_says() {
    // Vectors 4 and 10.
    for (algorithm, key, sector, first, last) in [
        (
            Algorithm::Aes128,
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
            "0a282df920147beabe421ee5319d0568",
        ),
        (
            Algorithm::Aes256,
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
            0xff,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "c4f36ffda9fcea70b9c6e693e148c151",
        ),
    ] {
        let cipher =
            SectorCipher::new(algorithm, Mode::Xts, IvGenerator::Plain64, &hex(key)).unwrap();
        let mut data = counting_sector();
        cipher.encrypt(sector, &mut data).unwrap();
        assert_eq!(data[..32], hex(first));
        assert_eq!(data[496..], hex(last), "{algorithm}");
        cipher.decrypt(sector, &mut data).unwrap();
        assert_eq!(data, counting_sector());
    }
}

/// The digests are those of what `openssl enc` gives for the same key and IV.
#[test]
fn ivs_are_what_openssl_is_given_by_hand() {
    let key: Vec<u8> = (0..16).collect();
    for (algorithm, mode, generator, sector, key, expected) in [
        (
            Algorithm::Aes128,
            Mode::Cbc,
            IvGenerator::Essiv(Hash::Sha256),
            5,
            key.clone(),
            "800bc7ac24b9ee7fd073b8ab9d4263cc915e952211938126a782c8d32f749e42",
        ),
        (
            Algorithm::Cast5,
            Mode::Cbc,
            IvGenerator::Plain,
            0x7_0000_0005,
            key.clone(),
            "2cf35edbf23cdb74aecd436d8d0ba7b36dfdb047cf8c28e12630cad34ec803c0",
        ),
        (
            Algorithm::Aes256,
            Mode::Ctr,
            IvGenerator::Plain64,
            u64::MAX - 1,
            [key.clone(), key].concat(),
            "e570bd0f79b872471b39612ef901f5dd544c50e830b2f7cc2354f807eb26b584",
        ),
    ] {
        let cipher = SectorCipher::new(algorithm, mode, generator, &key).unwrap();
        let mut data = counting_sector();
        cipher.encrypt(sector, &mut data).unwrap();
        assert_eq!(Sha256::digest(&data)[..], hex(expected), "{cipher:?}");
    }
}

#[test]
fn legacy_aes_cuts_the_passphrase_or_fills_it_up() {
    let encrypted = |passphrase: &str| {
        let cipher = SectorCipher::legacy_aes(&Secret::new(passphrase.into()));
        let mut data = counting_sector();
        cipher.encrypt(3, &mut data).unwrap();
        data
    };
    let expected = hex("f2bf6ec42cf10473aa5c74b5f6bcffa0255300ebe6fc005195561921611049c0");
    assert_eq!(Sha256::digest(encrypted("hello"))[..], expected);
    assert_eq!(encrypted("hello"), encrypted("hello\0\0"));
    assert_eq!(
        encrypted("0123456789abcdef"),
        encrypted("0123456789abcdefg")
    );
    assert_ne!(encrypted("0123456789abcdef"), encrypted("0123456789abcde"));
}

/// The last of the published vectors, of the longest key, and then many keys against the other implementation.
#[test]
fn twofish_is_the_twofish_of_others() {
    use ::cipher::{BlockCipherDecrypt as _, BlockCipherEncrypt as _};

    let key = hex("d43bb7556ea32e46f2a282b7d45b4e0d57ff739d4dc92c1bd7fc01700cc8216f");
    let plain = hex("90afe91bb288544f2c32dc239b2635e6");
    let mut block = ::cipher::Array(plain.try_into().unwrap());
    twofish::Twofish::new(&key)
        .unwrap()
        .encrypt_block(&mut block);
    assert_eq!(block[..], hex("6cb4561c40bf0a9705931cb6d408e7fa"));

    for seed in 0_u32..60 {
        let key = Sha256::digest(seed.to_string());
        let key = &key[..[16, 24, 32][seed as usize % 3]];
        let ours = twofish::Twofish::new(key).unwrap();
        let theirs = ::twofish::Twofish::new_from_slice(key).unwrap();
        for _ in 0..20 {
            let before = block;
            ours.encrypt_block(&mut block);
            let mut expected = before;
            theirs.encrypt_block(&mut expected);
            assert_eq!(block, expected);
            ours.decrypt_block(&mut expected);
            assert_eq!(expected, before);
        }
    }
    for len in [0, 15, 17, 31, 33] {
        assert!(twofish::Twofish::new(&[0; 33][..len]).is_none());
    }
}

#[test]
fn many_sectors_at_once_are_as_each_by_itself() {
    let sectors = 2 * sector::BATCH + 3;
    let plain: Vec<u8> = (0..sectors * SECTOR_LEN)
        .map(|i| u8::try_from(i / 3 % 251).unwrap())
        .collect();
    let ciphers = all_ciphers();
    // With four generators: three by three of the wide ciphers in four modes, CAST-128 in three with all but SHA-256.
    assert_eq!(ciphers.len(), 9 * 4 * 4 + 3 * 3);
    for cipher in ciphers {
        let first = u64::from(u32::MAX) - 1;
        let mut together = plain.clone();
        cipher.encrypt(first, &mut together).unwrap();
        let mut alone = plain.clone();
        for (number, sector) in (first..).zip(alone.chunks_mut(SECTOR_LEN)) {
            cipher.encrypt(number, sector).unwrap();
        }
        assert!(together == alone, "{cipher:?}");
        assert!(together != plain, "{cipher:?}");
        cipher.decrypt(first, &mut together).unwrap();
        assert!(together == plain, "{cipher:?}");
        for (number, sector) in (first..).zip(alone.chunks_mut(SECTOR_LEN)) {
            cipher.decrypt(number, sector).unwrap();
        }
        assert!(alone == plain, "{cipher:?}");
    }
}

#[test]
fn plain_starts_over_where_plain64_goes_on() {
    let key = [9; 64];
    let cipher =
        |generator| SectorCipher::new(Algorithm::Aes256, Mode::Xts, generator, &key).unwrap();
    let encrypted = |cipher: &SectorCipher, number| {
        let mut data = counting_sector();
        cipher.encrypt(number, &mut data).unwrap();
        data
    };
    let (short, long) = (cipher(IvGenerator::Plain), cipher(IvGenerator::Plain64));
    assert!(encrypted(&short, 8) == encrypted(&long, 8));
    assert!(encrypted(&short, 8) == encrypted(&short, (1 << 32) + 8));
    assert!(encrypted(&long, 8) != encrypted(&long, (1 << 32) + 8));
}

#[test]
fn what_makes_no_cipher_is_said() {
    let new = |algorithm, mode, generator, len: usize| {
        SectorCipher::new(algorithm, mode, generator, &[1; 64][..len]).unwrap_err()
    };
    assert_eq!(
        new(Algorithm::Cast5, Mode::Xts, IvGenerator::Plain, 32),
        CipherError::BlockLength {
            algorithm: Algorithm::Cast5,
            found: 8
        }
    );
    assert_eq!(
        new(Algorithm::Aes256, Mode::Xts, IvGenerator::Plain, 32),
        CipherError::KeyLength {
            algorithm: Algorithm::Aes256,
            mode: Mode::Xts,
            expected: 64,
            found: 32
        }
    );
    for (algorithm, hash) in [
        (Algorithm::Aes128, Hash::Sha1),
        (Algorithm::Aes256, Hash::Sha512),
        (Algorithm::Serpent256, Hash::Sha224),
        (Algorithm::Cast5, Hash::Sha256),
    ] {
        let error = new(
            algorithm,
            Mode::Cbc,
            IvGenerator::Essiv(hash),
            algorithm.key_len(),
        );
        assert!(
            matches!(error, CipherError::EssivDigest { hash: found, .. } if found == hash),
            "{error}"
        );
    }
    // QEMU never makes such an image; one that exists can be read.
    let odd = IvGenerator::Essiv(Hash::Sha256);
    assert!(SectorCipher::new(Algorithm::Aes192, Mode::Cbc, odd, &[1; 24]).is_ok());
}

#[test]
fn only_whole_sectors_with_numbers_are_taken() {
    let cipher = SectorCipher::legacy_aes(&Secret::new(b"x".to_vec()));
    let mut data = [5; 1000];
    assert_eq!(
        cipher.encrypt(0, &mut data),
        Err(CipherError::PartialSector { len: 1000 })
    );
    assert_eq!(
        cipher.decrypt(u64::MAX, &mut data[..512]),
        Err(CipherError::SectorNumber {
            first: u64::MAX,
            count: 1
        })
    );
    assert_eq!(data, [5; 1000]);
    assert_eq!(cipher.encrypt(u64::MAX, &mut []), Ok(()));
}

#[test]
fn names_are_read_as_they_are_written() {
    for algorithm in Algorithm::ALL {
        assert_eq!(algorithm.to_string().parse(), Ok(algorithm));
        for mode in Mode::ALL {
            let len = mode.key_len(algorithm);
            assert_eq!(
                Algorithm::from_luks(algorithm.luks_name(), mode, len),
                Ok(algorithm)
            );
        }
    }
    for mode in Mode::ALL {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    for hash in Hash::ALL {
        assert_eq!(hash.to_string().parse(), Ok(hash));
        let essiv = IvGenerator::Essiv(hash);
        assert_eq!(essiv.to_string().parse(), Ok(essiv));
    }
    assert_eq!("plain64:sha1".parse(), Ok(IvGenerator::Plain64));
    assert_eq!("plain".parse(), Ok(IvGenerator::Plain));
    assert_eq!(
        "essiv".parse::<IvGenerator>(),
        Err(CipherError::EssivWithoutHash)
    );
    let unknown = |what, name: &str| CipherError::UnknownName {
        what,
        name: name.to_owned(),
    };
    assert_eq!(
        "plain:sha0".parse::<IvGenerator>(),
        Err(unknown("hash", "sha0"))
    );
    assert_eq!(
        "benbi".parse::<IvGenerator>(),
        Err(unknown("IV generator", "benbi"))
    );
    assert_eq!("lrw".parse::<Mode>(), Err(unknown("cipher mode", "lrw")));
    assert_eq!(
        "AES-256".parse::<Algorithm>(),
        Err(unknown("cipher", "AES-256"))
    );
    assert_eq!(
        Algorithm::from_luks("sm4", Mode::Xts, 32),
        Err(unknown("cipher", "sm4"))
    );
    assert_eq!(
        Algorithm::from_luks("aes", Mode::Xts, 16),
        Err(CipherError::NoSuchKeyLength {
            name: "aes".to_owned(),
            mode: Mode::Xts,
            len: 16
        })
    );
}

#[test]
fn keys_are_derived_as_rfc_6070_says() {
    for (passphrase, salt, iterations, expected) in [
        (
            "password",
            "salt",
            1,
            "0c60c80f961f0e71f3a9b524af6012062fe037a6",
        ),
        (
            "password",
            "salt",
            2,
            "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957",
        ),
        (
            "password",
            "salt",
            4096,
            "4b007901b765489abead49d926f721d065a429c1",
        ),
        (
            "passwordPASSWORDpassword",
            "saltSALTsaltSALTsaltSALTsaltSALTsalt",
            4096,
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038",
        ),
        (
            "pass\0word",
            "sa\0lt",
            4096,
            "56fa6aa75548099dcc37d7f03425e0c3",
        ),
    ] {
        let expected = hex(expected);
        let mut key = vec![0; expected.len()];
        derive_key(
            Hash::Sha1,
            passphrase.as_bytes(),
            salt.as_bytes(),
            iterations,
            &mut key,
        );
        assert_eq!(key, expected);
    }
}

/// Expected is what `openssl kdf` gives.
#[test]
fn keys_are_derived_with_every_hash() {
    for (hash, expected) in [
        (
            Hash::Md5,
            "7eabe9565da09d44171be9688272dbad654e47df57c18262152d2cc8afc72914fac5b91bda938db0",
        ),
        (
            Hash::Sha1,
            "3cd650c87be3884db2c7e7a4107104b98a3db4e6a8c8a7453d33901fd4db8d8a1039f000e2303dc3",
        ),
        (
            Hash::Sha224,
            "826c7c7e747c2b749e85b1c328355f0dfd80bf55550db083638b7969a8c056e23d0eabb207b43c20",
        ),
        (
            Hash::Sha256,
            "455bea3c8a15f795cdb3c9c31791652366c5aa5f82c35d4190af82979ed4bcbf1c359e641e84376d",
        ),
        (
            Hash::Sha384,
            "53832450d266339fc428916f0ffcbefbe21f95fb5e752c7706d8c4d083a44c328104a1c1b9f22fa5",
        ),
        (
            Hash::Sha512,
            "7e0cb56ff8009f0db9f8a2fa36b50c0a53ec56ab98cc74005cb5133acb24e6750beb8e84981c9f7b",
        ),
        (
            Hash::Ripemd160,
            "4d96053ad78266f426bc19acff731129719ee4e56502766d65287e039be3e0bd4e7f2ed3f38f6083",
        ),
        (
            Hash::Sm3,
            "3d4180f88c39a57dd185392f71863fd19c5cf1687e086fe1a01c6c12c1c88ad042cb3c75d1cbe1e6",
        ),
    ] {
        let mut key = [0; 40];
        derive_key(hash, b"correct horse", b"saltSALT", 7, &mut key);
        assert_eq!(key[..], hex(expected), "{hash}");
    }
}

#[test]
fn calibration_scales_and_never_goes_too_low() {
    let second = Duration::from_secs(1);
    assert_eq!(key::scale(3000, second, 2 * second), 6000);
    assert_eq!(key::scale(3000, second, Duration::ZERO), MIN_ITERATIONS);
    assert_eq!(key::scale(3000, Duration::ZERO, second), u32::MAX);
    assert_eq!(key::scale(u32::MAX, second, Duration::MAX), u32::MAX);
    assert_eq!(calibrate(Hash::Sha256, 20, Duration::ZERO), MIN_ITERATIONS);
    assert!(calibrate(Hash::Sha256, 20, 100_000 * second) > MIN_ITERATIONS);
}

#[test]
fn split_keys_merge_and_damaged_ones_do_not() {
    for hash in Hash::ALL {
        // Shorter than a digest, as long as some, and with an odd piece at the end.
        for len in [1, 16, 20, 32, 64, 67] {
            let key: Vec<u8> = (1..=len).collect();
            let mut material = split_key(hash, &key, 9).unwrap();
            assert_eq!(material.len(), 9 * key.len());
            assert_eq!(*merge_key(hash, &material, key.len(), 9).unwrap(), key);
            if len == 1 {
                // Another key has one chance in 256 to be the same.
                continue;
            }
            material[0] ^= 1;
            assert_ne!(*merge_key(hash, &material, key.len(), 9).unwrap(), key);
        }
    }
    assert_eq!(*split_key(Hash::Sha1, b"key", 1).unwrap(), b"key");
    assert_ne!(
        *split_key(Hash::Sha1, b"key", 4).unwrap(),
        *split_key(Hash::Sha1, b"key", 4).unwrap()
    );
}

#[test]
fn key_material_has_the_length_of_its_stripes() {
    let wrong = |found, key_len, stripes| CipherError::Stripes {
        found,
        key_len,
        stripes,
    };
    let merge = |found, key_len, stripes| {
        merge_key(Hash::Sha1, &[0; 64][..found], key_len, stripes).unwrap_err()
    };
    for (found, key_len, stripes) in [
        (64, 16, 3),
        (64, 16, 5),
        (0, 0, 4),
        (0, 16, 0),
        (64, usize::MAX, u32::MAX),
    ] {
        assert_eq!(
            merge(found, key_len, stripes),
            wrong(found, key_len, stripes)
        );
    }
    assert_eq!(split_key(Hash::Sha1, b"", 4).unwrap_err(), wrong(0, 0, 4));
    assert_eq!(
        split_key(Hash::Sha1, b"key", 0).unwrap_err(),
        wrong(0, 3, 0)
    );
}

#[test]
fn random_bytes_differ() {
    let (mut one, mut two) = ([0; 32], [0; 32]);
    random(&mut one).unwrap();
    random(&mut two).unwrap();
    assert_ne!(one, two);
}

/// Gives a byte at a time, with interruptions.
struct Trickle<'a>(&'a [u8], bool);

impl Read for Trickle<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.0.read(&mut out[..1])
    }
}

#[test]
fn secrets_come_whole_or_not_at_all() {
    let read = Secret::from_reader(Trickle(b"two\nlines\n\0", false)).unwrap();
    assert_eq!(read.as_bytes(), b"two\nlines\n\0");
    let longest = vec![b'x'; Secret::MAX_LEN];
    assert_eq!(
        Secret::from_reader(&longest[..]).unwrap().as_bytes(),
        longest
    );
    let endless = Secret::from_reader(io::repeat(b'x')).unwrap_err();
    assert_eq!(endless.to_string(), "the secret is longer than 65536 bytes");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    std::fs::write(&path, "with a newline\n").unwrap();
    assert_eq!(
        Secret::from_file(&path).unwrap().as_bytes(),
        b"with a newline\n"
    );
    let missing = Secret::from_file(dir.path().join("none")).unwrap_err();
    assert!(matches!(missing, SecretError::File { .. }), "{missing}");

    // Every process started by cargo has this one.
    let name = "CARGO_PKG_NAME";
    assert_eq!(Secret::from_env(name).unwrap().as_bytes(), b"qcow2-io");
    for name in ["NO_SUCH_VARIABLE_HERE", "", "a=b"] {
        let missing = Secret::from_env(name).unwrap_err();
        assert!(matches!(missing, SecretError::NotSet { .. }), "{missing}");
    }
}

#[test]
fn qemu_takes_text_without_nul_for_a_passphrase() {
    for (bytes, text) in [
        (&b""[..], true),
        ("pass word \u{e9}\n".as_bytes(), true),
        (b"a\0b", false),
        (b"a\xe9", false),
    ] {
        assert_eq!(Secret::new(bytes.to_vec()).is_text(), text, "{bytes:?}");
    }
}

#[test]
fn base64_is_decoded_strictly_but_for_white_space() {
    let decode = |text: &str| Secret::new(text.into()).decode_base64();
    assert_eq!(decode("aGVsbG8=").unwrap().as_bytes(), b"hello");
    assert_eq!(decode("aGVs\r\nbG8=\n").unwrap().as_bytes(), b"hello");
    assert_eq!(decode("AP+/").unwrap().as_bytes(), [0, 0xff, 0xbf]);
    assert_eq!(decode("").unwrap().as_bytes(), b"");
    for wrong in [
        "aGVsbG8",
        "aGVsbG9=",
        "aGVs*G8=",
        "AP-_",
        "=",
        "aGVsbG8=aGVs",
    ] {
        let error = decode(wrong).unwrap_err();
        assert!(matches!(error, SecretError::NotBase64), "{wrong}");
    }
}

#[test]
fn nothing_printed_shows_a_secret() {
    let key = *b"SeCrEtSeCrEtSeCr";
    let secret = Secret::new(key.to_vec());
    let essiv = IvGenerator::Essiv(Hash::Sha256);
    let cipher = SectorCipher::new(Algorithm::Aes128, Mode::Cbc, essiv, &key).unwrap();
    assert_eq!(format!("{secret:?}"), "Secret(..)");
    assert_eq!(
        format!("{cipher:?}"),
        "SectorCipher(aes-128-cbc-essiv:sha256)"
    );
    let refused = SectorCipher::new(Algorithm::Aes256, Mode::Cbc, essiv, &key).unwrap_err();
    let unmerged = merge_key(Hash::Sha1, &key, 5, 5).unwrap_err();
    let undecoded = Secret::new([&key[..], b"!"].concat())
        .decode_base64()
        .unwrap_err();
    let too_long = Secret::from_reader(key.repeat(Secret::MAX_LEN).as_slice()).unwrap_err();
    let printed = [
        format!("{secret:?} {secret:#?}"),
        format!(
            "{cipher:?} {cipher:#?} {:?}",
            SectorCipher::legacy_aes(&secret)
        ),
        format!("{refused:?} {refused} {unmerged:?} {unmerged}"),
        format!("{undecoded:?} {undecoded} {too_long:?} {too_long}"),
    ];
    for text in printed {
        for leak in ["SeCr", "53654372", "83, 101", "53, 65", "0x53"] {
            assert!(!text.contains(leak), "{text}");
        }
    }
}
