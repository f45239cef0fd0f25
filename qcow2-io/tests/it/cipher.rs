use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output};

use qcow2_io::cipher::{
    Algorithm, Hash, IvGenerator, Mode, SECTOR_LEN, Secret, SectorCipher, Zeroizing, derive_key,
    merge_key,
};
use tempfile::TempDir;

const LEN: usize = 1 << 20;
const CLUSTER: usize = 1 << 16;
const STRIPES: u32 = 4000;
/// What is written, by guest offset: parts of clusters, and some that follow each other.
const WRITTEN: [Range<usize>; 3] = [0x8000..0x2_1000, 0x7_0200..0x7_0600, 0xf_0000..0x10_0000];
const PASSPHRASE: &str = "open sesame\n";

/// Bytes of which no two sectors are alike.
fn content() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        u8::try_from(state >> 56).unwrap()
    };
    (0..LEN).map(|_| next()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())).unwrap()
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

fn text_at(bytes: &[u8], at: usize) -> &str {
    let text = bytes[at..at + 32].split(|byte| *byte == 0).next().unwrap();
    std::str::from_utf8(text).unwrap()
}

fn sectors(offset: usize) -> u64 {
    assert!(offset.is_multiple_of(SECTOR_LEN));
    u64::try_from(offset / SECTOR_LEN).unwrap()
}

/// An encrypted image of QEMU's, with its secret in a file.
struct Image {
    dir: TempDir,
}

impl Image {
    fn secret(dir: &Path) -> String {
        format!("secret,id=s0,file={}", dir.join("secret").display())
    }

    /// What QEMU says to an image with these options.
    fn attempt(options: &str) -> (Self, Output) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), PASSPHRASE).unwrap();
        let output = Command::new("qemu-img")
            .args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "--object",
                &Self::secret(dir.path()),
            ])
            .args(["-o", &format!("encrypt.key-secret=s0,{options}")])
            .arg(dir.path().join("image"))
            .arg(LEN.to_string())
            .output()
            .unwrap();
        (Self { dir }, output)
    }

    /// An image with these options and some content.
    fn create(options: &str) -> Self {
        let (image, output) = Self::attempt(options);
        assert!(output.status.success(), "{options}: {output:?}");
        let source = image.dir.path().join("content");
        let content = content();
        let path = image.dir.path().join("image");
        let mut command = Command::new("qemu-io");
        command.args(["--object", &Self::secret(image.dir.path()), "--image-opts"]);
        command.arg(format!(
            "driver=qcow2,file.filename={},encrypt.key-secret=s0",
            path.display()
        ));
        for range in WRITTEN {
            let part = source.with_extension(range.start.to_string());
            fs::write(&part, &content[range.clone()]).unwrap();
            let (start, len) = (range.start, range.len());
            command.args(["-c", &format!("write -s {} {start} {len}", part.display())]);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        image
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("image")).unwrap()
    }

    fn passphrase(&self) -> Secret {
        Secret::from_file(self.dir.path().join("secret")).unwrap()
    }
}

/// Where in the file the guest cluster lies.
fn host_offset(image: &[u8], cluster: usize) -> usize {
    let l1 = u64_at(image, 40);
    let l2 = u64_at(image, l1) & 0x00ff_ffff_ffff_fe00;
    let host = u64_at(image, l2 + 8 * cluster) & 0x00ff_ffff_ffff_fe00;
    assert_ne!(host, 0, "cluster {cluster} was written");
    host
}

/// Everything that was written must come out, and go in again as the same bytes. `by_host` is what numbers the sectors.
fn judge(image: &[u8], cipher: &SectorCipher, by_host: bool) {
    let content = content();
    for range in WRITTEN {
        for start in range.clone().step_by(SECTOR_LEN) {
            let host = host_offset(image, start / CLUSTER) + start % CLUSTER;
            let number = sectors(if by_host { host } else { start });
            let stored = &image[host..host + SECTOR_LEN];
            let mut sector = stored.to_vec();
            cipher.decrypt(number, &mut sector).unwrap();
            assert!(
                sector == content[start..start + SECTOR_LEN],
                "{cipher:?} at {start:#x}"
            );
            cipher.encrypt(number, &mut sector).unwrap();
            assert!(sector == stored, "{cipher:?} at {start:#x}");
        }
    }
}

/// The key in the LUKS header, by the first slot, and the cipher that it says.
fn unlock(image: &[u8], passphrase: &Secret) -> Option<(SectorCipher, Zeroizing<Vec<u8>>)> {
    let mut extension = u32_at(image, 100);
    while u32_at(image, extension) != 0x0537_be77 {
        assert_ne!(u32_at(image, extension), 0, "there is a LUKS header");
        extension += 8 + u32_at(image, extension + 4).next_multiple_of(8);
    }
    let luks = &image[u64_at(image, extension + 8)..];
    assert_eq!(luks[..8], *b"LUKS\xba\xbe\0\x01");

    let (mode, iv_generator) = text_at(luks, 40).split_once('-').unwrap();
    let mode: Mode = mode.parse().unwrap();
    let iv_generator: IvGenerator = iv_generator.parse().unwrap();
    let hash: Hash = text_at(luks, 72).parse().unwrap();
    let key_len = u32_at(luks, 108);
    let algorithm = Algorithm::from_luks(text_at(luks, 8), mode, key_len).unwrap();

    let slot = &luks[208..256];
    assert_eq!((u32_at(slot, 0), u32_at(slot, 44)), (0x00ac_71f3, 4000));
    let iterations = |at| u32::from_be_bytes(at);
    let mut key = vec![0; key_len];
    let slot_iterations = iterations(slot[4..8].try_into().unwrap());
    derive_key(
        hash,
        passphrase.as_bytes(),
        &slot[8..40],
        slot_iterations,
        &mut key,
    );

    let start = u32_at(slot, 40) * SECTOR_LEN;
    let mut material = luks[start..start + key_len * 4000].to_vec();
    let slot_cipher = SectorCipher::new(algorithm, mode, iv_generator, &key).unwrap();
    slot_cipher.decrypt(0, &mut material).unwrap();
    let master = merge_key(hash, &material, key_len, STRIPES).unwrap();

    let mut digest = [0; 20];
    let master_iterations = iterations(luks[164..168].try_into().unwrap());
    derive_key(
        hash,
        &master,
        &luks[132..164],
        master_iterations,
        &mut digest,
    );
    if digest != luks[112..132] {
        return None;
    }
    let cipher = SectorCipher::new(algorithm, mode, iv_generator, &master).unwrap();
    assert_eq!(cipher.algorithm().luks_name(), text_at(luks, 8));
    Some((cipher, master))
}

fn luks_options(algorithm: Algorithm, mode: Mode, iv_generator: IvGenerator, hash: Hash) -> String {
    let options = format!(
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg={algorithm},\
         encrypt.cipher-mode={mode},encrypt.hash-alg={hash}"
    );
    let iv_options = match iv_generator {
        IvGenerator::Essiv(hash) => {
            format!(",encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg={hash}")
        }
        plain => format!(",encrypt.ivgen-alg={plain}"),
    };
    options + &iv_options
}

/// Each algorithm, mode, IV generator and hash that QEMU takes, each at least once.
#[test]
fn images_of_qemu_are_unlocked_and_deciphered() {
    use Algorithm::{Aes128, Aes192, Aes256, Cast5};
    use Algorithm::{Serpent128, Serpent192, Serpent256, Twofish128, Twofish192, Twofish256};
    use IvGenerator::{Essiv, Plain, Plain64};
    use Mode::{Cbc, Ctr, Ecb, Xts};

    if !super::qemu_is_here() {
        return;
    }
    let combinations = [
        (Aes256, Xts, Plain64, Hash::Sha256),
        (Aes192, Xts, Plain, Hash::Sha512),
        (Aes128, Xts, Essiv(Hash::Sm3), Hash::Sm3),
        (Aes256, Cbc, Essiv(Hash::Sha256), Hash::Sha1),
        (Aes128, Cbc, Essiv(Hash::Md5), Hash::Md5),
        (Aes128, Cbc, Essiv(Hash::Sha256), Hash::Sha224),
        (Aes128, Ctr, Plain64, Hash::Ripemd160),
        (Aes256, Ecb, Plain64, Hash::Sha384),
        (Serpent128, Ctr, Plain, Hash::Sha256),
        (Serpent192, Xts, Plain64, Hash::Sha1),
        (Serpent256, Cbc, Essiv(Hash::Md5), Hash::Sha256),
        (Twofish128, Cbc, Plain64, Hash::Sha512),
        (Twofish192, Xts, Essiv(Hash::Sha256), Hash::Sha256),
        (Twofish256, Xts, Plain64, Hash::Sha256),
        (Cast5, Cbc, Essiv(Hash::Md5), Hash::Sha1),
        (Cast5, Ctr, Plain64, Hash::Sha256),
        (Cast5, Ecb, Plain, Hash::Sha256),
    ];
    for (algorithm, mode, iv_generator, hash) in combinations {
        let image = Image::create(&luks_options(algorithm, mode, iv_generator, hash));
        let bytes = image.bytes();
        let (cipher, master) = unlock(&bytes, &image.passphrase()).unwrap();
        assert_eq!(
            (cipher.algorithm(), cipher.mode(), cipher.iv_generator()),
            (algorithm, mode, iv_generator)
        );
        assert_eq!(master.len(), mode.key_len(algorithm));
        judge(&bytes, &cipher, true);
    }
}

/// A newline at the end of the file is a part of the secret.
#[test]
fn a_wrong_passphrase_unlocks_nothing() {
    if !super::qemu_is_here() {
        return;
    }
    let options = luks_options(
        Algorithm::Aes128,
        Mode::Xts,
        IvGenerator::Plain64,
        Hash::Sha256,
    );
    let bytes = Image::create(&options).bytes();
    let wrong = Secret::new(PASSPHRASE.trim_end().into());
    assert!(unlock(&bytes, &wrong).is_none());
}

#[test]
fn legacy_images_of_qemu_are_deciphered() {
    if !super::qemu_is_here() {
        return;
    }
    let image = Image::create("encrypt.format=aes");
    let cipher = SectorCipher::legacy_aes(&image.passphrase());
    judge(&image.bytes(), &cipher, false);
}

/// Both refuse XTS for short blocks, and ESSIV by hashes whose digests are no keys.
#[test]
fn what_qemu_refuses_is_no_cipher_here() {
    if !super::qemu_is_here() {
        return;
    }
    let essiv = IvGenerator::Essiv;
    for (algorithm, mode, iv_generator) in [
        (Algorithm::Cast5, Mode::Xts, IvGenerator::Plain64),
        (Algorithm::Cast5, Mode::Cbc, essiv(Hash::Sha256)),
        (Algorithm::Aes256, Mode::Xts, essiv(Hash::Sha1)),
        (Algorithm::Aes128, Mode::Cbc, essiv(Hash::Sha512)),
        (Algorithm::Serpent256, Mode::Cbc, essiv(Hash::Sha384)),
        (Algorithm::Twofish256, Mode::Cbc, essiv(Hash::Ripemd160)),
    ] {
        let options = luks_options(algorithm, mode, iv_generator, Hash::Sha256);
        let (_, output) = Image::attempt(&options);
        assert_eq!(output.status.code(), Some(1), "{options}: {output:?}");
        let key = vec![3; mode.key_len(algorithm)];
        assert!(
            SectorCipher::new(algorithm, mode, iv_generator, &key).is_err(),
            "{options}"
        );
    }
}
