//! The header and its extensions, as far as the image itself says what they should be.

mod extensions;
mod external;
mod fields;
mod luks;
pub(super) mod snapshots;
pub(super) mod start;
pub(super) mod trial;

use qcow2_format::header::extension::{
    BACKING_FORMAT, BITMAPS, CRYPTO, FEATURE_NAMES, MAX_BACKING_FORMAT_LEN,
};
use qcow2_format::header::{CompressionType, CryptMethod, Extension, Header, HeaderError, Version};
use qcow2_format::raw;
use qcow2_io::Storage;

use super::PlanError;
use super::action::{Action, ActionKind, Effect};
use super::plan::Planner;
use crate::{Code, Finding, Place, Structure};

pub(super) use extensions::compression_in;
use extensions::{backing_name, compression, extensions};
use external::mend_external;
use fields::{Patch, patch};
use luks::{luks, mend_crypto};

/// Header fields corrected one by one before it is given up.
const FIELDS_MAX: usize = 16;

/// Reads the first cluster. `None` if the header says no size of clusters.
pub(super) fn cluster(
    planner: &Planner<'_, '_>,
) -> Result<Result<Vec<u8>, HeaderError>, PlanError> {
    let mut prefix = [0; raw::Header::LEN as usize];
    planner.overlay.read_at(&mut prefix, 0)?;
    Ok(match Header::probe(&prefix) {
        Ok(len) => {
            let mut cluster = vec![0; len];
            planner.overlay.read_at(&mut cluster, 0)?;
            Ok(cluster)
        }
        Err(error) => Err(error),
    })
}

/// The finding for a header that this level can do nothing about.
fn hopeless(error: &HeaderError) -> PlanError {
    let code = match error {
        HeaderError::UnknownIncompatible { .. } => Code::FeatureUnknown,
        _ => Code::HeaderUnreadable,
    };
    let place = Place::of(Structure::Header).at(error.offset(), 0);
    let detail = format!("{}: {error}", error.field());
    PlanError::Hopeless(Box::new(Finding::new(code, place, detail)))
}

/// A first cluster that can be decoded.
pub(super) struct Readable {
    cluster: Vec<u8>,
    pub(super) header: Header,
    defects: Vec<HeaderError>,
    /// What had to be corrected for that.
    patches: Vec<Patch>,
}

impl Readable {
    /// Whether nothing had to be corrected, nor will have to be.
    pub(super) fn is_whole(&self) -> bool {
        self.patches.is_empty() && !self.defects.iter().any(HeaderError::is_refused)
    }
}

/// Corrects fields of a first cluster until it can be decoded. The picture stays as it is. The inner error is the field that
/// nothing can be done about.
pub(super) fn readable(
    planner: &Planner<'_, '_>,
    mut cluster: Vec<u8>,
) -> Result<Result<Readable, HeaderError>, PlanError> {
    let mut patches: Vec<Patch> = Vec::new();
    loop {
        let error = match Header::decode_for_check(&cluster) {
            Ok((header, defects)) => {
                return Ok(Ok(Readable {
                    cluster,
                    header,
                    defects,
                    patches,
                }));
            }
            Err(error) => error,
        };
        let Some(patch) = patch(planner, &error, &cluster)?.filter(|_| patches.len() < FIELDS_MAX)
        else {
            return Ok(Err(error));
        };
        let at = usize::try_from(patch.offset).unwrap_or(usize::MAX);
        let fields = cluster.get_mut(at..).unwrap_or_default();
        for (to, from) in fields.iter_mut().zip(&patch.bytes) {
            *to = *from;
        }
        patches.push(patch);
    }
}

/// Corrects the header.
pub(super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let layer = planner.overlay.layer();
    let cluster = cluster(planner)?.map_err(|error| hopeless(&error))?;
    let readable = readable(planner, cluster)?.map_err(|error| hopeless(&error))?;
    for patch in readable.patches {
        planner.overlay.write(layer, patch.offset, &patch.bytes)?;
        let len = patch.bytes.len() as u64;
        let place = Place::of(Structure::Header).at(patch.offset, len);
        let action = Action::new(ActionKind::MendHeader, place, patch.reason);
        planner.add(action.changes(patch.offset, len).effect(patch.effect));
    }
    mend_defects(
        planner,
        layer,
        &readable.cluster,
        readable.header,
        &readable.defects,
    )
}

fn number(cluster: &[u8], offset: usize, len: usize) -> u64 {
    let bytes = cluster.get(offset..offset + len).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A header being corrected, and why.
struct Mending<'p, 'a, 'o> {
    planner: &'p mut Planner<'a, 'o>,
    header: Header,
    /// Where the damage was, what was done, what the guest has of it.
    done: Vec<(ActionKind, u64, String, Effect)>,
}

impl Mending<'_, '_, '_> {
    fn note(&mut self, at: u64, reason: impl Into<String>, effect: Effect) {
        self.done
            .push((ActionKind::MendHeader, at, reason.into(), effect));
    }

    fn drop_bitmaps(&mut self, at: u64, reason: impl Into<String>) {
        self.header.extensions.retain(|e| e.kind() != BITMAPS);
        self.header.autoclear.set_bitmaps(false);
        self.done
            .push((ActionKind::DropBitmap, at, reason.into(), Effect::None));
    }
}

fn mend_defects(
    planner: &mut Planner<'_, '_>,
    layer: usize,
    cluster: &[u8],
    header: Header,
    defects: &[HeaderError],
) -> Result<(), PlanError> {
    let mut mending = Mending {
        planner,
        header,
        done: Vec::new(),
    };
    for defect in defects {
        mend_defect(&mut mending, cluster, defect)?;
    }
    mend_crypto(&mut mending);
    mend_external(&mut mending)?;
    let header = &mending.header;
    if header.bitmaps().is_some() && !header.autoclear.bitmaps() {
        let reason = "the bitmaps are void: a writer without bitmaps has changed the image";
        mending.drop_bitmaps(88, reason);
    } else if header.bitmaps().is_none() && header.autoclear.bitmaps() {
        mending.header.autoclear.set_bitmaps(false);
        mending.note(88, "there is no bitmaps extension", Effect::None);
    }
    let Mending {
        planner,
        header,
        done,
    } = mending;
    if done.is_empty() {
        return Ok(());
    }
    let bytes = header.encode().map_err(|error| hopeless(&error))?;
    planner.overlay.write(layer, 0, &bytes)?;
    for (kind, at, reason, effect) in done {
        let place = Place::of(Structure::Header).at(at, 0);
        let action = Action::new(kind, place, reason).effect(effect);
        planner.add(action.changes(0, header.geometry.cluster_size()));
    }
    Ok(())
}

fn mend_defect(
    mending: &mut Mending<'_, '_, '_>,
    cluster: &[u8],
    defect: &HeaderError,
) -> Result<(), PlanError> {
    let at = defect.offset();
    let words = defect.to_string();
    match defect {
        HeaderError::BackingNameOffset { .. } | HeaderError::BackingNameTooLong { .. } => {
            mending.header.backing_name = backing_name(&mending.header, cluster);
            let effect = if mending.header.backing_name.is_some() {
                Effect::None
            } else {
                Effect::Ambiguous
            };
            mending.note(at, words, effect);
        }
        HeaderError::BackingWithRawExternal | HeaderError::RawExternalWithoutData => {
            mending.header.autoclear.set_raw_external_data(false);
            mending.note(at, words, Effect::None);
        }
        HeaderError::CompressionBit { .. } => {
            let kind = compression(mending.planner, &mending.header)?;
            let zstd = kind == CompressionType::Zstd;
            mending.header.compression_type = kind;
            if zstd && mending.header.header_length < raw::Header::LEN {
                // Shorter headers have no place for it.
                mending.header.header_length = raw::Header::LEN;
            }
            mending.header.incompatible.set_compression(zstd);
            mending.note(at, words, Effect::None);
        }
        HeaderError::CryptMethod { .. } => {
            let luks = mending.header.crypto().is_some();
            mending.header.crypt_method = if luks {
                CryptMethod::Luks
            } else {
                CryptMethod::None
            };
            mending.note(at, words, Effect::Ambiguous);
        }
        HeaderError::ExtensionCut { offset, .. }
        | HeaderError::ExtensionTooLong { offset, .. }
        | HeaderError::BackingFormatTooLong { offset, .. }
        | HeaderError::CryptoLength { offset, .. }
        | HeaderError::CryptoUnexpected { offset, .. }
        | HeaderError::CryptoUnaligned { offset, .. }
        | HeaderError::BitmapsLength { offset, .. }
        | HeaderError::BitmapsReserved { offset, .. }
        | HeaderError::BitmapsCount { offset, .. }
        | HeaderError::BitmapsDirectoryTooLarge { offset, .. }
        | HeaderError::BitmapsDirectoryUnaligned { offset, .. } => {
            let found = extensions(mending.planner, &mending.header, cluster, *offset)?;
            let broken = |extension: &Extension| {
                let typed = [CRYPTO, BITMAPS, FEATURE_NAMES, BACKING_FORMAT];
                match extension {
                    Extension::BackingFormat(name) => name.len() as u64 > MAX_BACKING_FORMAT_LEN,
                    Extension::Unknown { kind, .. } => typed.contains(kind),
                    _ => false,
                }
            };
            mending.header.extensions.retain(|e| !broken(e));
            let known: Vec<u32> = mending
                .header
                .extensions
                .iter()
                .map(Extension::kind)
                .collect();
            let new = found.into_iter().filter(|e| !known.contains(&e.kind()));
            mending.header.extensions.extend(new);
            if matches!(defect, HeaderError::CryptoUnexpected { .. }) {
                let place = mending.header.crypto().map(|crypto| crypto.offset.get());
                if place.is_some_and(|at| luks(mending.planner, at).is_some()) {
                    mending.header.crypt_method = CryptMethod::Luks;
                } else {
                    mending.header.extensions.retain(|e| e.kind() != CRYPTO);
                }
            }
            mending.note(at, words, Effect::None);
        }
        // Those that only break a rule, those that the snapshot table and the refcounts are mended with, and what follows here.
        _ => {}
    }
    Ok(())
}

/// Whether the header says of the area of LUKS keys what a repair would let it say.
pub(super) fn has_right_key_area(planner: &mut Planner<'_, '_>) -> Result<bool, PlanError> {
    let Ok(cluster) = cluster(planner)? else {
        return Ok(false);
    };
    let Ok((header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(false);
    };
    let known = (header.crypt_method, header.crypto().copied());
    let mut mending = Mending {
        planner,
        header,
        done: Vec::new(),
    };
    mend_crypto(&mut mending);
    let header = &mending.header;
    Ok((header.crypt_method, header.crypto().copied()) == known)
}

/// Drops bitmaps that are void anyway, so that their clusters may be freed.
pub(super) fn drop_void_bitmaps(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Ok(cluster) = cluster(planner)? else {
        return Ok(());
    };
    let Ok((mut header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(());
    };
    if header.version == Version::V2 || header.bitmaps().is_none() || header.autoclear.bitmaps() {
        return Ok(());
    }
    header.extensions.retain(|e| e.kind() != BITMAPS);
    if let Ok(bytes) = header.encode() {
        let layer = planner.overlay.layer();
        planner.overlay.write(layer, 0, &bytes)?;
        let place = Place::of(Structure::Header).at(88, 8);
        let reason = "the bitmaps are void: a writer without bitmaps has changed the image";
        let action = Action::new(ActionKind::DropBitmap, place, reason);
        planner.add(action.changes(0, header.geometry.cluster_size()));
    }
    Ok(())
}
