//! LUKS headers with other algorithms: those that are judged invalid must be those that QEMU refuses.

use std::process::Command;

use qcow2_check::{Code, Options, audit};
use qcow2_io::File;

use crate::oracle::Access;
use crate::oracle::{self, Workshop, secret_args, target};

const IMAGE: &str = "image.qcow2";

/// Whether QEMU gets so far as to try the passphrase, by what it says: the key is another one now, so it can't be right.
fn is_taken(shop: &Workshop) -> bool {
    let output = Command::new("qemu-io")
        .args(secret_args())
        .args(["-r", "-c", "quit", &target(IMAGE, Access::WithSecret)])
        .current_dir(shop.path(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    output.status.success() || said.contains("Invalid password")
}

fn text(text: &str) -> [u8; 32] {
    let mut field = [0; 32];
    field[..text.len()].copy_from_slice(text.as_bytes());
    field
}

#[test]
fn algorithms_are_judged_as_qemu_takes_them() {
    let mut cases = Vec::new();
    for (cipher, mode, key_len) in [
        ("aes", "xts-plain64", 64_u32),
        ("aes", "xts-plain64", 48),
        ("aes", "xts-plain64", 16),
        ("aes", "xts-plain64:sha1", 32),
        ("aes", "xts-plain64:crc", 32),
        ("aes", "xts-essiv:sha256", 64),
        ("aes", "cbc-plain", 32),
        ("aes", "cbc-plain64", 24),
        ("aes", "cbc-essiv:sha256", 16),
        ("aes", "cbc-essiv:md5", 32),
        ("aes", "cbc-essiv:sha1", 32),
        ("aes", "cbc-essiv:sha512", 32),
        ("aes", "cbc-essiv", 32),
        ("aes", "ctr-plain64", 16),
        ("aes", "ecb-plain64", 32),
        ("aes", "ecb", 32),
        ("aes", "gcm-plain64", 32),
        ("serpent", "xts-plain64", 64),
        ("serpent", "cbc-essiv:sha256", 32),
        ("twofish", "cbc-plain64", 16),
        ("cast5", "cbc-plain64", 16),
        ("cast5", "cbc-essiv:md5", 16),
        ("cast5", "cbc-essiv:sha256", 16),
        ("cast5", "xts-plain64", 32),
        ("des", "cbc-plain64", 16),
    ] {
        cases.push((cipher, mode, "sha256", key_len));
    }
    for hash in [
        "md5",
        "sha1",
        "sha224",
        "sha384",
        "sha512",
        "ripemd160",
        "sm3",
        "sha3",
        "SHA256",
    ] {
        cases.push(("aes", "xts-plain64", hash, 64));
    }
    if !oracle::is_available(cases.len(), "LUKS headers") {
        return;
    }
    let shop = Workshop::new();
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    shop.create(IMAGE, "1M", options, &[]).unwrap();
    let sound = shop.read(IMAGE);
    let at = sound.windows(6).position(|bytes| bytes == b"LUKS\xba\xbe");
    let at = at.unwrap();
    let mut refused = 0;
    for (cipher, mode, hash, key_len) in cases {
        let mut bytes = sound.clone();
        let mut put = |offset: usize, value: &[u8]| {
            bytes[at + offset..at + offset + value.len()].copy_from_slice(value);
        };
        put(8, &text(cipher));
        put(40, &text(mode));
        put(72, &text(hash));
        put(108, &key_len.to_be_bytes());
        shop.write(IMAGE, &bytes);
        let report = audit(&File::open(shop.path(IMAGE)).unwrap(), &Options::default());
        let valid = report.total(Code::CryptoInvalid) == 0;
        assert_eq!(
            valid,
            is_taken(&shop),
            "{cipher} {mode} {hash} {key_len}: {:?}",
            report.findings
        );
        refused += u32::from(!valid);
    }
    assert!(refused > 8);
}
