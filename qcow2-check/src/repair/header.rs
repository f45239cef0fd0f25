//! The header and its extensions, as far as the image itself says what they should be.

use qcow2_format::bitmap::BitmapDirectory;
use qcow2_format::geometry::{GeometryError, MAX_L1_BYTES};
use qcow2_format::header::extension::{
    BACKING_FORMAT, BITMAPS, CRYPTO, DATA_FILE_NAME, FEATURE_NAMES, MAX_BACKING_FORMAT_LEN,
};
use qcow2_format::header::{
    BitmapsExtension, CompressionType, CryptMethod, CryptoExtension, Extension, FeatureName,
    Header, HeaderError, HeaderTable, Version,
};
use qcow2_format::l2::L2Table;
use qcow2_format::{
    ClusterKind, EntryRules, Geometry, HostOffset, L1Entry, LuksHeader, RefcountTableEntry,
};
use qcow2_format::{RefcountBlock, raw};
use qcow2_io::Storage;

use super::action::{Action, ActionKind, Effect};
use super::plan::Planner;
use super::{Level, PlanError};
use crate::{Code, Finding, Place, Structure};

/// Header fields corrected one by one before it is given up.
const FIELDS_MAX: usize = 16;
/// Clusters looked at in search of a LUKS header.
const LUKS_SEARCH: u64 = 1 << 20;
/// Magic bytes of a Zstandard frame.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A field of the fixed header that gets another value.
struct Patch {
    offset: u64,
    bytes: Vec<u8>,
    reason: String,
    effect: Effect,
}

fn patch32(offset: u64, value: u32, reason: impl Into<String>) -> Patch {
    Patch {
        offset,
        bytes: value.to_be_bytes().to_vec(),
        reason: reason.into(),
        effect: Effect::None,
    }
}

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

/// Corrects the header.
pub(super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let layer = planner.overlay.layer();
    for _ in 0..FIELDS_MAX {
        let cluster = cluster(planner)?.map_err(|error| hopeless(&error))?;
        let error = match Header::decode_for_check(&cluster) {
            Ok((header, defects)) => {
                return mend_defects(planner, layer, &cluster, header, &defects);
            }
            Err(error) => error,
        };
        let Some(patch) = patch(planner, &error, &cluster)? else {
            return Err(hopeless(&error));
        };
        planner.overlay.write(layer, patch.offset, &patch.bytes)?;
        let len = patch.bytes.len() as u64;
        let place = Place::of(Structure::Header).at(patch.offset, len);
        let action = Action::new(ActionKind::MendHeader, place, patch.reason);
        planner.add(action.changes(patch.offset, len).effect(patch.effect));
    }
    let place = Place::of(Structure::Header);
    let finding = Finding::new(Code::HeaderUnreadable, place, "too many fields are wrong");
    Err(PlanError::Hopeless(Box::new(finding)))
}

fn number(cluster: &[u8], offset: usize, len: usize) -> u64 {
    let bytes = cluster.get(offset..offset + len).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// What makes a field right, where the image says what that is.
fn patch(
    planner: &Planner<'_, '_>,
    error: &HeaderError,
    cluster: &[u8],
) -> Result<Option<Patch>, PlanError> {
    let incompatible = number(cluster, 72, 8);
    Ok(match error {
        HeaderError::HeaderLength { .. } => {
            let fits = |len: u32| {
                let mut tried = cluster.to_vec();
                if let Some(field) = tried.get_mut(100..104) {
                    field.copy_from_slice(&len.to_be_bytes());
                }
                Header::decode_for_check(&tried)
                    .is_ok_and(|(_, defects)| !defects.iter().any(HeaderError::is_refused))
            };
            let len = if !fits(raw::Header::LEN) && fits(raw::Header::V3_MIN_LEN) {
                raw::Header::V3_MIN_LEN
            } else {
                raw::Header::LEN
            };
            Some(patch32(100, len, format!("{error}")))
        }
        HeaderError::CompressionType { .. } => {
            let bit = u8::from(incompatible & 8 != 0);
            Some(Patch {
                offset: 104,
                bytes: vec![bit],
                reason: format!("{error}; the feature bit says {bit}"),
                effect: Effect::None,
            })
        }
        HeaderError::UnknownIncompatible { bits, names } => {
            // Who makes images with a feature names it in the image.
            let has_names = cluster
                .as_chunks::<4>()
                .0
                .iter()
                .any(|word| u32::from_be_bytes(*word) == FEATURE_NAMES);
            let damage = has_names && names.is_empty() || planner.options.level == Level::Salvage;
            damage.then(|| Patch {
                offset: 72,
                bytes: (incompatible & !bits).to_be_bytes().to_vec(),
                reason: format!("{error}, for which the image has no name"),
                effect: Effect::Ambiguous,
            })
        }
        HeaderError::Geometry(GeometryError::RefcountOrder { .. }) => Some(patch32(
            96,
            4,
            format!("{error}; refcounts are made anew with 16 bits"),
        )),
        HeaderError::Geometry(GeometryError::ExtendedClusterBits { .. }) => Some(Patch {
            offset: 72,
            bytes: (incompatible & !0x10).to_be_bytes().to_vec(),
            reason: format!("{error}"),
            effect: Effect::Ambiguous,
        }),
        HeaderError::TableTooLarge {
            table: HeaderTable::Refcount,
            ..
        }
        | HeaderError::TableUnaligned {
            table: HeaderTable::Refcount,
            ..
        }
        | HeaderError::TableEnd {
            table: HeaderTable::Refcount,
            ..
        } => Some(Patch {
            offset: 48,
            bytes: vec![0; 12],
            reason: format!("{error}; it will be made anew"),
            effect: Effect::None,
        }),
        HeaderError::TableTooLarge {
            table: HeaderTable::L1,
            ..
        } => needed_l1(cluster).map(|needed| patch32(36, needed, format!("{error}"))),
        HeaderError::L1TooSmall { found, needed } => {
            Some(l1_or_size(planner, error, cluster, *found, *needed)?)
        }
        HeaderError::VirtualSize { .. } => {
            let geometry = geometry(cluster);
            let entries = number(cluster, 36, 4);
            geometry.map(|geometry| Patch {
                offset: 24,
                bytes: entries
                    .saturating_mul(geometry.l2_coverage())
                    .to_be_bytes()
                    .to_vec(),
                reason: format!("{error}; what the L1 table maps is taken"),
                effect: Effect::Ambiguous,
            })
        }
        _ => None,
    })
}

fn geometry(cluster: &[u8]) -> Option<Geometry> {
    let field = |at, len| u32::try_from(number(cluster, at, len)).ok();
    let v3 = number(cluster, 4, 4) == 3;
    let order = if v3 { field(96, 4)? } else { 4 };
    Geometry::new(
        field(20, 4)?,
        order,
        v3 && number(cluster, 72, 8) & 0x10 != 0,
    )
    .ok()
}

/// L1 entries that the virtual size needs.
fn needed_l1(cluster: &[u8]) -> Option<u32> {
    let needed = geometry(cluster)?.l1_entries_for(number(cluster, 24, 8));
    u32::try_from(needed)
        .ok()
        .filter(|needed| u64::from(*needed) * 8 <= MAX_L1_BYTES)
}

/// The L1 table is too short for the disk: is it the table's length that is wrong, or the disk's size?
fn l1_or_size(
    planner: &Planner<'_, '_>,
    error: &HeaderError,
    cluster: &[u8],
    found: u32,
    needed: u64,
) -> Result<Patch, PlanError> {
    let Some(geometry) = geometry(cluster) else {
        return Err(hopeless(error));
    };
    let size = geometry.cluster_size();
    let has = geometry.clusters_for(u64::from(found) * 8).max(1) * size / 8;
    let l1 = number(cluster, 40, 8);
    let mut fits = needed <= has;
    if !fits && needed * 8 <= MAX_L1_BYTES {
        // Clusters behind it that are in use, and by what follows directly: then they are the table's.
        let table = HostOffset::new(number(cluster, 48, 8));
        let used = |at| refcount_is_set(planner, geometry, table, at);
        let range = l1..l1.saturating_add(needed * 8);
        let mut entries = vec![0; usize::try_from(u64::from(found) * 8).unwrap_or(0)];
        planner.overlay.read_at(&mut entries, l1)?;
        // L2 tables that would lie in it tell that it ends before them.
        let is_clear = |word: &[u8; 8]| {
            let table = L1Entry::from_be_bytes(*word).l2_table().get();
            !range.contains(&table)
        };
        fits = entries.as_chunks::<8>().0.iter().all(is_clear)
            && range.clone().step_by(geometry.cluster_len()).all(used);
    }
    Ok(match u32::try_from(needed) {
        Ok(needed) if fits => patch32(36, needed, format!("{error}")),
        _ => Patch {
            offset: 24,
            bytes: u64::from(found)
                .saturating_mul(geometry.l2_coverage())
                .to_be_bytes()
                .to_vec(),
            reason: format!("{error}; what the L1 table maps is taken"),
            effect: Effect::Ambiguous,
        },
    })
}

/// Whether a refcount on disk is not 0.
fn refcount_is_set(
    planner: &Planner<'_, '_>,
    geometry: Geometry,
    table: HostOffset,
    offset: u64,
) -> bool {
    let cluster = offset >> geometry.cluster_bits();
    let per_block = geometry.refcounts_per_block();
    let Some(at) = table.checked_add(cluster / per_block * 8) else {
        return false;
    };
    let mut word = [0; 8];
    if planner.overlay.read_at(&mut word, at.get()).is_err() {
        return false;
    }
    let block = RefcountTableEntry::from_be_bytes(word).block().get();
    let mut bytes = vec![0; geometry.cluster_len()];
    if block == 0 || planner.overlay.read_at(&mut bytes, block).is_err() {
        return false;
    }
    let at = usize::try_from(cluster % per_block).unwrap_or(usize::MAX);
    RefcountBlock::new(&bytes, geometry).get(at).unwrap_or(0) > 0
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

/// Extensions from `offset` on, read with patience: what makes no sense is stepped over.
fn extensions(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    offset: u64,
) -> Result<Vec<Extension>, PlanError> {
    let end = match number(cluster, 8, 8) {
        0 => cluster.len(),
        end => usize::try_from(end)
            .unwrap_or(usize::MAX)
            .min(cluster.len()),
    };
    let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    while at.saturating_add(8) <= end {
        let kind = u32::try_from(number(cluster, at, 4)).unwrap_or(0);
        let len = usize::try_from(number(cluster, at + 4, 4)).unwrap_or(usize::MAX);
        let payload = |len: usize| {
            let from = at + 8;
            let to = from.checked_add(len).filter(|to| *to <= end)?;
            cluster.get(from..to)
        };
        let (extension, len) = match kind {
            CRYPTO => (
                payload(16).and_then(|_| crypto(planner, header, cluster, at + 8)),
                16,
            ),
            BITMAPS => (
                match payload(24) {
                    Some(_) => bitmaps(planner, header, cluster, at + 8)?,
                    None => None,
                },
                24,
            ),
            FEATURE_NAMES => {
                // Its names are known whatever has become of them.
                let whole = len.is_multiple_of(48) && payload(len).is_some();
                let names = Extension::FeatureNames(FeatureName::known());
                (Some(names), if whole { len } else { 0 })
            }
            BACKING_FORMAT => {
                let name = cluster.get(at + 8..end).unwrap_or_default();
                let name = name.iter().take_while(|byte| byte.is_ascii_alphanumeric());
                let name: Vec<u8> = name.copied().collect();
                let len = name.len();
                let fits = len > 0 && len as u64 <= MAX_BACKING_FORMAT_LEN;
                (fits.then_some(Extension::BackingFormat(name)), len)
            }
            DATA_FILE_NAME => (
                payload(len).map(|name| Extension::DataFileName(name.to_vec())),
                len,
            ),
            _ => (None, 0),
        };
        at += 8;
        if let Some(extension) = extension {
            found.push(extension);
            at += len.next_multiple_of(8);
        }
    }
    Ok(found)
}

fn crypto(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    at: usize,
) -> Option<Extension> {
    let offset = HostOffset::new(number(cluster, at, 8));
    let aligned = header.geometry.is_cluster_aligned(offset);
    // Where it does not lead to a LUKS header, one is searched for later.
    let known = aligned && luks(planner, offset.get()).is_some();
    known.then(|| {
        Extension::Crypto(CryptoExtension {
            offset,
            len_bytes: number(cluster, at + 8, 8),
        })
    })
}

/// The bitmaps extension, its count by the directory. `None` if there is no such directory.
fn bitmaps(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    at: usize,
) -> Result<Option<Extension>, PlanError> {
    let len = number(cluster, at + 8, 8);
    let offset = HostOffset::new(number(cluster, at + 16, 8));
    let end = offset.checked_add(len).map_or(u64::MAX, HostOffset::get);
    if len == 0 || end > planner.overlay.new_len() || !header.geometry.is_cluster_aligned(offset) {
        return Ok(None);
    }
    let limit = qcow2_format::header::extension::MAX_BITMAP_DIRECTORY_BYTES;
    if len > limit {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    planner.overlay.read_at(&mut bytes, offset.get())?;
    let max = qcow2_format::header::extension::MAX_BITMAPS;
    let count = (1..=max).find(|count| {
        let mut entries = BitmapDirectory::new(&bytes, *count);
        entries.all(|entry| entry.is_ok())
    });
    Ok(count.map(|count| {
        Extension::Bitmaps(BitmapsExtension {
            count,
            directory_len_bytes: len,
            directory_offset: offset,
        })
    }))
}

/// The backing file's name where a writer puts it: behind the extensions, up to the first zero.
fn backing_name(header: &Header, cluster: &[u8]) -> Option<Vec<u8>> {
    let without = Header {
        backing_name: None,
        ..header.clone()
    };
    let used = without.encode().ok()?;
    let from = used.iter().rposition(|byte| *byte != 0)? + 1;
    let rest = cluster.get(from.next_multiple_of(8)..)?;
    // The end marker is all zeros.
    let start = rest.iter().position(|byte| *byte != 0)?;
    let name = rest.get(start..)?.split(|byte| *byte == 0).next()?;
    let fits = name.len() as u64 <= qcow2_format::header::MAX_BACKING_NAME_LEN;
    (start <= 16 && fits).then(|| name.to_vec())
}

/// By which codec the first compressed clusters are compressed.
fn compression(planner: &Planner<'_, '_>, header: &Header) -> Result<CompressionType, PlanError> {
    let geometry = header.geometry;
    let rules = header.entry_rules();
    let mut l1 = vec![0; usize::try_from(u64::from(header.l1_entries) * 8).unwrap_or(0)];
    planner
        .overlay
        .read_at(&mut l1, header.l1_table_offset.get())?;
    let mut table = vec![0; geometry.cluster_len()];
    for word in l1.as_chunks::<8>().0 {
        let offset = L1Entry::from_be_bytes(*word).l2_table();
        let inside = offset.get() < planner.overlay.new_len();
        if offset.get() == 0 || !inside || !geometry.is_cluster_aligned(offset) {
            continue;
        }
        planner.overlay.read_at(&mut table, offset.get())?;
        for entry in L2Table::new(&table, geometry).iter() {
            if let ClusterKind::Compressed(extent) = entry.kind(rules) {
                let mut magic = [0; 4];
                planner.overlay.read_at(&mut magic, extent.offset.get())?;
                return Ok(if magic == ZSTD {
                    CompressionType::Zstd
                } else {
                    CompressionType::Zlib
                });
            }
        }
    }
    Ok(CompressionType::Zlib)
}

/// The LUKS header at an offset, if there is one.
fn luks(planner: &Planner<'_, '_>, offset: u64) -> Option<LuksHeader> {
    let mut bytes = [0; LuksHeader::LEN];
    if offset >= planner.overlay.new_len() {
        return None;
    }
    planner.overlay.read_at(&mut bytes, offset).ok()?;
    LuksHeader::decode(&bytes).ok()
}

/// Puts the pointer to the LUKS header right, if there is one somewhere.
fn mend_crypto(mending: &mut Mending<'_, '_, '_>) {
    if mending.header.crypt_method != CryptMethod::Luks {
        return;
    }
    let known = mending.header.crypto().copied();
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

/// L2 tables looked at to tell whether guest data lies in another file.
const TABLES_LOOKED_AT: usize = 64;

/// Whether guest data lies in another file: there it lies where the guest has it.
fn mend_external(mending: &mut Mending<'_, '_, '_>) -> Result<(), PlanError> {
    let header = &mending.header;
    let said = header.incompatible.external_data();
    if header.version == Version::V2 || !said && header.data_file_name().is_none() {
        return Ok(());
    }
    let geometry = header.geometry;
    let overlay = &mending.planner.overlay;
    let rules = EntryRules {
        external_data: true,
        ..header.entry_rules()
    };
    let entries = geometry
        .l1_entries_for(header.virtual_size_raw)
        .min(header.l1_entries.into());
    let mut l1 = vec![0; usize::try_from(entries * 8).unwrap_or(0)];
    overlay.read_at(&mut l1, header.l1_table_offset.get())?;
    let mut table = vec![0; geometry.cluster_len()];
    let (mut same, mut other) = (0_u64, 0_u64);
    let entries = (0_u64..).zip(l1.as_chunks::<8>().0);
    let tables = entries.filter(|(_, word)| {
        let offset = L1Entry::from_be_bytes(**word).l2_table();
        offset.get() != 0 && geometry.is_cluster_aligned(offset) && offset.get() < overlay.new_len()
    });
    for (index, word) in tables.take(TABLES_LOOKED_AT) {
        overlay.read_at(&mut table, L1Entry::from_be_bytes(*word).l2_table().get())?;
        for (number, entry) in (0_u64..).zip(L2Table::new(&table, geometry).iter()) {
            let guest = index
                .saturating_mul(geometry.l2_coverage())
                .saturating_add(number << geometry.cluster_bits());
            match entry.kind(rules) {
                ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                    if host.get() == guest {
                        same += 1;
                    } else {
                        other += 1;
                    }
                }
                ClusterKind::Compressed(_) => other += 1,
                _ => {}
            }
        }
    }
    if said && (other > same || header.snapshot_count > 0 && other > 0) {
        mending.header.incompatible.set_external_data(false);
        mending.header.autoclear.set_raw_external_data(false);
        let reason =
            format!("{other} clusters lie elsewhere than they would in another file, {same} don't");
        mending.note(72, reason, Effect::Reachable);
    } else if !said && same > other {
        mending.header.incompatible.set_external_data(true);
        let reason = format!(
            "{same} clusters lie where they would in the file that is named, {other} don't"
        );
        mending.note(72, reason, Effect::Reachable);
    }
    Ok(())
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
