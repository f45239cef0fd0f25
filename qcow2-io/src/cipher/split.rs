use sha2::Digest as _;
use zeroize::Zeroizing;

use super::hash::with_digest;
use super::{CipherError, Hash, random};

/// Spreads `key` over `stripes` times its length, so that all of it is lost with any part of it.
///
/// # Errors
///
/// [`Stripes`](CipherError::Stripes) when the key is empty, there are no stripes or more than memory can hold,
/// [`NoRandomness`](CipherError::NoRandomness).
pub fn split_key(hash: Hash, key: &[u8], stripes: u32) -> Result<Zeroizing<Vec<u8>>, CipherError> {
    let wrong = || CipherError::Stripes {
        found: 0,
        key_len: key.len(),
        stripes,
    };
    let len = material_len(key.len(), stripes).ok_or_else(wrong)?;
    let mut material = Zeroizing::new(vec![0; len]);
    let (noise, last) = material.split_at_mut(len - key.len());
    random(noise)?;
    let folded = fold(hash, noise, key.len());
    for ((last, key), folded) in last.iter_mut().zip(key).zip(folded.iter()) {
        *last = key ^ folded;
    }
    Ok(material)
}

/// Gives back the key of `key_len` bytes that [`split_key`] spread. Material that was changed gives another key.
///
/// # Errors
///
/// [`Stripes`](CipherError::Stripes) when `material` is not `stripes` times `key_len` bytes, or either is zero.
pub fn merge_key(
    hash: Hash,
    material: &[u8],
    key_len: usize,
    stripes: u32,
) -> Result<Zeroizing<Vec<u8>>, CipherError> {
    if material_len(key_len, stripes) != Some(material.len()) {
        return Err(CipherError::Stripes {
            found: material.len(),
            key_len,
            stripes,
        });
    }
    let (noise, last) = material.split_at(material.len() - key_len);
    let mut key = fold(hash, noise, key_len);
    xor(&mut key, last);
    Ok(key)
}

/// Bytes of split key material, unless there are none or too many.
fn material_len(key_len: usize, stripes: u32) -> Option<usize> {
    let len = key_len.checked_mul(usize::try_from(stripes).ok()?)?;
    (len != 0 && isize::try_from(len).is_ok()).then_some(len)
}

/// All stripes but the last, each mixed into the ones before and diffused.
fn fold(hash: Hash, stripes: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let mut folded = Zeroizing::new(vec![0; key_len]);
    for stripe in stripes.chunks_exact(key_len) {
        xor(&mut folded, stripe);
        diffuse(hash, &mut folded);
    }
    folded
}

/// Replaces each digest-sized piece by the hash of its number and itself, the last one cut to what is left.
fn diffuse(hash: Hash, bytes: &mut [u8]) {
    with_digest!(hash, D => {
        for (number, piece) in (0_u32..).zip(bytes.chunks_mut(hash.digest_len())) {
            let digest = D::new().chain_update(number.to_be_bytes()).chain_update(&*piece).finalize();
            for (byte, new) in piece.iter_mut().zip(digest) {
                *byte = new;
            }
        }
    });
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, with) in bytes.iter_mut().zip(with) {
        *byte ^= with;
    }
}
