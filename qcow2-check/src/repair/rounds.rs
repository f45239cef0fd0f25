//! Round after round until nothing but refcounts is wrong.
//!
//! Each round looks at the picture anew and does one kind of thing: what stands nearer to the root first, since all behind it
//! depends on that.

use std::sync::Arc;

use super::action::{Action, ActionKind, Effect};
use super::claims::Claims;
use super::plan::Planner;
use super::refcounts::{hopeless, no_threads};
use super::{Level, PlanError, bitmaps, entries, l1, snapshots, tables};
use crate::image::Image;
use crate::load;
use crate::refmap::{PAGE_CLUSTERS, RefMap};
use crate::walk::L1Scan;
use crate::{Code, Finding, Place, Run, Structure, references};

/// More rounds than that no sane image needs; a hostile one may have damage below damage.
const ROUNDS_MAX: usize = 64;

/// What the walk finds and the rounds can do something about.
const CODES: &[Code] = &[
    Code::ReferencePastEnd,
    Code::L1Reserved,
    Code::L1Unaligned,
    Code::L1NoTable,
    Code::L2Shared,
    Code::L2Reserved,
    Code::L2ZeroFlag,
    Code::L2Unaligned,
    Code::L2UnalignedZero,
    Code::CompressedCopied,
    Code::CompressedExternal,
    Code::CompressedSubclusters,
    Code::CompressedOffset,
    Code::SubclusterConflict,
    Code::SubclusterUnallocated,
    Code::ExternalOffset,
    Code::BitmapTableReserved,
];

/// Puts everything right but refcounts and COPIED flags.
pub(super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    for _ in 0..ROUNDS_MAX {
        let options = planner.check_options();
        let round = Run::start(&options, |run| round(planner, run));
        if !round.unwrap_or_else(|| Err(no_threads()))? {
            return Ok(());
        }
        if planner.is_cancelled() {
            return Err(PlanError::Cancelled);
        }
    }
    let place = Place::of(Structure::File);
    let finding = Finding::new(
        Code::CheckLimited,
        place,
        "damage below damage without an end",
    );
    Err(PlanError::Hopeless(Box::new(finding)))
}

/// One round. Tells whether there may be more to do.
fn round(planner: &mut Planner<'_, '_>, run: Run<'_>) -> Result<bool, PlanError> {
    let overlay = Arc::clone(&planner.overlay);
    let run = planner.look(run);
    let Some(loaded) = load::load(&*overlay, &run) else {
        return Err(hopeless(run));
    };
    let image = &loaded.image;
    keep_clear(planner, image);
    // What is named by a table that can't be read is not known, and must not be taken for nothing.
    planner.snapshots_known = image.reader.failure().is_none();
    planner.note_unreadable(image);
    if planner.snapshots_known
        && (snapshots::mend(planner, image)? || bitmaps::mend(planner, image)?)
        || grow(planner, image)?
        || l1::part_shared_l1(planner, image)?
    {
        return Ok(true);
    }
    let Some(counted) = references::count_others(&loaded, &run) else {
        return Err(hopeless(run));
    };
    planner.keep_clear(counted.map.end() << image.cluster_bits());
    planner.note_unreadable(image);
    let wanted = wanted(image, &counted.map, &counted.scan);
    let found = CODES.iter().any(|code| run.total(*code) > 0);
    let Some(wanted) = wanted.or_else(|| found.then(|| RefMap::new(image.file_clusters()))) else {
        return Ok(false);
    };
    let again = || {
        let mut copy = RefMap::new(image.file_clusters());
        each(&wanted, |cluster| {
            copy.insert(cluster);
        });
        copy
    };
    if shorten_l1(planner, image, &wanted)? {
        return Ok(true);
    }
    // Copying the data needs no judgement where refcounts do, but salvage is to leave nothing of the damage.
    let mixed = planner.options.level != Level::Salvage;
    let mut claims = Claims::new(image, again(), mixed);
    if tables::mend(planner, image, &counted.scan, &mut claims)? {
        return Ok(true);
    }
    let mut claims = Claims::new(image, again(), mixed);
    entries::mend(
        planner,
        image,
        &counted.scan,
        &mut claims,
        &loaded.bitmaps,
        &run,
    )
}

/// Keeps new clusters off what the header names, be it inside the file or just behind.
fn keep_clear(planner: &mut Planner<'_, '_>, image: &Image<'_>) {
    for range in &image.metadata {
        if image.is_inside(range.offset, range.len) {
            planner.keep_clear(range.offset.saturating_add(range.len));
        }
    }
}

/// Calls `each` for every cluster of a map.
fn each(map: &RefMap, mut each: impl FnMut(u64)) {
    let mut next = 0;
    while let Some(page) = map.next_page(next, u64::MAX) {
        let first = page * PAGE_CLUSTERS;
        for cluster in first..first + PAGE_CLUSTERS {
            if map.is_seen(cluster) {
                each(cluster);
            }
        }
        next = page + 1;
    }
}

/// Clusters with owners that may not share them, or more than refcounts can count. `None` if there are none.
fn wanted(image: &Image<'_>, map: &RefMap, scan: &L1Scan) -> Option<RefMap> {
    let mut wanted = RefMap::new(image.file_clusters());
    let mut any = false;
    for cluster in map.conflicts() {
        wanted.insert(cluster);
        any = true;
    }
    for table in &scan.duplicates {
        wanted.insert(table.offset >> image.cluster_bits());
        any = true;
    }
    let max = image.geometry.refcount_max();
    let mut next = 0;
    while let Some(number) = map.next_page(next, u64::MAX) {
        next = number + 1;
        let Some(page) = map.page(number).filter(crate::refmap::Page::is_shared) else {
            continue;
        };
        for at in 0..usize::try_from(PAGE_CLUSTERS).unwrap_or(0) {
            if page.weight(at) > max {
                wanted.insert(number * PAGE_CLUSTERS + at as u64);
                any = true;
            }
        }
    }
    any.then_some(wanted)
}

/// Longest area that a LUKS header and its key material fill, and more.
const CRYPTO_MAX: u64 = 64 << 20;

/// Makes a file that ends inside the active L1 table, or inside the key material, long enough for it.
fn grow(planner: &mut Planner<'_, '_>, image: &Image<'_>) -> Result<bool, PlanError> {
    let header = &image.header;
    if let Some(crypto) = header.crypto() {
        let (offset, len) = (crypto.offset.get(), crypto.len_bytes);
        if offset < image.file_len() && len <= CRYPTO_MAX && !image.is_inside(offset, len) {
            let place = Place::of(Structure::CryptoHeader).at(offset, len);
            let reason =
                "the file ends inside the key material; slots that lie before the end work";
            planner.add(Action::new(ActionKind::GrowFile, place, reason));
            planner.keep_clear(offset + len);
            planner.overlay.grow(offset + len);
            return Ok(true);
        }
    }
    let offset = header.l1_table_offset.get();
    let len = u64::from(header.l1_entries) * 8;
    if len == 0 || image.is_inside(offset, len) {
        return Ok(false);
    }
    let place = Place::of(Structure::ActiveL1).at(offset, len);
    if offset >= image.file_len() {
        let detail = image.past_end(offset);
        let finding = Finding::new(Code::ReferencePastEnd, place, detail);
        return Err(PlanError::Hopeless(Box::new(finding)));
    }
    let end = offset.saturating_add(len);
    let action = Action::new(
        ActionKind::GrowFile,
        place,
        "the file ends inside the table",
    );
    planner.add(action.effect(Effect::Lost));
    planner.keep_clear(end);
    planner.overlay.grow(end);
    planner.hidden = true;
    Ok(true)
}

/// Where the header says how many entries the active L1 table has.
const L1_ENTRIES: u64 = 36;

fn set_l1_entries(
    planner: &mut Planner<'_, '_>,
    entries: u64,
    reason: &'static str,
) -> Result<(), PlanError> {
    let layer = planner.overlay.layer();
    let entries = u32::try_from(entries).unwrap_or(0);
    planner
        .overlay
        .write(layer, L1_ENTRIES, &entries.to_be_bytes())?;
    let place = Place::of(Structure::Header).at(L1_ENTRIES, 4);
    let action = Action::new(ActionKind::MendHeader, place, reason);
    planner.add(action.changes(L1_ENTRIES, 4).effect(Effect::None));
    Ok(())
}

/// Takes entries from the active L1 table that the disk does not need and that lie on something else.
fn shorten_l1(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    wanted: &RefMap,
) -> Result<bool, PlanError> {
    let header = &image.header;
    let needed = image.geometry.l1_entries_for(header.virtual_size_raw);
    let bits = image.cluster_bits();
    let offset = header.l1_table_offset.get();
    let first = offset.saturating_add(needed * 8).div_ceil(1 << bits);
    let end = offset.saturating_add(u64::from(header.l1_entries) * 8);
    let overlaps = (first..end.div_ceil(1 << bits)).any(|cluster| wanted.is_seen(cluster));
    if overlaps && needed < u64::from(header.l1_entries) {
        let reason = "more entries than the disk needs, on something else";
        set_l1_entries(planner, needed, reason)?;
        return Ok(true);
    }
    Ok(false)
}
