//! In how many stretches of the file the disk lies.

use qcow2_format::ClusterKind;
use qcow2_format::l2::L2Table;
use qcow2_io::Storage as _;

use crate::{Image, ImageError};

impl Image {
    /// Goes through the active tree in the order of the disk. The gate is closed, and everything in the file.
    pub(super) fn fragments(&self) -> Result<u64, ImageError> {
        if self.rules.external_data {
            return Ok(0);
        }
        let size = self.cluster_size();
        let mut bytes = vec![0; self.geometry.cluster_len()];
        let mut fragments = 0;
        let mut next = None;
        for number in 0..self.l1.len() {
            let table = self.l1.get(number).l2_table();
            if table.get() == 0 {
                continue;
            }
            self.meta.storage().read_at(&mut bytes, table.get())?;
            let table = L2Table::new(&bytes, self.geometry);
            let mut at = 0;
            while at < table.len() {
                let empty = table.empty_run(at);
                if empty > 0 {
                    at += empty;
                    continue;
                }
                let entry = table.get(at).unwrap_or_default();
                let run = table.sequential_run(at, size).max(1);
                at += run;
                let (start, end) = match entry.kind(self.rules) {
                    ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => {
                        (offset.get(), offset.get() + run as u64 * size)
                    }
                    ClusterKind::Compressed(extent) => {
                        let start = extent.offset.get();
                        // The last sector may hold the next stream, too.
                        if next.is_some_and(|next| (next..next + size).contains(&(start + 511))) {
                            next = Some(start);
                        }
                        (start, start + extent.len_bytes)
                    }
                    ClusterKind::Unallocated | ClusterKind::ZeroPlain => continue,
                };
                if next != Some(start) {
                    fragments += 1;
                }
                next = Some(end);
            }
        }
        Ok(fragments)
    }
}
