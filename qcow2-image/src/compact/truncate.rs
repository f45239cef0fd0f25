//! A file without holes: what lies at its end goes into them.

use std::collections::BTreeSet;
use std::ops::Range;

use super::apply::Moves;
use super::extents::Pack;
use super::occupancy::Occupancy;
use super::structures::Structure;
use super::{End, Work};
use crate::trees::Table;
use crate::{Image, ImageError};

impl Work<'_> {
    /// Moves what lies behind the number of clusters in use, and cuts the file.
    pub(super) fn truncate(&mut self) -> Result<End, ImageError> {
        let mut first_end = None;
        loop {
            let cancelled = self.is_cancelled();
            let _closed = self.image.gate.close();
            self.image.close_books()?;
            let more = !cancelled && self.truncate_slice(&mut first_end)?;
            if !more {
                self.image.cut_file()?;
                return Ok(if cancelled { End::Cancelled } else { End::Done });
            }
        }
    }

    /// Does a part of it; tells whether there may be more.
    fn truncate_slice(&mut self, first_end: &mut Option<u64>) -> Result<bool, ImageError> {
        let image = self.image;
        let alloc = image.alloc()?;
        if alloc.can_shrink()? {
            image.rework(|| Ok(alloc.shrink_tables()?))?;
            image.close_books()?;
        }
        let mut map = image.occupancy()?;
        let goal = map.used;
        let first_end = *first_end.get_or_insert(map.end);
        self.progress(
            first_end.saturating_sub(map.end),
            first_end.saturating_sub(goal),
        );
        if map.end <= goal {
            return Ok(false);
        }
        if self.move_structures(&mut map, goal)? {
            return Ok(true);
        }
        if self.move_bitmaps(&mut map, goal)? {
            return Ok(true);
        }
        let from = goal.max(map.end.saturating_sub(self.slice));
        let moves = image.fill_holes(&map, from, goal)?;
        self.moved_bytes += image.apply(&moves)?;
        Ok(!moves.is_empty())
    }

    /// Moves the structures that lie behind `goal`, at most as many as a slice has; tells whether there were any.
    fn move_structures(&mut self, map: &mut Occupancy, goal: u64) -> Result<bool, ImageError> {
        let image = self.image;
        let mut behind = image.structures()?;
        behind.retain(|it| it.end() > goal);
        // The longest first, as long as there is room in one piece.
        behind.sort_by_key(|it| (std::cmp::Reverse(it.count), it.first));
        let mut moved = 0;
        for it in &behind {
            let below = goal.min(it.first);
            let place = match map.free_run(1, below, it.count) {
                Some(place) => Some(place),
                None => self.make_room(map, it, below)?,
            };
            let Some(place) = place else { continue };
            image.move_structure(it, place)?;
            image.close_books()?;
            for cluster in place..place + it.count {
                map.take(cluster);
            }
            moved += it.count;
            self.moved_bytes += it.count << image.geometry.cluster_bits();
            if moved >= self.slice {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Vacates the stretch where a structure fits with the fewest moves; `None` if there is none.
    fn make_room(
        &mut self,
        map: &mut Occupancy,
        it: &Structure,
        below: u64,
    ) -> Result<Option<u64>, ImageError> {
        let image = self.image;
        let Some(room) = image.best_room(map, it.count, below) else {
            return Ok(None);
        };
        let start = room.start;
        let tables = image.all_tables()?;
        let moves = image.evacuation(map, &tables, room, 1, |_| true)?;
        self.moved_bytes += image.apply(&moves)?;
        image.close_books()?;
        Ok(Some(start))
    }
}

impl Image {
    /// The moves that take what lies from `from` on to holes below `goal`, as far as they go.
    fn fill_holes(&self, map: &Occupancy, from: u64, goal: u64) -> Result<Moves, ImageError> {
        let bits = self.geometry.cluster_bits();
        let tables = self.all_tables()?;
        let packed = self.gather_extents(&tables, |extent| extent.clusters(bits).end > from)?;
        let theirs: BTreeSet<u64> = packed
            .iter()
            .flat_map(|extent| extent.clusters(bits))
            .collect();
        let mut moves = Moves::default();
        let mut hole = map.next_free(1);
        for cluster in map.used_in(from..map.end) {
            if hole >= goal {
                return Ok(moves);
            }
            if self.is_structure(cluster) || theirs.contains(&cluster) {
                continue;
            }
            moves.clusters.insert(cluster, hole);
            hole = map.next_free(hole + 1);
        }
        let mut pack = Pack::new(bits, self.geometry.refcount_max());
        for extent in packed {
            let place = loop {
                if let Some(place) = pack.place(extent) {
                    break place;
                }
                if hole >= goal {
                    return Ok(moves);
                }
                let mut run = hole..hole + 1;
                while run.end < goal && !map.is_used(run.end) {
                    run.end += 1;
                }
                hole = map.next_free(run.end);
                pack.enter(run);
            };
            moves.extents.insert(extent.offset, (extent, place));
        }
        Ok(moves)
    }

    /// The stretch of `count` clusters below `below` that has no structure and the fewest clusters in use.
    fn best_room(&self, map: &Occupancy, count: u64, below: u64) -> Option<Range<u64>> {
        let mut best: Option<(u64, u64)> = None;
        let (mut used, mut start) = (0, 1);
        for end in 1..below {
            if self.is_structure(end) {
                (used, start) = (0, end + 1);
                continue;
            }
            used += u64::from(map.is_used(end));
            if end + 1 - start > count {
                used -= u64::from(map.is_used(start));
                start += 1;
            }
            if end + 1 - start == count && best.is_none_or(|(least, _)| used < least) {
                best = Some((used, start));
            }
        }
        best.map(|(_, start)| start..start + count)
    }

    /// The moves that vacate those clusters of a range that `leave` names, which are no structures. They go to free clusters from `from` on and
    /// outside the range; those are taken in the map.
    pub(super) fn evacuation(
        &self,
        map: &mut Occupancy,
        tables: &[Table],
        range: Range<u64>,
        from: u64,
        leave: impl Fn(u64) -> bool,
    ) -> Result<Moves, ImageError> {
        let bits = self.geometry.cluster_bits();
        let leaves = |cluster| range.contains(&cluster) && leave(cluster);
        let packed = self.gather_extents(tables, |extent| extent.clusters(bits).any(leaves))?;
        let theirs: BTreeSet<u64> = packed
            .iter()
            .flat_map(|extent| extent.clusters(bits))
            .collect();
        let mut moves = Moves::default();
        let mut free = from;
        let next = |map: &Occupancy, from: u64| {
            let free = map.next_free(from);
            if range.contains(&free) {
                map.next_free(range.end)
            } else {
                free
            }
        };
        let leaving: Vec<u64> = map
            .used_in(range.clone())
            .filter(|cluster| leave(*cluster) && !theirs.contains(cluster))
            .collect();
        for cluster in leaving {
            free = next(map, free);
            moves.clusters.insert(cluster, free);
            map.take(free);
            free += 1;
        }
        let mut pack = Pack::new(bits, self.geometry.refcount_max());
        for extent in packed {
            let place = loop {
                if let Some(place) = pack.place(extent) {
                    break place;
                }
                let run = pack.run();
                free = next(map, free);
                map.take(free);
                if !run.is_empty() && run.end == free {
                    pack.extend();
                } else {
                    pack.enter(free..free + 1);
                }
            };
            moves.extents.insert(extent.offset, (extent, place));
        }
        Ok(moves)
    }
}
