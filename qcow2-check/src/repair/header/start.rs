//! Magic bytes, version and size of clusters: all else is read by them, so a wrong one looks like damage everywhere.

use qcow2_format::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use qcow2_format::header::Extension;
use qcow2_format::{Header, raw};
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::salvage::leads_to_l1;
use super::{number, readable};
use crate::{Place, Structure};

/// The three fields lie in the first bytes.
const START_BYTES: usize = 24;
/// Where the version is.
const VERSION: u64 = 4;
/// Where the length of the header is.
const LENGTH: usize = 100;
/// Lengths that headers of version 3 have.
const V3_LENGTHS: [u32; 2] = [raw::Header::V3_MIN_LEN, raw::Header::LEN];

/// Puts the three fields right where the rest of the header and the L1 table tell what they were.
pub(in super::super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let start = beginning(planner)?;
    if is_in_order(planner, &start)? {
        mend_version(planner, &start)?;
        return mend_length(planner, &start);
    }
    let field = u32::try_from(number(&start, 20, 4)).ok();
    let field = field.filter(|bits| (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(bits));
    for bits in by_layout(planner).into_iter().chain(field) {
        if let Some(mended) = fields(planner, &start, bits, false)? {
            return write(planner, ActionKind::MendHeader, &mended, bits);
        }
    }
    Ok(())
}

/// The first bytes of the file: as many as the largest cluster has, or, where some of those can't be read, the cluster that is said to be the
/// first, and zeros.
fn beginning(planner: &Planner<'_, '_>) -> Result<Vec<u8>, PlanError> {
    let mut start = vec![0; 1 << MAX_CLUSTER_BITS];
    if planner.overlay.read_at(&mut start, 0).is_ok() {
        return Ok(start);
    }
    let mut cluster = [0; 512].to_vec();
    planner.overlay.read_at(&mut cluster, 0)?;
    if let Ok(len) = Header::probe(&cluster) {
        cluster.resize(len, 0);
        planner.overlay.read_at(&mut cluster, 0)?;
    }
    cluster.resize(start.len(), 0);
    Ok(cluster)
}

/// Whether the header can be read, and nothing speaks against its size of clusters.
fn is_in_order(planner: &Planner<'_, '_>, start: &[u8]) -> Result<bool, PlanError> {
    let Ok(len) = Header::probe(start) else {
        return Ok(false);
    };
    let cluster = start.get(..len).unwrap_or(start);
    match readable(planner, cluster.to_vec())? {
        Ok(readable) => Ok(is_credible(planner, &readable.header)),
        Err(_) => Ok(false),
    }
}

/// A header that calls itself version 2, and has all fields of version 3.
fn mend_version(planner: &mut Planner<'_, '_>, start: &[u8]) -> Result<(), PlanError> {
    if number(start, 4, 4) != 2 {
        return Ok(());
    }
    let bits = u32::try_from(number(start, 20, 4)).unwrap_or(0);
    let mut tried = start.to_vec();
    tried.truncate(1 << bits.min(MAX_CLUSTER_BITS));
    if let Some(field) = tried.get_mut(4..8) {
        field.copy_from_slice(&3_u32.to_be_bytes());
    }
    let Ok(readable) = readable(planner, tried)? else {
        return Ok(());
    };
    let header = &readable.header;
    if readable.is_whole()
        && V3_LENGTHS.contains(&header.header_length)
        && leads_to_l1(planner, header)?
    {
        let layer = planner.overlay.layer();
        let version = 3_u32.to_be_bytes();
        planner.overlay.write(layer, VERSION, &version)?;
        let place = Place::of(Structure::Header).at(VERSION, 4);
        let reason = "version is 2, and all fields of version 3 are there";
        let action = Action::new(ActionKind::MendHeader, place, reason);
        planner.add(action.changes(VERSION, 4).effect(Effect::Reachable));
    }
    Ok(())
}

/// A header of version 3 whose extensions begin elsewhere than its length says.
fn mend_length(planner: &mut Planner<'_, '_>, start: &[u8]) -> Result<(), PlanError> {
    let old = u32::try_from(number(start, LENGTH, 4)).unwrap_or(0);
    if number(start, 4, 4) != 3 || V3_LENGTHS.contains(&old) {
        return Ok(());
    }
    let bits = u32::try_from(number(start, 20, 4)).unwrap_or(0);
    for length in V3_LENGTHS {
        let mut tried = start.to_vec();
        tried.truncate(1 << bits.min(MAX_CLUSTER_BITS));
        if let Some(field) = tried.get_mut(LENGTH..LENGTH + 4) {
            field.copy_from_slice(&length.to_be_bytes());
        }
        let Ok(readable) = readable(planner, tried)? else {
            continue;
        };
        let extensions = &readable.header.extensions;
        let is_known = |extension: &Extension| !matches!(extension, Extension::Unknown { .. });
        if readable.is_whole() && !extensions.is_empty() && extensions.iter().all(is_known) {
            let layer = planner.overlay.layer();
            planner
                .overlay
                .write(layer, LENGTH as u64, &length.to_be_bytes())?;
            let place = Place::of(Structure::Header).at(LENGTH as u64, 4);
            let reason = format!("header_length is {old}; extensions begin at {length}");
            let action = Action::new(ActionKind::MendHeader, place, reason);
            planner.add(action.changes(LENGTH as u64, 4));
            return Ok(());
        }
    }
    Ok(())
}

/// Writes the first bytes of a header, and tells of it.
pub(in super::super) fn write(
    planner: &mut Planner<'_, '_>,
    kind: ActionKind,
    start: &[u8],
    bits: u32,
) -> Result<(), PlanError> {
    let layer = planner.overlay.layer();
    planner.overlay.write(layer, 0, start)?;
    let len = start.len() as u64;
    let place = Place::of(Structure::Header).at(0, len);
    let reason = format!(
        "magic bytes, version and clusters of {} bytes; the rest of the header fits",
        1_u64 << bits
    );
    let action = Action::new(kind, place, reason);
    planner.add(action.changes(0, len).effect(Effect::Reachable));
    Ok(())
}

/// The start of the header with magic bytes, version and size of clusters put right, if with that everything else makes sense: `patiently`, with
/// single fields corrected.
pub(in super::super) fn fields(
    planner: &Planner<'_, '_>,
    old: &[u8],
    bits: u32,
    patiently: bool,
) -> Result<Option<Vec<u8>>, PlanError> {
    // Version 2 has no place for most fields that may be wrong: with them it looks whole. So a version that is possible is kept.
    let tries = match number(old, 4, 4) {
        2 => [(2_u32, false), (2, true), (3, false)],
        3 => [(3, false), (3, true), (2, false)],
        _ => [(3, false), (2, false), (3, true)],
    };
    let tries = tries
        .into_iter()
        .filter(|(_, with_others)| patiently || !with_others);
    for (version, with_others) in tries {
        let mut tried = old.to_vec();
        let fields = [
            (0, raw::Header::MAGIC),
            (4, version.to_be_bytes()),
            (20, bits.to_be_bytes()),
        ];
        for (at, bytes) in fields {
            if let Some(field) = tried.get_mut(at..at + 4) {
                field.copy_from_slice(&bytes);
            }
        }
        tried.truncate(1 << bits);
        if let Ok(readable) = readable(planner, tried.clone())?
            && (with_others || readable.is_whole())
            && readable.header.l1_entries > 0
            && leads_to_l1(planner, &readable.header)?
        {
            tried.truncate(START_BYTES);
            return Ok(Some(tried));
        }
    }
    Ok(None)
}

/// Whether a header that can be read fits the file: it begins as writers let it begin, or as they do for no size of clusters.
pub(in super::super) fn is_credible(planner: &Planner<'_, '_>, header: &Header) -> bool {
    let own = header.geometry.cluster_bits();
    begins_with(planner, own) || by_layout(planner).is_none()
}

/// The size of clusters, if the file begins as writers let it begin.
pub(in super::super) fn by_layout(planner: &Planner<'_, '_>) -> Option<u32> {
    (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS)
        .rev()
        .find(|bits| begins_with(planner, *bits))
}

/// Whether the file begins with a header, a refcount table and a refcount block of one such cluster each.
fn begins_with(planner: &Planner<'_, '_>, bits: u32) -> bool {
    let size = 1_u64 << bits;
    let mut entry = [0; 8];
    // What can't be read is no evidence.
    if planner.overlay.read_at(&mut entry, size).is_err() {
        return false;
    }
    if u64::from_be_bytes(entry) != 2 * size {
        return false;
    }
    // The block counts header, table and itself: not zero, whatever the width.
    let mut block = [0; 32];
    planner.overlay.read_at(&mut block, 2 * size).is_ok() && block != [0; 32]
}
