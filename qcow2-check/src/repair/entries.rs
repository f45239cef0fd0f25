//! L2 entries, and the clusters of data they lead to.

use qcow2_format::geometry::HOST_OFFSET_LIMIT;
use qcow2_format::header::{CryptMethod, Version};
use qcow2_format::l2::L2Table;
use qcow2_format::{BitmapTableEntry, ClusterKind, HostOffset, L2Entry};

use super::PlanError;
use super::action::{Action, ActionKind, Effect};
use super::claims::{Claims, Outcome, Owner};
use super::plan::Planner;
use super::subclusters::{self, Settled};
use super::tables::{by_table, claim_others, claim_roots, each_index, is_active, words};
use crate::image::Image;
use crate::walk::L1Scan;
use crate::{ByteRange, Place, Structure, bitmaps};

const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;
/// Bits of a host offset in an entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// What is wrong with an entry, and what makes it right.
#[derive(Debug)]
enum Verdict {
    Sound,
    /// Bits are wrong; the cluster stays.
    Mend(L2Entry, String, Effect),
    /// The cluster can't be known or is not there. Whether it may have been: just behind the end of a file that was cut.
    Lost(String, bool),
    /// There is none, and nothing is lost by that.
    NoCluster(L2Entry, String),
}

/// How many of a table's entries are what.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Judged {
    pub(super) sound: u64,
    pub(super) mendable: u64,
    /// They lead just behind the end of the file.
    pub(super) cut: u64,
    pub(super) lost: u64,
}

/// Judges all entries of a table.
pub(super) fn judge_table(image: &Image<'_>, index: u64, bytes: &[u8]) -> Judged {
    let mut judged = Judged::default();
    for (number, entry) in (0..).zip(L2Table::new(bytes, image.geometry).iter()) {
        if entry.is_empty() {
            continue;
        }
        match judge(image, image.guest_offset(index, number), entry) {
            Verdict::Sound => judged.sound += 1,
            // Where even the bits that mean nothing are set, it is a number of something else.
            Verdict::NoCluster(..) if entry.reserved_bits() != 0 => judged.lost += 1,
            Verdict::Mend(..) | Verdict::NoCluster(..) => judged.mendable += 1,
            Verdict::Lost(_, true) => judged.cut += 1,
            Verdict::Lost(_, false) => judged.lost += 1,
        }
    }
    judged
}

fn judge(image: &Image<'_>, guest: u64, entry: L2Entry) -> Verdict {
    let rules = image.rules;
    let (word, bitmap) = (entry.word(), entry.bitmap());
    let mut mended = entry;
    let mut reasons: Vec<String> = Vec::new();
    let mut effect = Effect::None;
    if entry.reserved_bits() != 0 {
        reasons.push(format!("reserved bits {:#x}", entry.reserved_bits()));
        mended = L2Entry::from_bits(word & !entry.reserved_bits(), bitmap);
    }
    if mended.misplaced_zero_flag(rules) {
        reasons.push("a zero flag that the image's version has not".to_owned());
        mended = L2Entry::from_bits(mended.word() & !ZERO, bitmap);
        effect = Effect::Reachable;
    }
    match mended.kind(rules) {
        ClusterKind::Unallocated => {
            if mended.allocated_subclusters() != 0 {
                let reason = format!("subclusters {bitmap:#x} without a cluster");
                return Verdict::Lost(reason, true);
            }
        }
        ClusterKind::ZeroPlain => {}
        ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
            let extended = image.geometry.extended_l2();
            let holds_data = if extended {
                mended.allocated_subclusters() != 0
            } else {
                !mended.has_zero_flag()
            };
            let both = mended.allocated_subclusters() & mended.zero_subclusters();
            if both != 0 {
                reasons.push(format!("subclusters {both:#x} both allocated and zero"));
                let bitmap = mended.bitmap() & !(u64::from(both) << 32);
                mended = L2Entry::from_bits(mended.word(), bitmap);
                effect = Effect::Ambiguous;
            }
            if rules.external_data {
                if host.get() != guest {
                    reasons.push(format!("host offset {host}, guest offset {guest:#x}"));
                    let word = mended.word() & !OFFSET_MASK | guest & OFFSET_MASK | COPIED;
                    mended = L2Entry::from_bits(word, mended.bitmap());
                    effect = effect.max(Effect::Reachable);
                }
            } else if !image.geometry.is_cluster_aligned(host)
                || !image.is_inside(host.get(), image.cluster_size())
            {
                let reason = format!("leads to {host}");
                if holds_data {
                    let aligned = image.geometry.is_cluster_aligned(host);
                    return Verdict::Lost(reason, aligned && is_near(image, host.get()));
                }
                let word = if extended { 0 } else { ZERO };
                return Verdict::NoCluster(L2Entry::from_bits(word, mended.bitmap()), reason);
            }
        }
        ClusterKind::Compressed(extent) => {
            let offset = extent.offset.get();
            let starts = offset < image.file_len() && offset < HOST_OFFSET_LIMIT;
            if rules.external_data || !starts {
                let reason = format!("compressed data at {}", extent.offset);
                return Verdict::Lost(reason, !rules.external_data && is_near(image, offset));
            }
            if !image.is_inside(offset, extent.len_bytes) {
                // What lies behind the end reads as zeros, so a shorter window holds the same.
                let len = image.file_len() - offset;
                let shorter = L2Entry::compressed(image.geometry, extent.offset, len);
                let Some(shorter) = shorter else {
                    let reason = format!("compressed data at {}", extent.offset);
                    return Verdict::Lost(reason, true);
                };
                reasons.push("compressed data that goes on behind the end of the file".to_owned());
                mended = L2Entry::from_bits(shorter.word() | mended.word() & COPIED, bitmap);
            }
            if mended.is_copied() || bitmap != 0 {
                reasons.push("flags that compressed data has not".to_owned());
                mended = L2Entry::from_bits(mended.word() & !COPIED, 0);
                if bitmap != 0 {
                    effect = Effect::Reachable;
                }
            }
        }
    }
    if reasons.is_empty() {
        Verdict::Sound
    } else {
        Verdict::Mend(mended, reasons.join(", "), effect)
    }
}

/// Whether an offset is not so far behind the end of the file that it can't have been in it.
pub(super) fn is_near(image: &Image<'_>, offset: u64) -> bool {
    offset < image.file_len().saturating_mul(2).saturating_add(64 << 20)
}

/// One pass over all L2 entries.
struct Mending<'p, 'a, 'o, 'i> {
    planner: &'p mut Planner<'a, 'o>,
    image: &'p Image<'i>,
    claims: &'p mut Claims,
    /// Layers for what is copied, and for the pointers to it.
    layers: Option<(usize, usize)>,
}

/// Puts L2 entries right, and gives each guest cluster a place of its own. Tells whether anything was changed.
pub(super) fn mend(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    scan: &L1Scan,
    claims: &mut Claims,
    loaded: &[bitmaps::BitmapInfo],
    run: &crate::Run<'_>,
) -> Result<bool, PlanError> {
    let size = image.cluster_size();
    claim_roots(image, claims);
    for active in [true, false] {
        each_index(image, scan, |index, hooks| {
            for (offset, trees) in by_table(image, hooks) {
                if is_active(image, &trees) == active {
                    claims.claim(offset, size, Owner::Table(index), 1);
                }
            }
            Ok(())
        })?;
        if active {
            claim_others(image, claims);
        }
    }
    let mut mending = Mending {
        planner,
        image,
        claims,
        layers: None,
    };
    let mut buffer = vec![0; image.geometry.cluster_len()];
    for active in [true, false] {
        each_index(image, scan, |index, hooks| {
            for (offset, trees) in by_table(image, hooks) {
                let known = image.reader.is_known_zero(offset, size);
                if is_active(image, &trees) == active
                    && !known
                    && image.reader.read(&mut buffer, offset).is_ok()
                {
                    mending.table(index, offset, &trees, &buffer)?;
                }
            }
            Ok(())
        })?;
    }
    mending.bitmaps(loaded, run)?;
    Ok(mending.layers.is_some())
}

impl Mending<'_, '_, '_, '_> {
    fn layers(&mut self) -> (usize, usize) {
        let overlay = &self.planner.overlay;
        *self
            .layers
            .get_or_insert_with(|| (overlay.layer(), overlay.layer()))
    }

    fn table(
        &mut self,
        index: u64,
        offset: u64,
        trees: &[usize],
        bytes: &[u8],
    ) -> Result<(), PlanError> {
        let image = self.image;
        let weight = trees
            .iter()
            .filter_map(|tree| image.trees.get(*tree))
            .fold(0_u64, |sum, tree| sum.saturating_add(tree.weight));
        let first = trees.first().and_then(|tree| image.trees.get(*tree));
        let snapshot = if is_active(image, trees) {
            None
        } else {
            first.and_then(|tree| tree.snapshot)
        };
        let table = L2Table::new(bytes, image.geometry);
        for (number, entry) in (0_u64..).zip(table.iter()) {
            if entry.is_empty() {
                continue;
            }
            let guest = image.guest_offset(index, number);
            let at = offset.saturating_add(number * image.geometry.l2_entry_size());
            let place = Place::of(Structure::L2Table)
                .at(at, image.geometry.l2_entry_size())
                .entry(number)
                .guest(guest, image.cluster_size())
                .snapshot(snapshot);
            if let Some(settled) = subclusters::settle(image, guest, entry) {
                self.settle(settled, entry, &place, at)?;
                continue;
            }
            match judge(image, guest, entry) {
                Verdict::Sound => self.claim(entry, guest, at, weight, place)?,
                Verdict::Mend(mended, reason, effect) => {
                    let reason = format!("entry {:#x} has {reason}", entry.word());
                    self.set(at, mended)?;
                    let action = Action::new(ActionKind::MendL2Entry, place, reason);
                    self.tell(action.effect(effect), at);
                }
                Verdict::NoCluster(mended, reason) => {
                    let reason = format!("entry {:#x} {reason}, and reads as zeros", entry.word());
                    self.set(at, mended)?;
                    self.planner.hidden = true;
                    let action = Action::new(ActionKind::DropL2Entry, place, reason);
                    self.tell(action, at);
                }
                Verdict::Lost(reason, _) => {
                    let reason = format!("entry {:#x}: {reason}", entry.word());
                    let blank = self.blank(entry, guest)?;
                    self.set(at, blank)?;
                    self.planner.hidden = true;
                    let action = Action::new(ActionKind::DropL2Entry, place, reason);
                    self.tell(action.effect(Effect::Lost), at);
                }
            }
        }
        Ok(())
    }

    /// Writes an entry whose bitmap was contradictory. What else is wrong with it, the next round sees.
    fn settle(
        &mut self,
        settled: Settled,
        entry: L2Entry,
        place: &Place,
        at: u64,
    ) -> Result<(), PlanError> {
        self.set(at, settled.entry)?;
        self.planner.hidden |= settled.hidden;
        for part in settled.parts {
            let len = part.guest.end - part.guest.start;
            let place = place.clone().guest(part.guest.start, len);
            let reason = format!("entry {:#x}: {}", entry.word(), part.reason);
            let action = Action::new(part.kind, place, reason);
            self.tell(action.effect(part.effect), at);
        }
        Ok(())
    }

    fn tell(&mut self, action: Action, at: u64) {
        let len = self.image.geometry.l2_entry_size();
        self.planner.add(action.changes(at, len));
    }

    fn set(&mut self, at: u64, entry: L2Entry) -> Result<(), PlanError> {
        let (_, layer) = self.layers();
        let mut bytes = entry.word().to_be_bytes().to_vec();
        if self.image.geometry.extended_l2() {
            bytes.extend(entry.bitmap().to_be_bytes());
        }
        self.planner.overlay.write(layer, at, &bytes)?;
        Ok(())
    }

    /// An entry that reads as zeros where `entry` had data: what is in a backing file is older, and must not show through.
    fn blank(&mut self, entry: L2Entry, guest: u64) -> Result<L2Entry, PlanError> {
        let header = &self.image.header;
        if self.image.geometry.extended_l2() && !entry.is_compressed() {
            let zero = entry.allocated_subclusters() | entry.zero_subclusters();
            return Ok(L2Entry::from_bits(0, u64::from(zero) << 32));
        }
        if self.image.geometry.extended_l2() {
            return Ok(L2Entry::from_bits(0, u64::from(u32::MAX) << 32));
        }
        if header.version == Version::V3 {
            return Ok(L2Entry::from_bits(ZERO, 0));
        }
        if header.backing_name.is_none() {
            return Ok(L2Entry::default());
        }
        let size = self.image.cluster_size();
        let new = self.planner.allocate(1, size)?;
        let (content, _) = self.layers();
        // Without the key it reads as noise; lost it is all the same.
        if self.image.is_encrypted() && self.planner.open_key(header)? {
            let overlay = &self.planner.overlay;
            overlay.write_encrypted_zeros(content, new, size, guest)?;
        }
        self.planner.overlay.grow(new + size);
        Ok(L2Entry::normal(HostOffset::new(new), false, 0))
    }

    /// Claims what a sound entry leads to; if it is taken, the entry gets a copy.
    fn claim(
        &mut self,
        entry: L2Entry,
        guest: u64,
        at: u64,
        weight: u64,
        place: Place,
    ) -> Result<(), PlanError> {
        let image = self.image;
        let size = image.cluster_size();
        if image.rules.external_data {
            return Ok(());
        }
        let (offset, len, owner) = match entry.kind(image.rules) {
            ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                let owner = Owner::Data(guest >> image.cluster_bits());
                (host.get(), size, owner)
            }
            ClusterKind::Compressed(extent) => {
                (extent.offset.get(), extent.len_bytes, Owner::Packed)
            }
            _ => return Ok(()),
        };
        let outcome = self.claims.claim(offset, len, owner, weight);
        let (why, effect) = match outcome {
            Outcome::Granted => return Ok(()),
            Outcome::Taken(known) => (
                format!("its cluster at {offset:#x} is the {}, too", words(known)),
                Effect::Ambiguous,
            ),
            Outcome::Full => (
                format!("refcounts can't count all that have the cluster at {offset:#x}"),
                Effect::None,
            ),
        };
        // Who had it first may have the other's data just as well.
        let others = match outcome {
            Outcome::Taken(Owner::Data(first)) => {
                vec![ByteRange::new(first << image.cluster_bits(), size)]
            }
            _ => Vec::new(),
        };
        let no_data = match entry.kind(image.rules) {
            ClusterKind::ZeroAllocated(_) => true,
            ClusterKind::Normal(_) => {
                image.geometry.extended_l2() && entry.allocated_subclusters() == 0
            }
            _ => false,
        };
        if no_data {
            let word = if image.geometry.extended_l2() {
                0
            } else {
                ZERO
            };
            self.set(at, L2Entry::from_bits(word, entry.bitmap()))?;
            let reason = format!("{why}, and it needs none");
            let action = Action::new(ActionKind::DropL2Entry, place, reason);
            self.tell(action, at);
            return Ok(());
        }
        if !self.planner.overlay.can_read(offset, len) {
            // A copy of what can't be read is none; the check of the outcome tells that two have it.
            self.planner.unreadable = true;
            return Ok(());
        }
        // What is encrypted by its place can't be moved without the key.
        let by_place = image.header.crypt_method == CryptMethod::Luks && owner != Owner::Packed;
        if by_place && !self.planner.open_key(&image.header)? {
            // The check of the outcome tells of it.
            return Ok(());
        }
        let (copy, _) = self.layers();
        let within = if owner == Owner::Packed {
            offset % 512
        } else {
            0
        };
        let clusters = image.geometry.clusters_for(within + len);
        let new = self.planner.allocate(clusters, size)?;
        let new_entry = if owner == Owner::Packed {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            image.reader.read(&mut bytes, offset)?;
            self.planner.overlay.write(copy, new + within, &bytes)?;
            let host = HostOffset::new(new + within);
            L2Entry::compressed(image.geometry, host, len)
        } else {
            let overlay = &self.planner.overlay;
            if by_place {
                overlay.copy_encrypted(copy, offset, new, size, guest)?;
            } else {
                overlay.copy(copy, offset, new, size)?;
            }
            let word = entry.word() & !(OFFSET_MASK | COPIED) | new & OFFSET_MASK;
            Some(L2Entry::from_bits(word, entry.bitmap()))
        };
        self.planner.overlay.grow(new + clusters * size);
        let Some(new_entry) = new_entry else {
            return Err(PlanError::Limit {
                what: "file",
                found: new,
                limit: HOST_OFFSET_LIMIT,
            });
        };
        self.set(at, new_entry)?;
        let action = Action::new(ActionKind::CopyCluster, place, why).also(others);
        self.tell(action.effect(effect).changes(new, clusters * size), at);
        Ok(())
    }

    /// Clusters of bitmaps that are somebody else's: what they should have said is not known, so all counts as changed.
    fn bitmaps(
        &mut self,
        loaded: &[bitmaps::BitmapInfo],
        run: &crate::Run<'_>,
    ) -> Result<(), PlanError> {
        let image = self.image;
        let size = image.cluster_size();
        let mut lost = Vec::new();
        for (number, bitmap) in (0_u64..).zip(loaded) {
            bitmaps::each_entry(image, bitmap, run, |index, entry: BitmapTableEntry| {
                let at = bitmap.table_offset() + index * 8;
                if super::bitmaps::is_bad(image, entry) {
                    let reason =
                        format!("entry {:#x} of bitmap {number} leads nowhere", entry.bits());
                    lost.push((at, index, reason));
                    return;
                }
                let qcow2_format::bitmap::BitmapCluster::Cluster(offset) = entry.kind() else {
                    return;
                };
                // Each entry is an owner of its own.
                let owner = Owner::Meta(Structure::BitmapData, Some(number << 32 | index));
                let outcome = self.claims.claim(offset.get(), size, owner, 1);
                if let Outcome::Taken(known) = outcome {
                    let reason = format!(
                        "bitmap {number}: its cluster at {offset} is the {}, too",
                        words(known)
                    );
                    lost.push((at, index, reason));
                }
            });
        }
        for (at, index, reason) in lost {
            let (_, layer) = self.layers();
            super::bitmaps::mark(self.planner, layer, at, index, reason)?;
        }
        Ok(())
    }
}
