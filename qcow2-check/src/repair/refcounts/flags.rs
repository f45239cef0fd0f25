//! COPIED flags.

use qcow2_format::{L1Entry, L2Entry};
use qcow2_io::Storage;

use super::super::action::{Action, ActionKind, Effect};
use super::super::overlay::Overlay;
use super::super::plan::Planner;
use crate::copied::{self, Flags, WrongFlag};
use crate::image::{Image, Tree};
use crate::refmap::RefMap;
use crate::walk::{L1Scan, Window};
use crate::{Place, Structure};

/// Bits of a host offset in an entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Snapshots looked through for the one that shares a cluster.
const SNAPSHOTS_MAX: usize = 256;

/// What was corrected.
#[derive(Debug, Default)]
pub(super) struct Corrected {
    count: u64,
    /// Places where the guest may have written through a flag into what a snapshot has, too, as far as they are told one by one.
    written_through: Vec<Place>,
    /// How many there are.
    through: u64,
}

impl Corrected {
    pub(super) fn tell(self, planner: &mut Planner<'_, '_>) {
        let told = self.written_through.len() as u64;
        let plain = self.count.saturating_sub(self.through);
        if plain > 0 {
            let place = Place::of(Structure::L2Table);
            let reason = "the flags don't agree with the number of references";
            planner.add(Action::new(ActionKind::SetCopied, place, reason).times(plain));
        }
        let left = self.through.saturating_sub(told);
        let last = self.written_through.len().saturating_sub(1);
        for (number, place) in self.written_through.into_iter().enumerate() {
            let reason = "by its flag it belongs to the disk alone, but a snapshot has it, too: the snapshot may have what was written later";
            let more = if number == last { left } else { 0 };
            let action = Action::new(ActionKind::SetCopied, place, reason).times(1 + more);
            planner.add(action.effect(Effect::Ambiguous));
        }
    }
}

/// Corrects COPIED flags. If `only_clear`, none is set: there may be references that nobody could count.
pub(super) fn mend_flags(
    planner: &Planner<'_, '_>,
    layer: usize,
    image: &Image<'_>,
    map: &RefMap,
    scan: &L1Scan,
) -> Corrected {
    let judge = FlagSetter {
        overlay: &planner.overlay,
        layer,
        image,
        map,
        only_clear: planner.unreadable,
        told_max: planner.options.max_actions,
        done: Corrected::default(),
    };
    let plan = Window::plan(image);
    let mut flags = Flags::new(image, judge);
    for unit in 0..copied::units(scan) {
        flags.unit(&plan, scan, unit);
    }
    flags.judge.done
}

struct FlagSetter<'p, 'i> {
    overlay: &'p Overlay<'p>,
    layer: usize,
    image: &'p Image<'i>,
    map: &'p RefMap,
    only_clear: bool,
    told_max: usize,
    done: Corrected,
}

impl copied::Judge for FlagSetter<'_, '_> {
    fn is_one(&self, cluster: u64) -> Option<bool> {
        Some(self.map.weight(cluster) == 1)
    }

    fn wrong(&mut self, flag: WrongFlag<'_>) {
        if self.only_clear && !flag.copied {
            return;
        }
        let entry_size = self.image.geometry.l2_entry_size();
        let at = match flag.table {
            Some(table) => table.offset.saturating_add(flag.index * entry_size),
            None => self.image.active_entry(flag.index),
        };
        let mut word = [0; 8];
        if self.overlay.read_at(&mut word, at).is_ok() {
            let flipped = u64::from_be_bytes(word) ^ 1 << 63;
            if self
                .overlay
                .write(self.layer, at, &flipped.to_be_bytes())
                .is_ok()
            {
                self.done.count += 1;
                if flag.copied {
                    self.was_writable(&flag, at);
                }
            }
        }
    }
}

impl FlagSetter<'_, '_> {
    /// Remembers that the guest may have written to a cluster in place, although others have it.
    fn was_writable(&mut self, flag: &WrongFlag<'_>, at: u64) {
        let image = self.image;
        if image.trees.iter().all(|tree| tree.active) {
            return;
        }
        self.done.through += 1;
        if self.done.written_through.len() >= self.told_max {
            return;
        }
        let (l1_index, len) = match flag.table {
            Some(table) => (table.l1_index, image.cluster_size()),
            None => (flag.index, image.geometry.l2_coverage()),
        };
        let l2_index = flag.table.map(|_| flag.index);
        let mut trees = image.trees.iter().filter(|tree| !tree.active);
        let sharing = trees
            .by_ref()
            .take(SNAPSHOTS_MAX)
            .find(|tree| self.leads_to(tree, l1_index, l2_index) == Some(flag.host.get()));
        let structure = match flag.table {
            Some(_) => Structure::L2Table,
            None => Structure::ActiveL1,
        };
        let guest = image.guest_offset(l1_index, l2_index.unwrap_or(0));
        let place = Place::of(structure)
            .at(at, 8)
            .entry(flag.index)
            .guest(guest, len)
            .snapshot(sharing.and_then(|tree| tree.snapshot));
        self.done.written_through.push(place);
    }

    /// Where a tree's entry leads: that of its L1 table, or one of the L2 table there.
    fn leads_to(&self, tree: &Tree, l1_index: u64, l2_index: Option<u64>) -> Option<u64> {
        if l1_index >= tree.entries {
            return None;
        }
        let mut word = [0; 8];
        let at = tree.offset.checked_add(l1_index * 8)?;
        self.image.reader.read(&mut word, at).ok()?;
        let table = L1Entry::from_be_bytes(word).l2_table().get();
        let Some(l2_index) = l2_index else {
            return Some(table);
        };
        if table == 0 {
            return None;
        }
        let at = table.checked_add(l2_index * self.image.geometry.l2_entry_size())?;
        self.image.reader.read(&mut word, at).ok()?;
        let entry = L2Entry::from_bits(u64::from_be_bytes(word), 0);
        (!entry.is_compressed()).then_some(entry.word() & OFFSET_MASK)
    }
}
