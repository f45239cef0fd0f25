//! Where the LUKS header is.

use qcow2_format::header::extension::CRYPTO;
use qcow2_format::header::{CryptMethod, CryptoExtension, Extension};
use qcow2_format::{HostOffset, LuksHeader};
use qcow2_io::Storage;

use super::super::action::Effect;
use super::super::plan::Planner;
use super::Mending;

/// Clusters looked at in search of a LUKS header.
const LUKS_SEARCH: u64 = 1 << 20;

/// The LUKS header at an offset, if there is one.
pub(super) fn luks(planner: &Planner<'_, '_>, offset: u64) -> Option<LuksHeader> {
    let mut bytes = [0; LuksHeader::LEN];
    if offset >= planner.overlay.new_len() {
        return None;
    }
    planner.overlay.read_at(&mut bytes, offset).ok()?;
    LuksHeader::decode(&bytes).ok()
}

/// Whether the place of the LUKS header can't be read: then it is not known to be wrong.
fn is_unreadable(planner: &Planner<'_, '_>, offset: u64) -> bool {
    offset < planner.overlay.new_len() && !planner.overlay.can_read(offset, LuksHeader::LEN as u64)
}

/// Puts the pointer to the LUKS header right, if there is one somewhere.
pub(super) fn mend_crypto(mending: &mut Mending<'_, '_, '_>) {
    if mending.header.crypt_method != CryptMethod::Luks {
        return;
    }
    let known = mending.header.crypto().copied();
    if known.is_some_and(|known| is_unreadable(mending.planner, known.offset.get())) {
        return;
    }
    let size = mending.header.geometry.cluster_size();
    let end = mending.planner.overlay.new_len();
    let named = known.filter(|known| luks(mending.planner, known.offset.get()).is_some());
    let offset = named.map(|named| named.offset.get()).or_else(|| {
        (1..LUKS_SEARCH.min(end.div_ceil(size)))
            .map(|cluster| cluster * size)
            .find(|offset| luks(mending.planner, *offset).is_some())
    });
    let Some((offset, header)) = offset.and_then(|at| Some((at, luks(mending.planner, at)?)))
    else {
        if known.is_none() {
            mending.header.crypt_method = CryptMethod::None;
            let reason = "the image is said to be encrypted, but there is no LUKS header";
            mending.note(32, reason, Effect::Ambiguous);
        }
        return;
    };
    let usual = LuksHeader::area_len(header.master_key_len()).ok();
    let as_usual = (0_usize..)
        .zip(header.key_material())
        .all(|(slot, material)| {
            usual.is_some()
                && LuksHeader::slot_range(slot).is_ok()
                && material.offset.saturating_add(material.len_bytes) <= usual.unwrap_or(0)
        });
    let len_bytes = match (usual, known) {
        (Some(usual), Some(known)) if as_usual && known.len_bytes != usual => usual,
        (_, Some(known)) => known.len_bytes,
        (Some(usual), None) => usual,
        (None, None) => return,
    };
    let right = CryptoExtension {
        offset: HostOffset::new(offset),
        len_bytes,
    };
    if known == Some(right) || offset.saturating_add(len_bytes) > end.next_multiple_of(size) {
        return;
    }
    mending.header.extensions.retain(|e| e.kind() != CRYPTO);
    mending
        .header
        .extensions
        .insert(0, Extension::Crypto(right));
    let reason = format!("the LUKS header is at {offset:#x} and has {len_bytes} bytes");
    mending.note(0, reason, Effect::Reachable);
}
