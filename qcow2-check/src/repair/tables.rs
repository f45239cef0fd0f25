//! L1 entries and the L2 tables they lead to.
//!
//! Done before any L2 entry is touched: a table is changed in place only when it is certain that its cluster is nobody else's.

use std::collections::HashSet;

use qcow2_format::{HostOffset, L1Entry};

use super::PlanError;
use super::action::{Action, ActionKind, Effect};
use super::claims::{Claims, Outcome, Owner};
use super::entries::{Judged, judge_table};
use super::l1::{give_way, is_no_l1, settle_snapshots};
use super::plan::Planner;
use crate::image::{Image, MetaRange};
use crate::walk::{L1Scan, Window};
use crate::{ByteRange, Code, Finding, Place, Structure};

/// An L1 entry and its tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hook {
    pub(super) tree: usize,
    pub(super) entry: L1Entry,
}

/// Calls `each` with the L1 entries that are not empty, index by index: those of all trees.
pub(super) fn each_index(
    image: &Image<'_>,
    scan: &L1Scan,
    mut each: impl FnMut(u64, &[Hook]) -> Result<(), PlanError>,
) -> Result<(), PlanError> {
    let plan = Window::plan(image);
    let mut window = Window::default();
    let mut hooks = Vec::new();
    for number in &scan.windows {
        window.load(image, &plan, *number, |_, _, _| {});
        for index in window.indices() {
            hooks.clear();
            hooks.extend(
                window
                    .entries(index)
                    .filter(|(_, entry)| !entry.is_empty())
                    .map(|(tree, entry)| Hook { tree, entry }),
            );
            if !hooks.is_empty() {
                each(index, &hooks)?;
            }
        }
    }
    Ok(())
}

/// The tables of an index: each with the trees that have it. The active tree's comes first.
pub(super) fn by_table(image: &Image<'_>, hooks: &[Hook]) -> Vec<(u64, Vec<usize>)> {
    let mut tables: Vec<(u64, Vec<usize>)> = Vec::new();
    for hook in hooks {
        let offset = hook.entry.l2_table().get();
        match tables.iter_mut().find(|(known, _)| *known == offset) {
            Some((_, trees)) => trees.push(hook.tree),
            None => tables.push((offset, vec![hook.tree])),
        }
    }
    let is_active = |trees: &[usize]| {
        let active = |tree: &usize| image.trees.get(*tree).is_some_and(|tree| tree.active);
        trees.iter().any(active)
    };
    tables.sort_by_key(|(_, trees)| !is_active(trees));
    tables
}

/// Whether the active tree is one of these.
pub(super) fn is_active(image: &Image<'_>, trees: &[usize]) -> bool {
    let active = |tree: &usize| image.trees.get(*tree).is_some_and(|tree| tree.active);
    trees.iter().any(active)
}

/// Claims what the header names, but for the refcount structures, which give way to all. Tells what is in the way of another.
pub(super) fn claim_roots(image: &Image<'_>, claims: &mut Claims) -> Vec<MetaRange> {
    let order = [
        Structure::Header,
        Structure::ActiveL1,
        Structure::CryptoHeader,
        Structure::SnapshotTable,
        Structure::BitmapDirectory,
    ];
    let mut lost = Vec::new();
    for structure in order {
        for range in image.metadata.iter().filter(|r| r.structure == structure) {
            if !claim_range(image, claims, range) {
                lost.push(range.clone());
            }
        }
    }
    lost
}

fn claim_range(image: &Image<'_>, claims: &mut Claims, range: &MetaRange) -> bool {
    let owner = Owner::Meta(range.structure, range.index);
    range.len == 0
        || !image.is_inside(range.offset, range.len)
        || claims.claim(range.offset, range.len, owner, 1) == Outcome::Granted
}

/// Claims snapshots' L1 tables and bitmap tables. Tells which of them can't have their place.
pub(super) fn claim_others(image: &Image<'_>, claims: &mut Claims) -> Vec<MetaRange> {
    let wanted = [Structure::SnapshotL1, Structure::BitmapTable];
    let ranges = image.metadata.iter();
    let mut lost = Vec::new();
    for range in ranges.filter(|range| wanted.contains(&range.structure)) {
        if !claim_range(image, claims, range) {
            lost.push(range.clone());
        }
    }
    lost
}

/// One pass over all L1 entries.
struct Mending<'p, 'a, 'o, 'i> {
    planner: &'p mut Planner<'a, 'o>,
    image: &'p Image<'i>,
    claims: &'p mut Claims,
    /// Layers for what is copied, and for the pointers to it.
    layers: Option<(usize, usize)>,
    buffer: Vec<u8>,
}

/// Puts L1 entries right, and gives each L2 table a place of its own. Tells whether anything was wrong.
pub(super) fn mend(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    scan: &L1Scan,
    claims: &mut Claims,
) -> Result<bool, PlanError> {
    let mut none = Vec::new();
    for tree in &image.trees {
        if is_no_l1(image, tree, claims) {
            none.push((tree.offset, tree.entries * 8));
        }
    }
    if none
        .iter()
        .any(|(offset, _)| *offset == image.header.l1_table_offset.get())
    {
        let place = Place::of(Structure::ActiveL1).at(image.header.l1_table_offset.get(), 0);
        let finding = Finding::new(Code::L1Unreadable, place, "what lies there is no L1 table");
        return Err(PlanError::Hopeless(Box::new(finding)));
    }
    let none: HashSet<u64> = none.into_iter().map(|(offset, _)| offset).collect();
    if settle_snapshots(planner, image, claims, &none)? {
        return Ok(true);
    }
    let roots = claim_roots(image, claims);
    if give_way(planner, image, &roots)? {
        return Ok(true);
    }
    let mut mending = Mending {
        planner,
        image,
        claims,
        layers: None,
        buffer: Vec::new(),
    };
    each_index(image, scan, |index, hooks| {
        mending.index(index, hooks, true)
    })?;
    let others = claim_others(image, mending.claims);
    each_index(image, scan, |index, hooks| {
        mending.index(index, hooks, false)
    })?;
    let changed = mending.layers.is_some();
    Ok(give_way(planner, image, &others)? || changed)
}

impl Mending<'_, '_, '_, '_> {
    fn layers(&mut self) -> (usize, usize) {
        let overlay = &self.planner.overlay;
        *self
            .layers
            .get_or_insert_with(|| (overlay.layer(), overlay.layer()))
    }

    /// Judges the entries of an index: those of tables that the active tree has, or the others.
    fn index(&mut self, index: u64, hooks: &[Hook], active: bool) -> Result<(), PlanError> {
        let image = self.image;
        if active {
            for hook in hooks {
                self.entry(index, *hook)?;
            }
        }
        for (offset, trees) in by_table(image, hooks) {
            if is_active(image, &trees) == active && self.is_table(offset) {
                self.table(index, offset, &trees)?;
            }
        }
        Ok(())
    }

    /// Whether a table can lie there.
    fn is_table(&self, offset: u64) -> bool {
        let image = self.image;
        offset != 0
            && offset.is_multiple_of(image.cluster_size())
            && image.is_inside(offset, image.cluster_size())
    }

    fn place(&self, index: u64, tree: usize) -> Place {
        let image = self.image;
        let tree = image.trees.get(tree);
        let structure = match tree {
            Some(tree) if !tree.active => Structure::SnapshotL1,
            _ => Structure::ActiveL1,
        };
        Place::of(structure)
            .at(self.address(index, tree.map_or(0, |tree| tree.offset)), 8)
            .entry(index)
            .guest(image.guest_offset(index, 0), image.geometry.l2_coverage())
            .snapshot(tree.and_then(|tree| tree.snapshot))
    }

    #[expect(
        clippy::unused_self,
        reason = "reads as where an entry of this image lies"
    )]
    fn address(&self, index: u64, table: u64) -> u64 {
        table.saturating_add(index.saturating_mul(8))
    }

    /// Writes an L1 entry.
    fn set(&mut self, index: u64, tree: usize, entry: u64) -> Result<u64, PlanError> {
        let (_, layer) = self.layers();
        let offset = self.image.trees.get(tree).map_or(0, |tree| tree.offset);
        let at = self.address(index, offset);
        self.planner
            .overlay
            .write(layer, at, &entry.to_be_bytes())?;
        Ok(at)
    }

    fn drop_entry(&mut self, index: u64, tree: usize, reason: String) -> Result<(), PlanError> {
        let at = self.set(index, tree, 0)?;
        self.planner.hidden = true;
        let place = self.place(index, tree);
        let action = Action::new(ActionKind::DropL1Entry, place, reason);
        self.planner.add(action.changes(at, 8).effect(Effect::Lost));
        Ok(())
    }

    /// What is wrong with an entry itself.
    fn entry(&mut self, index: u64, hook: Hook) -> Result<(), PlanError> {
        let Hook { tree, entry } = hook;
        let offset = entry.l2_table();
        let bits = entry.bits();
        if offset.get() == 0 {
            let at = self.set(index, tree, 0)?;
            let place = self.place(index, tree);
            let reason = format!("entry {bits:#x} has no offset");
            let action = Action::new(ActionKind::MendL1Entry, place, reason);
            self.planner.add(action.changes(at, 8));
        } else if !self.is_table(offset.get()) {
            let reason = format!("entry {bits:#x} leads to no L2 table");
            self.drop_entry(index, tree, reason)?;
        } else if entry.reserved_bits() != 0 {
            let mended = L1Entry::new(offset, entry.is_copied());
            let at = self.set(index, tree, mended.bits())?;
            let place = self.place(index, tree);
            let reason = format!("entry {bits:#x} has reserved bits");
            let action = Action::new(ActionKind::MendL1Entry, place, reason);
            self.planner.add(action.changes(at, 8));
        }
        Ok(())
    }

    /// Claims the cluster of a table.
    fn table(&mut self, index: u64, offset: u64, trees: &[usize]) -> Result<(), PlanError> {
        let image = self.image;
        let size = image.cluster_size();
        let wanted = self.claims.is_wanted(offset);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(image.geometry.cluster_len(), 0);
        if image.reader.is_known_zero(offset, size) {
            buffer.fill(0);
        } else if image.reader.read(&mut buffer, offset).is_err() {
            self.buffer = buffer;
            // It may be a table, so it has its place; whether it is one nobody knows.
            let weight = trees.len() as u64;
            self.claims.claim(offset, size, Owner::Table(index), weight);
            return Ok(());
        }
        let Judged {
            sound,
            mendable,
            cut,
            lost,
        } = judge_table(image, index, &buffer);
        self.buffer = buffer;
        let none = if wanted {
            lost + mendable > sound
        } else {
            lost > 1 && lost > sound + mendable + cut
        };
        if none {
            let reason = format!(
                "at {offset:#x} is no L2 table: {} entries make no sense, {sound} do",
                lost + mendable
            );
            for tree in trees {
                self.drop_entry(index, *tree, reason.clone())?;
            }
            return Ok(());
        }
        if !wanted {
            return Ok(());
        }
        let mut new = None;
        for tree in trees {
            let weight = image.trees.get(*tree).map_or(1, |tree| tree.weight);
            match self.claims.claim(offset, size, Owner::Table(index), weight) {
                Outcome::Granted => {}
                Outcome::Taken(owner @ Owner::Meta(structure, _))
                    if structure != Structure::SnapshotL1
                        && structure != Structure::BitmapTable =>
                {
                    let reason =
                        format!("its L2 table at {offset:#x} would be the {}", words(owner));
                    self.drop_entry(index, *tree, reason)?;
                }
                outcome => {
                    // One copy does for all trees, if refcounts can count them.
                    let at = match new {
                        Some(at) if outcome != Outcome::Full => at,
                        _ => self.copy(index, *tree, offset, outcome)?,
                    };
                    new = Some(at);
                    let entry = L1Entry::new(HostOffset::new(at), false);
                    self.set(index, *tree, entry.bits())?;
                }
            }
        }
        Ok(())
    }

    fn copy(
        &mut self,
        index: u64,
        tree: usize,
        offset: u64,
        outcome: Outcome,
    ) -> Result<u64, PlanError> {
        let size = self.image.cluster_size();
        let at = self.planner.allocate(1, size)?;
        let (layer, _) = self.layers();
        self.planner.overlay.copy(layer, offset, at, size)?;
        let place = self.place(index, tree);
        let (reason, effect) = match outcome {
            Outcome::Taken(owner) => (
                format!("its L2 table at {offset:#x} is the {}, too", words(owner)),
                Effect::Ambiguous,
            ),
            _ => (
                format!("refcounts can't count the trees that have the table at {offset:#x}"),
                Effect::None,
            ),
        };
        let action = Action::new(ActionKind::CopyTable, place.clone(), reason);
        let entry = place.host.map_or(0, |host| host.start);
        let others = match outcome {
            Outcome::Taken(Owner::Table(first)) => {
                let start = self.image.guest_offset(first, 0);
                vec![ByteRange::new(start, self.image.geometry.l2_coverage())]
            }
            _ => Vec::new(),
        };
        let action = action.also(others);
        self.planner
            .add(action.changes(at, size).changes(entry, 8).effect(effect));
        Ok(at)
    }
}

/// Names an owner.
pub(super) fn words(owner: Owner) -> String {
    match owner {
        Owner::Meta(structure, None) => structure.to_string(),
        Owner::Meta(structure, Some(number)) => format!("{structure} of number {number}"),
        Owner::Table(index) => format!("L2 table of L1 entry {index}"),
        Owner::Data(cluster) => format!("guest cluster {cluster}"),
        Owner::Packed => "place of compressed data".to_owned(),
    }
}
