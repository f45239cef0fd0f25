//! A sound LUKS header, with one thing in it changed.

use qcow2_format::header::Version;
use qcow2_format::{Geometry, GuestCluster};
use qcow2_io::{Memory, Storage};

use crate::synth::Builder;
use crate::{Code, Options, Report, audit};

/// An encrypted image, and where its LUKS header lies.
fn image() -> (Memory, u64) {
    let image = Memory::new();
    let mut draft = Builder::new(Version::V3, Geometry::new(16, 4, false).unwrap(), 1 << 29);
    draft.luks();
    draft.data(GuestCluster::new(0), b"data").unwrap();
    draft.finish(&image).unwrap();
    let mut bytes = vec![0; usize::try_from(image.len().unwrap()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    let magic = b"LUKS\xba\xbe";
    let mut clusters = bytes.chunks(1 << 16);
    let found = clusters.position(|cluster| cluster.starts_with(magic));
    (image, (found.unwrap() as u64) << 16)
}

/// A text field of 32 bytes.
fn text(text: &str) -> [u8; 32] {
    let mut field = [0; 32];
    field[..text.len()].copy_from_slice(text.as_bytes());
    field
}

fn details(report: &Report, code: Code) -> Vec<String> {
    let found = report.findings.iter().filter(|f| f.code == code);
    found.map(|f| f.detail.to_string()).collect()
}

/// What an audit says of a header with these fields changed.
fn invalid(changes: &[(u64, &[u8])]) -> Vec<String> {
    let (image, at) = image();
    for (offset, bytes) in changes {
        image.write_at(bytes, at + offset).unwrap();
    }
    let report = audit(&image, &Options::default());
    details(&report, Code::CryptoInvalid)
}

const MODE: u64 = 40;
const HASH: u64 = 72;
const KEY_LEN: u64 = 108;
const MASTER_ITERATIONS: u64 = 164;
const PAYLOAD: u64 = 104;
/// State, iterations, sector of a slot.
const SLOT: [u64; 3] = [208, 212, 248];

#[test]
fn algorithms_are_judged_as_readers_take_them() {
    for (cipher, mode, hash, key_len, taken) in [
        ("aes", "xts-plain64", "sha256", 64_u32, true),
        ("aes", "xts-plain64", "sha256", 48, true),
        ("aes", "xts-plain", "ripemd160", 32, true),
        ("aes", "cbc-essiv:sha256", "sha1", 16, true),
        ("aes", "cbc-essiv:md5", "sha512", 32, true),
        ("aes", "cbc-plain64:sha1", "sha512", 32, true),
        ("serpent", "ctr-plain64", "sm3", 32, true),
        ("twofish", "ecb-plain64", "sha224", 16, true),
        ("cast5", "cbc-plain64", "sha384", 16, true),
        ("cast5", "cbc-essiv:md5", "sha1", 16, true),
        ("des", "cbc-plain64", "sha256", 16, false),
        ("AES", "xts-plain64", "sha256", 64, false),
        ("aes", "gcm-plain64", "sha256", 32, false),
        ("aes", "xts", "sha256", 64, false),
        ("aes", "xts-random", "sha256", 64, false),
        ("aes", "cbc-essiv", "sha256", 32, false),
        ("aes", "cbc-plain64:crc32", "sha256", 32, false),
        ("aes", "cbc-essiv:sha1", "sha256", 32, false),
        ("aes", "cbc-essiv:sha512", "sha256", 32, false),
        ("cast5", "cbc-essiv:sha256", "sha256", 16, false),
        ("cast5", "xts-plain64", "sha256", 32, false),
        ("aes", "xts-plain64", "sha3", 64, false),
        ("aes", "xts-plain64", "sha256", 16, false),
        ("aes", "cbc-plain64", "sha256", 64, false),
        ("aes", "cbc-plain64", "sha256", 24, false),
    ] {
        let said = invalid(&[
            (8, &text(cipher)),
            (MODE, &text(mode)),
            (HASH, &text(hash)),
            (KEY_LEN, &key_len.to_be_bytes()),
        ]);
        assert_eq!(
            said.len(),
            usize::from(!taken),
            "{cipher} {mode} {hash} {key_len}: {said:?}"
        );
    }
}

#[test]
fn what_can_not_be_unlocked_is_told() {
    assert_eq!(invalid(&[]), [""; 0]);
    let disabled = 0xdead_u32.to_be_bytes();
    assert!(invalid(&[(SLOT[0], &disabled)])[0].contains("no key slot is enabled"));
    assert!(invalid(&[(SLOT[1], &[0; 4])])[0].contains("key slot 0 has no iterations"));
    assert!(invalid(&[(MASTER_ITERATIONS, &[0; 4])])[0].contains("no iterations"));
    assert!(invalid(&[(PAYLOAD, &[0; 4])])[0].contains("payload"));
    // The material of slot 0 where that of slot 1 is.
    let said = invalid(&[(SLOT[2], &512_u32.to_be_bytes())]);
    assert_eq!(said, ["key slots 0 and 1 overlap"]);
    // Behind the area, which the payload's start does not forbid when it says so.
    let (payload, sector) = (20_000_u32.to_be_bytes(), 10_000_u32.to_be_bytes());
    let said = invalid(&[(PAYLOAD, &payload), (SLOT[2], &sector)]);
    assert_eq!(said.len(), 1);
    assert!(
        said[0].contains("the key material of slot 0 ends at"),
        "{said:?}"
    );
}

#[test]
fn what_readers_cope_with_is_a_note() {
    let (image, at) = image();
    image
        .write_at(&20_000_u32.to_be_bytes(), at + PAYLOAD)
        .unwrap();
    image
        .write_at(&10_000_u32.to_be_bytes(), at + 208 + 48 + 40)
        .unwrap();
    let report = audit(&image, &Options::default());
    assert_eq!(details(&report, Code::CryptoInvalid), [""; 0]);
    let odd = details(&report, Code::CryptoOdd);
    assert_eq!(odd.len(), 2, "{odd:?}");
    assert!(odd[0].contains("slot 1"));
}

#[test]
fn an_area_that_the_file_or_the_extension_cuts_is_told() {
    let (image, at) = image();
    image.set_len(at + 4096 + 1000).unwrap();
    let said = details(&audit(&image, &Options::default()), Code::CryptoInvalid);
    assert_eq!(said.len(), 1);
    assert!(said[0].contains("of the file"), "{said:?}");

    let (image, at) = self::image();
    let mut header = [0; 1 << 12];
    image.read_at(&mut header, 0).unwrap();
    // The extension: its type and length, then the area's place and length.
    let kind = 0x0537_be77_u32.to_be_bytes();
    let found = header.windows(4).position(|window| window == kind).unwrap();
    let len = found as u64 + 16;
    assert_eq!(header[found + 8..found + 16], at.to_be_bytes());
    image.write_at(&500_u64.to_be_bytes(), len).unwrap();
    let said = details(&audit(&image, &Options::default()), Code::CryptoInvalid);
    assert_eq!(said, ["the area has 500 bytes, a header 592"]);
}
