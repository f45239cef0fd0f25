//! One pass over all refcounts, which raises or lowers them.

use qcow2_format::set_refcount;
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::overlay::Overlay;
use super::super::plan::Planner;
use super::table::Table;
use crate::blocks::{BlockRef, Blocks};
use crate::compare::{self, Comparison};
use crate::image::Image;
use crate::refmap::RefMap;
use crate::{Place, Run, Structure};

/// Whether a cluster in use has no refcount at all, among those before byte `end`: what is made by the repair itself lies behind, and has none
/// yet.
pub(super) fn lacks(image: &Image<'_>, map: &RefMap, table: &Table, end: u64) -> bool {
    let blocks = Blocks::from(table.blocks());
    let plan = compare::Plan::new(image, &blocks);
    let end = end.div_ceil(image.cluster_size());
    let mut comparison = Comparison::new(image, map, end, Lack(false));
    let mut buffer = Vec::new();
    for unit in 0..plan.units {
        comparison.unit(&plan, unit, &mut buffer);
        if comparison.judge.0 {
            return true;
        }
    }
    false
}

/// Whether there was a refcount of 0 where there are references.
struct Lack(bool);

impl compare::Judge for Lack {
    fn differ(&mut self, _first: u64, _count: u64, on_disk: u64, expected: u64) {
        self.0 |= on_disk == 0 && expected > 0;
    }

    fn behind(&mut self, _base: u64, _bits: u64, _value: impl Fn(u64) -> u64) {}

    fn overflow(&mut self, _cluster: u64, _weight: u64, _max: u64) {}

    fn unreadable(&mut self, _index: u64, _block: BlockRef, _start: u64, _stop: u64) {}
}

/// Which refcounts a pass changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Raise,
    Lower,
}

/// Refcounts on their way to what they should be.
pub(super) struct Pass<'p, 'i> {
    pub(super) overlay: &'p Overlay<'p>,
    pub(super) image: &'p Image<'i>,
    pub(super) map: &'p RefMap,
    pub(super) blocks: &'p Blocks,
    /// If set, clusters without references stay allocated but for these.
    pub(super) keep: Option<&'p RefMap>,
}

impl Pass<'_, '_> {
    pub(super) fn run(
        &self,
        layer: usize,
        direction: Direction,
        run: &Run<'_>,
    ) -> Result<Changed, PlanError> {
        let plan = compare::Plan::new(self.image, self.blocks);
        let setter = Setter {
            pass: self,
            layer,
            direction,
            block: None,
            changed: Changed::default(),
            failure: None,
        };
        let end = self.map.end().max(self.image.file_clusters());
        let mut comparison = Comparison::new(self.image, self.map, end, setter);
        let mut buffer = Vec::new();
        for unit in 0..plan.units {
            if run.is_cancelled() {
                return Err(PlanError::Cancelled);
            }
            comparison.unit(&plan, unit, &mut buffer);
        }
        comparison.judge.put();
        match comparison.judge.failure {
            Some(error) => Err(PlanError::Storage(error)),
            None => Ok(comparison.judge.changed),
        }
    }
}

/// What a pass has changed.
#[derive(Debug, Default)]
pub(super) struct Changed {
    clusters: u64,
    /// Host range of the clusters.
    first: Option<u64>,
    last: u64,
    /// Blocks written, as far as they are told.
    blocks: Vec<u64>,
    cluster_size: u64,
}

impl Changed {
    pub(super) fn tell(self, planner: &mut Planner<'_, '_>, kind: ActionKind) {
        let Some(first) = self.first else { return };
        let size = self.cluster_size;
        let place = Place::of(Structure::Cluster)
            .at(first * size, (self.last - first + 1).saturating_mul(size));
        let reason = if kind == ActionKind::LowerRefcounts {
            "refcounts are higher than the references"
        } else {
            "refcounts are lower than the references"
        };
        let mut action = Action::new(kind, place, reason).times(self.clusters);
        for block in self.blocks {
            action = action.changes(block, size);
        }
        planner.add(action.effect(Effect::None));
    }
}

/// Blocks that an action names.
const BLOCKS_TOLD: usize = 1000;

/// Sets refcounts, block by block.
struct Setter<'p, 'q, 'i> {
    pass: &'q Pass<'p, 'i>,
    layer: usize,
    direction: Direction,
    /// Offset, index and content of the block at hand.
    block: Option<(u64, u64, Vec<u8>)>,
    changed: Changed,
    failure: Option<qcow2_io::StorageError>,
}

impl Setter<'_, '_, '_> {
    /// Hands the block at hand over.
    fn put(&mut self) {
        let Some((offset, _, bytes)) = self.block.take() else {
            return;
        };
        if self.changed.blocks.len() < BLOCKS_TOLD {
            self.changed.blocks.push(offset);
        }
        if let Err(error) = self.pass.overlay.write(self.layer, offset, &bytes) {
            self.failure.get_or_insert(error);
        }
    }

    fn set(&mut self, first: u64, count: u64, value: u64) {
        let geometry = self.pass.image.geometry;
        let per_block = geometry.refcounts_per_block();
        for cluster in first..first.saturating_add(count) {
            let index = cluster / per_block;
            if self
                .block
                .as_ref()
                .is_none_or(|(_, known, _)| *known != index)
            {
                self.put();
                let BlockRef::At(offset) = self.pass.blocks.get(index) else {
                    continue;
                };
                let mut bytes = vec![0; geometry.cluster_len()];
                if let Err(error) = self.pass.overlay.read_at(&mut bytes, offset) {
                    self.failure.get_or_insert(error);
                }
                self.block = Some((offset, index, bytes));
            }
            if let Some((_, _, bytes)) = &mut self.block {
                let at = usize::try_from(cluster % per_block).unwrap_or(usize::MAX);
                if set_refcount(bytes, geometry, at, value).is_some() {
                    self.changed.clusters += 1;
                    self.changed.cluster_size = geometry.cluster_size();
                    let known = self.changed.first.get_or_insert(cluster);
                    *known = cluster.min(*known);
                    self.changed.last = self.changed.last.max(cluster);
                }
            }
        }
    }

    /// Whether a cluster without references is to stay allocated.
    fn is_kept(&self, cluster: u64) -> bool {
        let keep = self.pass.keep;
        keep.is_some_and(|released| !released.is_seen(cluster))
    }
}

impl compare::Judge for Setter<'_, '_, '_> {
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        let wanted = match self.direction {
            Direction::Raise => on_disk < expected,
            Direction::Lower => on_disk > expected,
        };
        if !wanted {
            return;
        }
        if expected > 0 || self.pass.keep.is_none() {
            self.set(first, count, expected);
            return;
        }
        for cluster in first..first.saturating_add(count) {
            if !self.is_kept(cluster) {
                self.set(cluster, 1, 0);
            }
        }
    }

    fn behind(&mut self, base: u64, bits: u64, _value: impl Fn(u64) -> u64) {
        if self.direction == Direction::Lower {
            for cluster in (base..).take(64).filter(|c| bits >> (c % 64) & 1 != 0) {
                self.set(cluster, 1, 0);
            }
        }
    }

    fn overflow(&mut self, _cluster: u64, _weight: u64, _max: u64) {
        // The refcount is set to the most there can be; the check of the outcome tells.
    }

    fn unreadable(&mut self, _index: u64, _block: BlockRef, _start: u64, _stop: u64) {
        // Where it matters such blocks were replaced.
    }
}
