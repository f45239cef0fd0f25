//! Dropping all that the image has, once it has gone into the backing file.

use qcow2_alloc::Reason;
use qcow2_io::Storage as _;

use crate::{Image, ImageError};

impl Image {
    /// Makes the whole disk as if it had never been written, so that the backing file shows. Snapshots stay; what only the active
    /// state had is free. Requests wait meanwhile.
    ///
    /// The tables are dropped in place: any part of them may be gone after a crash, which is as good as any other for who knows
    /// that the backing file has the same content.
    ///
    /// # Errors
    ///
    /// What the storage reports; the disk has all, some or none of its clusters then.
    ///
    /// # Durability
    ///
    /// Durable on return.
    pub(super) fn empty(&self) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        self.get_ready()?;
        let _closed = self.gate.close();
        if self
            .active_l1()
            .iter()
            .all(|entry| entry.l2_table().get() == 0)
        {
            return Ok(());
        }
        self.settle_closed()?;
        if self.rules.external_data {
            self.drop_behind(0)?;
            if self.alloc()?.passes(Reason::Snapshot) {
                // The host keeps the space if this fails.
                let data = self.meta.data();
                let _ = data.discard(0..data.len()?);
            }
        } else {
            self.drop_tables(0)?;
        }
        self.cut_file()
    }
}
