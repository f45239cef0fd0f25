//! The LUKS header: can the disk be unlocked, and at what cost?

use qcow2_format::LuksHeader;
use qcow2_format::luks::{LuksSlotState, STRIPES};

use crate::image::Image;
use crate::{Code, Finding, Place, Run, Structure};

/// Iterations that keep a fast machine busy for a minute or so.
const ITERATIONS_SANE: u32 = 50_000_000;
/// Ciphers, each with the lengths of its keys in bytes.
const CIPHERS: [(&[u8], &[u32]); 4] = [
    (b"aes", &[16, 24, 32]),
    (b"serpent", &[16, 24, 32]),
    (b"twofish", &[16, 24, 32]),
    (b"cast5", &[16]),
];
/// The cipher whose blocks are too short for XTS.
const SHORT_BLOCKS: &[u8] = b"cast5";
const MODES: [&[u8]; 4] = [b"xts", b"cbc", b"ctr", b"ecb"];
/// Hashes, each with the length of its digest in bytes.
const HASHES: [(&[u8], u32); 8] = [
    (b"md5", 16),
    (b"sha1", 20),
    (b"sha224", 28),
    (b"sha256", 32),
    (b"sha384", 48),
    (b"sha512", 64),
    (b"ripemd160", 20),
    (b"sm3", 32),
];
/// Bytes in a sector: what is encrypted as a whole.
const SECTOR: u64 = 512;

/// Checks the LUKS header.
pub(crate) fn check(image: &Image<'_>, run: &Run<'_>) {
    let Some(extension) = image.header.crypto() else {
        return;
    };
    let offset = extension.offset.get();
    let area = extension.len_bytes;
    let place = Place::of(Structure::CryptoHeader).at(offset, area);
    let find = |code, detail: String| run.find(Finding::new(code, place.clone(), detail));
    let mut bytes = [0; LuksHeader::LEN];
    if let Err(error) = image.reader.read(&mut bytes, offset) {
        find(Code::CryptoInvalid, format!("can't be read: {error}"));
        return;
    }
    if area < LuksHeader::LEN as u64 {
        let detail = format!("the area has {area} bytes, a header {}", LuksHeader::LEN);
        find(Code::CryptoInvalid, detail);
        return;
    }
    let header = LuksHeader::from_bytes(bytes);
    for defect in header.defects() {
        find(Code::CryptoInvalid, defect.to_string());
    }
    if let Some(unusable) = unusable_algorithm(&header) {
        find(Code::CryptoInvalid, unusable);
    }
    let mut any_enabled = false;
    for (number, (material, slot)) in header.key_material().iter().zip(header.slots()).enumerate() {
        let end = material.offset.saturating_add(material.len_bytes);
        let enabled = slot.state() == LuksSlotState::Enabled;
        any_enabled |= enabled;
        if end > area {
            // Nobody reads the material of a slot that is not in use.
            let code = if enabled {
                Code::CryptoInvalid
            } else {
                Code::CryptoOdd
            };
            let detail = format!(
                "the key material of slot {number} ends at {end:#x}, the area at {area:#x}"
            );
            find(code, detail);
        } else if enabled && offset.saturating_add(end) > image.file_len() {
            let detail = format!(
                "the key material of slot {number} ends at {:#x} of the file, the file at {:#x}",
                offset.saturating_add(end),
                image.file_len()
            );
            find(Code::CryptoInvalid, detail);
        }
    }
    if !any_enabled {
        let detail = "no key slot is enabled: no passphrase opens it";
        find(Code::CryptoInvalid, detail.to_owned());
    }
    if header.payload_offset() > area {
        let payload = header.payload_offset();
        let detail =
            format!("the key material may reach to {payload:#x}, the area ends at {area:#x}");
        find(Code::CryptoOdd, detail);
    }
}

/// Words for the first thing for which no reader of qcow2 images takes the algorithms: a name that stands for none, or two that
/// don't go together.
fn unusable_algorithm(header: &LuksHeader) -> Option<String> {
    let quoted = |name: &[u8]| format!("{:?}", String::from_utf8_lossy(name));
    let (cipher, mode) = (header.cipher_name(), header.cipher_mode());
    let Some((_, key_lengths)) = CIPHERS.iter().find(|(name, _)| *name == cipher) else {
        return Some(format!("the cipher {} is unknown", quoted(cipher)));
    };
    let mut parts = mode.splitn(2, |byte| *byte == b'-');
    let kind = parts.next().unwrap_or_default();
    let mut vectors = parts
        .next()
        .unwrap_or_default()
        .splitn(2, |byte| *byte == b':');
    let (generator, hash) = (vectors.next().unwrap_or_default(), vectors.next());
    let known_hash = hash.map(|hash| digest_len(hash).is_some());
    let known = MODES.contains(&kind)
        && match generator {
            b"plain" | b"plain64" => known_hash.unwrap_or(true),
            b"essiv" => known_hash.unwrap_or(false),
            _ => false,
        };
    if !known {
        return Some(format!("the cipher mode {} is unknown", quoted(mode)));
    }
    if digest_len(header.hash_spec()).is_none() {
        let hash = quoted(header.hash_spec());
        return Some(format!("the hash {hash} is unknown"));
    }
    if kind == b"xts" && cipher == SHORT_BLOCKS {
        let cipher = quoted(cipher);
        return Some(format!(
            "the blocks of {cipher} are too short for the mode xts"
        ));
    }
    let halves = if kind == b"xts" { 2 } else { 1 };
    let len = header.master_key_len();
    if !key_lengths.iter().any(|key| key * halves == len) {
        let (cipher, mode) = (quoted(cipher), quoted(mode));
        return Some(format!(
            "{cipher} has no keys of {len} bytes in mode {mode}"
        ));
    }
    if !(u64::from(len) * u64::from(STRIPES)).is_multiple_of(SECTOR) {
        return Some(format!(
            "the key material for keys of {len} bytes fills no whole sectors, which QEMU does not survive"
        ));
    }
    // The vectors are encrypted by the same cipher, with the digest as its key.
    let digest = hash.filter(|_| generator == b"essiv").and_then(digest_len);
    if let Some(digest) = digest.filter(|digest| !key_lengths.contains(digest)) {
        let cipher = quoted(cipher);
        return Some(format!(
            "{cipher} has no keys of {digest} bytes, as the mode {} needs",
            quoted(mode)
        ));
    }
    None
}

/// Bytes of a hash's digest, if the hash is known.
fn digest_len(hash: &[u8]) -> Option<u32> {
    let found = HASHES.iter().find(|(name, _)| *name == hash);
    found.map(|(_, len)| *len)
}

/// Looks for work that stalls whoever unlocks the disk.
pub(crate) fn hazards(image: &Image<'_>, run: &Run<'_>) {
    let Some(extension) = image.header.crypto() else {
        return;
    };
    let mut bytes = [0; LuksHeader::LEN];
    let offset = extension.offset.get();
    if image.reader.read(&mut bytes, offset).is_err() {
        return;
    }
    let header = LuksHeader::from_bytes(bytes);
    let mut work = vec![("master key".to_owned(), header.master_key_iterations())];
    for (number, slot) in header.slots().iter().enumerate() {
        if slot.state() == LuksSlotState::Enabled {
            work.push((format!("key slot {number}"), slot.iterations()));
        }
    }
    for (what, iterations) in work.into_iter().filter(|(_, n)| *n > ITERATIONS_SANE) {
        let place = Place::of(Structure::CryptoHeader).at(offset, LuksHeader::LEN as u64);
        let detail = format!("{what}: {iterations} iterations");
        run.find(Finding::new(Code::CryptoWork, place, detail));
    }
}

#[cfg(test)]
mod tests;
