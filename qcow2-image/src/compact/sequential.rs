//! Everything in the order of the disk.

use super::apply::Moves;
use super::extents::Extent;
use super::order::{Cursor, Plan};
use super::{End, Work};
use crate::ImageError;

impl Work<'_> {
    /// Gives the slots from the first one on, one slice after the other, what they should hold.
    pub(super) fn put_in_order(&mut self) -> Result<End, ImageError> {
        let image = self.image;
        let mut at = Some(Cursor::default());
        let mut first = 1;
        while let Some(cursor) = at {
            if self.is_cancelled() {
                return Ok(End::Cancelled);
            }
            let _closed = image.gate.close();
            image.close_books()?;
            let trees = u64::from(image.meta.header().snapshot_count) + 1;
            let mut plan = Plan::new(image, first, self.slice, trees);
            at = plan.fill(cursor)?;
            self.carry_out(&plan)?;
            first = plan.end();
            self.progress(first, image.alloc()?.end()?);
        }
        Ok(End::Done)
    }

    /// Vacates the slots, then fills them.
    fn carry_out(&mut self, plan: &Plan<'_>) -> Result<(), ImageError> {
        let image = self.image;
        if plan.clusters.is_empty() && plan.extents.is_empty() {
            return Ok(());
        }
        let tables = image.all_tables()?;
        let mut map = image.occupancy()?;
        let slots = plan.first()..plan.end();
        let away = image.evacuation(&mut map, &tables, slots, plan.end(), |cluster| {
            plan.is_fresh(cluster)
        })?;
        let weights = if plan.extents.is_empty() {
            Vec::new()
        } else {
            image.gather_extents(&tables, |extent| plan.extents.contains_key(&extent.offset))?
        };
        self.moved_bytes += image.apply(&away)?;
        image.close_books()?;

        let mut home = Moves::default();
        for (cluster, slot) in &plan.clusters {
            let now = away.clusters.get(cluster).unwrap_or(cluster);
            home.clusters.insert(*now, *slot);
        }
        for counted in weights {
            let Some((planned, place)) = plan.extents.get(&counted.offset) else {
                continue;
            };
            let now = match away.extents.get(&counted.offset) {
                Some((_, place)) => *place,
                None => counted.offset,
            };
            let extent = Extent {
                offset: now,
                len: planned.len,
                weight: counted.weight,
            };
            home.extents.insert(now, (extent, *place));
        }
        self.moved_bytes += image.apply(&home)?;
        Ok(())
    }
}
