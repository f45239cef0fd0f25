//! The LUKS header: can the disk be unlocked, and at what cost?

use qcow2_format::LuksHeader;
use qcow2_format::luks::LuksSlotState;

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
const MODES: [&[u8]; 4] = [b"xts", b"cbc", b"ctr", b"ecb"];
const HASHES: [&[u8]; 8] = [
    b"md5",
    b"sha1",
    b"sha224",
    b"sha256",
    b"sha384",
    b"sha512",
    b"ripemd160",
    b"sm3",
];

/// Checks the LUKS header.
pub(crate) fn check(image: &Image<'_>, run: &Run<'_>) {
    let Some(extension) = image.header.crypto() else {
        return;
    };
    let offset = extension.offset.get();
    let place = Place::of(Structure::CryptoHeader).at(offset, extension.len_bytes);
    let mut bytes = [0; LuksHeader::LEN];
    let invalid = |detail: String| {
        run.find(Finding::new(Code::CryptoInvalid, place.clone(), detail));
    };
    if let Err(error) = image.reader.read(&mut bytes, offset) {
        invalid(format!("can't be read: {error}"));
        return;
    }
    let header = LuksHeader::from_bytes(bytes);
    for defect in header.defects() {
        invalid(defect.to_string());
    }
    if let Some(unknown) = unknown_algorithm(&header) {
        invalid(unknown);
    }
    for (number, (material, slot)) in header.key_material().iter().zip(header.slots()).enumerate() {
        let end = material.offset.saturating_add(material.len_bytes);
        if slot.state() == LuksSlotState::Enabled && end > extension.len_bytes {
            invalid(format!(
                "the key material of slot {number} ends at {end:#x}, the area at {:#x}",
                extension.len_bytes
            ));
        }
    }
}

/// Words for the first name that stands for no algorithm that qcow2 images are encrypted with, or for a key that does not
/// fit.
fn unknown_algorithm(header: &LuksHeader) -> Option<String> {
    let quoted = |name: &[u8]| format!("{:?}", String::from_utf8_lossy(name));
    let (cipher, mode) = (header.cipher_name(), header.cipher_mode());
    let Some((_, key_lengths)) = CIPHERS.iter().find(|(name, _)| *name == cipher) else {
        return Some(format!("the cipher {} is unknown", quoted(cipher)));
    };
    let mut parts = mode.splitn(2, |byte| *byte == b'-');
    let (kind, vectors) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let mut vectors = vectors.splitn(2, |byte| *byte == b':');
    let (generator, hash) = (vectors.next().unwrap_or_default(), vectors.next());
    let known_hash = hash.map(|hash| HASHES.contains(&hash));
    let known = MODES.contains(&kind)
        && match generator {
            b"plain" | b"plain64" => known_hash.unwrap_or(true),
            b"essiv" => known_hash.unwrap_or(false),
            _ => false,
        };
    if !known {
        return Some(format!("the cipher mode {} is unknown", quoted(mode)));
    }
    if !HASHES.contains(&header.hash_spec()) {
        return Some(format!(
            "the hash {} is unknown",
            quoted(header.hash_spec())
        ));
    }
    let halves = if kind == b"xts" { 2 } else { 1 };
    let len = header.master_key_len();
    if !key_lengths.iter().any(|key| key * halves == len) {
        return Some(format!(
            "{} has no keys of {len} bytes in mode {}",
            quoted(cipher),
            quoted(mode)
        ));
    }
    None
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
