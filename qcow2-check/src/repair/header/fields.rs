//! Fields of the fixed header without which nothing can be found, corrected one by one.

use qcow2_format::geometry::{GeometryError, MAX_L1_BYTES};
use qcow2_format::header::extension::FEATURE_NAMES;
use qcow2_format::header::{Header, HeaderError, HeaderTable};
use qcow2_format::{Geometry, HostOffset, L1Entry, RefcountBlock, RefcountTableEntry, raw};
use qcow2_io::Storage;

use super::super::action::Effect;
use super::super::plan::Planner;
use super::super::{Level, PlanError};
use super::{hopeless, number};

/// A field of the fixed header that gets another value.
pub(super) struct Patch {
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) reason: String,
    pub(super) effect: Effect,
}

fn patch32(offset: u64, value: u32, reason: impl Into<String>) -> Patch {
    Patch {
        offset,
        bytes: value.to_be_bytes().to_vec(),
        reason: reason.into(),
        effect: Effect::None,
    }
}

/// What makes a field right, where the image says what that is.
pub(super) fn patch(
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
