//! A LUKS area that really opens, though nothing here can encrypt.
//!
//! The key material on disk is all zeros. Whatever that decrypts to under the passphrase is the split master key, and the
//! one number that depends on it, the digest, was calculated once and stands here.

use qcow2_format::luks::{HEADER_SECTORS, STRIPES};

/// Opens the area of [`area`].
pub(super) const PASSPHRASE: &str = "demo";
/// Bytes of the master key: AES-256 in XTS mode has two.
const KEY_LEN: u32 = 64;
/// Few, so that tests are quick.
const ITERATIONS: u32 = 1000;
const SLOT_SALT: [u8; 32] = [0x5a; 32];
const MASTER_SALT: [u8; 32] = [0xa5; 32];
const MASTER_DIGEST: [u8; 20] = [
    0x80, 0xae, 0x8e, 0xbd, 0xfa, 0x02, 0x0d, 0xd2, 0xaf, 0x8e, 0x0a, 0x38, 0xbe, 0x92, 0xbb, 0x22,
    0x64, 0x91, 0x7d, 0x2a,
];
const SLOTS: u32 = 8;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;

/// The header's bytes and the length of the whole area; behind the header all is zero.
pub(super) fn area() -> (Vec<u8>, u64) {
    let slot_sectors = (KEY_LEN * STRIPES).div_ceil(512).next_multiple_of(8);
    let payload_sector = HEADER_SECTORS + SLOTS * slot_sectors;
    let mut bytes = b"LUKS\xba\xbe\0\x01".to_vec();
    for (text, len) in [("aes", 32), ("xts-plain64", 32), ("sha256", 32)] {
        padded(&mut bytes, text, len);
    }
    bytes.extend(payload_sector.to_be_bytes());
    bytes.extend(KEY_LEN.to_be_bytes());
    bytes.extend(MASTER_DIGEST);
    bytes.extend(MASTER_SALT);
    bytes.extend(ITERATIONS.to_be_bytes());
    padded(&mut bytes, "8d5b2f5e-3c1d-4f0e-9a57-1d3c5e7f9b20", 40);
    for slot in 0..SLOTS {
        let (state, iterations, salt) = match slot {
            0 => (ENABLED, ITERATIONS, SLOT_SALT),
            _ => (DISABLED, 0, [0; 32]),
        };
        bytes.extend(state.to_be_bytes());
        bytes.extend(iterations.to_be_bytes());
        bytes.extend(salt);
        bytes.extend((HEADER_SECTORS + slot * slot_sectors).to_be_bytes());
        bytes.extend(STRIPES.to_be_bytes());
    }
    (bytes, u64::from(payload_sector) * 512)
}

fn padded(bytes: &mut Vec<u8>, text: &str, len: usize) {
    let end = bytes.len() + len;
    bytes.extend(text.as_bytes());
    bytes.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use qcow2_format::LuksHeader;

    use super::*;

    #[test]
    fn the_header_breaks_no_rule() {
        let (bytes, len) = area();
        let header = LuksHeader::decode(&bytes).unwrap();
        assert_eq!(header.payload_offset(), len);
        assert_eq!(len, 2068480);
    }
}
