//! COPIED flags.

use qcow2_io::Storage;

use super::super::overlay::Overlay;
use crate::copied::{self, Flags, WrongFlag};
use crate::image::Image;
use crate::refmap::RefMap;
use crate::walk::{L1Scan, Window};

/// Corrects COPIED flags. Tells how many.
pub(super) fn mend_flags(
    overlay: &Overlay<'_>,
    layer: usize,
    image: &Image<'_>,
    map: &RefMap,
    scan: &L1Scan,
) -> u64 {
    let judge = FlagSetter {
        overlay,
        layer,
        image,
        map,
        count: 0,
    };
    let plan = Window::plan(image);
    let mut flags = Flags::new(image, judge);
    for unit in 0..copied::units(scan) {
        flags.unit(&plan, scan, unit);
    }
    flags.judge.count
}

struct FlagSetter<'p, 'i> {
    overlay: &'p Overlay<'p>,
    layer: usize,
    image: &'p Image<'i>,
    map: &'p RefMap,
    count: u64,
}

impl copied::Judge for FlagSetter<'_, '_> {
    fn is_one(&self, cluster: u64) -> Option<bool> {
        Some(self.map.weight(cluster) == 1)
    }

    fn wrong(&mut self, flag: WrongFlag<'_>) {
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
                self.count += 1;
            }
        }
    }
}
