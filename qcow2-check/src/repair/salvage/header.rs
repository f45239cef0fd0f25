//! A header made of what lies in the file.
//!
//! The size of clusters tells itself: images begin with header, refcount table and refcount block, one cluster each, so at one cluster
//! there is a pointer to the second. Where that is gone, L2 tables tell: neighbours in them lie one cluster apart.

use qcow2_format::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, CryptoExtension,
    Extension, FeatureName, Header, IncompatibleFeatures, Version,
};
use qcow2_format::{EntryRules, Geometry, HostOffset, L1Entry, LuksHeader, raw};
use qcow2_io::{ExtentKind, Storage};

use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::{
    PlanError,
    header::{self, start},
};
use super::scan::{as_l1, each_cluster, l2_tables};
use super::snapshots::plausible;
use crate::{Place, Structure};

/// Bytes read at once when pairs of entries are counted.
const READ_BYTES: usize = 1 << 20;
const COPIED: u64 = 1 << 63;

/// Makes a header, if the one there is says nothing to go by.
pub(in super::super) fn find(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let mut old = vec![0; 1 << MAX_CLUSTER_BITS];
    planner.overlay.read_at(&mut old, 0)?;
    if fits(planner, &old)? {
        return Ok(());
    }
    // The smallest damage first: fields that are out of order, all others as they are.
    let Some(bits) = cluster_bits(planner)? else {
        return Ok(());
    };
    if let Some(mended) = start::fields(planner, &old, bits, true)? {
        return start::write(planner, ActionKind::FindHeader, &mended, bits);
    }
    let header = make(planner, &old, bits)?;
    let Some(mut header) = header else {
        return Ok(());
    };
    if header.l1_table_offset.get() == 0 {
        // An empty one, for the L2 tables that will be found.
        let size = header.geometry.cluster_size();
        let entries = header.geometry.l1_entries_for(header.virtual_size_raw);
        let clusters = header.geometry.clusters_for(entries * 8).max(1);
        let offset = planner.allocate(clusters, size)?;
        planner.overlay.grow(offset + clusters * size);
        header.l1_table_offset = HostOffset::new(offset);
        header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
    }
    let Ok(bytes) = header.encode() else {
        return Ok(());
    };
    let layer = planner.overlay.layer();
    planner.overlay.write(layer, 0, &bytes)?;
    planner.hidden = true;
    let size = header.geometry.cluster_size();
    let place = Place::of(Structure::Header).at(0, size);
    let reason = format!(
        "clusters of {size} bytes, L1 table at {} with {} entries, disk of {} bytes, {} snapshots",
        header.l1_table_offset, header.l1_entries, header.virtual_size_raw, header.snapshot_count
    );
    let action = Action::new(ActionKind::FindHeader, place, reason);
    planner.add(action.changes(0, size).effect(Effect::Ambiguous));
    Ok(())
}

/// Whether the header leads to something, as it is or with single fields corrected, as happens to it after this.
fn fits(planner: &Planner<'_, '_>, start: &[u8]) -> Result<bool, PlanError> {
    let Ok(len) = Header::probe(start) else {
        return Ok(false);
    };
    let cluster = start.get(..len).unwrap_or(start);
    if let Ok((header, _)) = Header::decode_for_check(cluster) {
        return Ok(start::is_credible(planner, &header));
    }
    let Ok(readable) = header::readable(planner, cluster.to_vec())? else {
        return Ok(false);
    };
    // Several fields wrong at once are the sign of one that all depend on.
    Ok(start::is_credible(planner, &readable.header)
        && super::l1::is_sound(planner, &readable.header)?)
}

fn cluster_bits(planner: &Planner<'_, '_>) -> Result<Option<u32>, PlanError> {
    match start::by_layout(planner) {
        Some(bits) => Ok(Some(bits)),
        None => by_distance(planner),
    }
}

/// The distance that most neighbours in tables have.
fn by_distance(planner: &Planner<'_, '_>) -> Result<Option<u32>, PlanError> {
    let overlay = &planner.overlay;
    let len = overlay.new_len();
    let mut votes = [0_u64; 64];
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < len {
        if planner.is_cancelled() {
            return Err(PlanError::Cancelled);
        }
        let extents = overlay.extents(at..len, 1)?;
        let Some(extent) = extents.first() else { break };
        if extent.kind != ExtentKind::Data {
            at = extent.end().max(at + 512) / 512 * 512;
            continue;
        }
        if overlay.read_at(&mut buffer, at).is_err() {
            // Votes are many; one piece does not matter.
            buffer.fill(0);
        }
        let words = buffer.as_chunks::<8>().0;
        let offset = |word: &[u8; 8]| {
            let word = u64::from_be_bytes(*word);
            let offset = word & !COPIED;
            (word & COPIED != 0 && offset > 0 && offset < len && offset.is_multiple_of(512))
                .then_some(offset)
        };
        for (a, b) in words.iter().zip(words.iter().skip(1)) {
            if let (Some(a), Some(b)) = (offset(a), offset(b))
                && let Some(distance) = b.checked_sub(a)
                && distance.is_power_of_two()
                && let Some(vote) = votes.get_mut(distance.trailing_zeros() as usize)
            {
                *vote += 1;
            }
        }
        at += READ_BYTES as u64;
    }
    let best = (0_u32..)
        .zip(votes)
        .filter(|(bits, _)| (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(bits))
        .max_by_key(|(_, votes)| *votes);
    Ok(best.filter(|(_, votes)| *votes > 0).map(|(bits, _)| bits))
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A header for clusters of this size: fields of the old one where they make sense, the rest by search.
fn make(planner: &Planner<'_, '_>, old: &[u8], bits: u32) -> Result<Option<Header>, PlanError> {
    let size = 1_u64 << bits;
    let len = planner.overlay.new_len();
    let extended = bits >= 14 && best_entries(planner, bits)?;
    let order = u32::try_from(number(old, 96, 4)).unwrap_or(4);
    let order = if (1..=6).contains(&order) { order } else { 4 };
    let Ok(geometry) = Geometry::new(bits, order, extended) else {
        return Ok(None);
    };
    let rules = EntryRules {
        geometry,
        external_data: false,
        version2: false,
    };
    let tables: Vec<u64> = l2_tables(planner, rules)?
        .iter()
        .map(|t| t.offset)
        .collect();
    let named = (number(old, 40, 8), number(old, 36, 4));
    let mut l1 = None;
    let mut luks = None;
    let mut snapshots = None;
    each_cluster(planner, size, |offset, bytes| {
        if offset == 0 {
            return;
        }
        if let Some(found) = as_l1(offset, bytes, &tables) {
            // What the old header names is the one, if it can be.
            let rank = (offset == named.0, found.copied, found.entries, offset);
            if l1.as_ref().is_none_or(|(best, _)| rank > *best) {
                let last = bytes.as_chunks::<8>().0.iter().rposition(|w| *w != [0; 8]);
                l1 = Some((rank, last.map_or(0, |last| last as u64 + 1)));
            }
        } else if luks.is_none()
            && let Some(start) = bytes.first_chunk::<{ LuksHeader::LEN }>()
            && LuksHeader::decode(start).is_ok()
        {
            luks = Some((offset, LuksHeader::from_bytes(*start)));
        } else if let Some(count) = plausible(bytes, size, len)
            && (snapshots.is_none() || offset == number(old, 64, 8))
        {
            snapshots = Some((offset, count));
        }
    })?;
    let (l1_offset, used) = l1.map_or((0, 0), |((.., offset), used)| (offset, used));
    if l1_offset == 0 && tables.is_empty() {
        return Ok(None);
    }
    let mapped = used.max(1).saturating_mul(geometry.l2_coverage());
    let old_size = number(old, 24, 8);
    // A disk larger than its tables map by far is a damaged number.
    let is_sane = old_size > 0
        && geometry.l1_entries_for(old_size) >= used
        && geometry.l1_entries_for(old_size) <= size / 8 * 16
        && old_size.is_multiple_of(512);
    let virtual_size = if is_sane {
        old_size
    } else if l1_offset == 0 {
        (tables.len() as u64).saturating_mul(geometry.l2_coverage())
    } else {
        last_mapped(planner, rules, l1_offset, used)?.min(mapped)
    };
    let entries = geometry.l1_entries_for(virtual_size).max(used);
    let mut incompatible = IncompatibleFeatures::default();
    incompatible.set_extended_l2(extended);
    let compression = compression(planner, rules, &tables)?;
    incompatible.set_compression(compression == CompressionType::Zstd);
    let mut extensions = Vec::new();
    if let Some((offset, header)) = &luks
        && let Ok(len_bytes) = LuksHeader::area_len(header.master_key_len())
    {
        extensions.push(Extension::Crypto(CryptoExtension {
            offset: HostOffset::new(*offset),
            len_bytes,
        }));
    }
    if size > 4096 {
        extensions.push(Extension::FeatureNames(FeatureName::known()));
    }
    let (snapshot_table, snapshot_count) = snapshots.unwrap_or((0, 0));
    Ok(Some(Header {
        version: Version::V3,
        geometry,
        virtual_size_raw: virtual_size,
        crypt_method: if luks.is_some() {
            CryptMethod::Luks
        } else {
            CryptMethod::None
        },
        l1_table_offset: HostOffset::new(l1_offset),
        l1_entries: if l1_offset == 0 {
            0
        } else {
            u32::try_from(entries).unwrap_or(u32::MAX)
        },
        refcount_table_offset: HostOffset::new(0),
        refcount_table_clusters: 0,
        snapshot_count,
        snapshot_table_offset: HostOffset::new(snapshot_table),
        incompatible,
        compatible: CompatibleFeatures::default(),
        autoclear: AutoclearFeatures::default(),
        header_length: raw::Header::LEN,
        compression_type: compression,
        padding: [0; 7],
        unknown_fields: Vec::new(),
        backing_name: None,
        extensions,
    }))
}

/// Whether extended entries explain more tables than standard ones do.
fn best_entries(planner: &Planner<'_, '_>, bits: u32) -> Result<bool, PlanError> {
    let count = |extended| -> Result<usize, PlanError> {
        let Ok(geometry) = Geometry::new(bits, 4, extended) else {
            return Ok(0);
        };
        let rules = EntryRules {
            geometry,
            external_data: false,
            version2: false,
        };
        Ok(l2_tables(planner, rules)?.len())
    };
    // A standard table read as an extended one has offsets for bitmaps, and the other way round; where both fit, standard is it.
    Ok(count(true)? > count(false)?)
}

/// The end of the last guest cluster that is mapped.
fn last_mapped(
    planner: &Planner<'_, '_>,
    rules: EntryRules,
    l1: u64,
    used: u64,
) -> Result<u64, PlanError> {
    let geometry = rules.geometry;
    let Some(last) = used.checked_sub(1) else {
        return Ok(geometry.cluster_size());
    };
    let mut word = [0; 8];
    planner.overlay.read_at(&mut word, l1 + last * 8)?;
    let table = L1Entry::from_be_bytes(word).l2_table().get();
    let mut bytes = vec![0; geometry.cluster_len()];
    planner.overlay.read_at(&mut bytes, table)?;
    let entry = usize::try_from(geometry.l2_entry_size()).unwrap_or(8);
    let entries = bytes.chunks_exact(entry);
    let index = entries
        .into_iter()
        .rposition(|entry| !crate::reader::is_zero(entry));
    let clusters = index.map_or(1, |index| index as u64 + 1);
    Ok(last * geometry.l2_coverage() + (clusters << geometry.cluster_bits()))
}

/// By which codec the first compressed cluster is compressed.
fn compression(
    planner: &Planner<'_, '_>,
    rules: EntryRules,
    tables: &[u64],
) -> Result<CompressionType, PlanError> {
    let mut bytes = vec![0; rules.geometry.cluster_len()];
    for table in tables {
        if let Some(found) = header::compression_in(planner, rules, *table, &mut bytes)? {
            return Ok(found);
        }
    }
    Ok(CompressionType::Zlib)
}
