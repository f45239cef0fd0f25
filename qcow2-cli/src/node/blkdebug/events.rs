//! What scripts call the steps of an image's work, and its requests.

use std::sync::{PoisonError, Weak};

use qcow2_image::{Kinds, Step};
use qcow2_io::{Operation, Result, StorageError};

use super::Blkdebug;
use crate::Console;
use crate::words::system;

impl Blkdebug {
    /// Lets a step happen, or fail.
    pub(super) fn step(&self, step: Step) -> Result<()> {
        let Some(event) = name(step) else {
            return Ok(());
        };
        self.stop_at(event);
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(errno) = rules.step(event) else {
            return Ok(());
        };
        if step == Step::Free {
            Console::warn(format_args!(
                "qcow2_free_clusters failed: {}\n",
                system::text(errno)
            ));
        }
        Err(StorageError::from_io(Operation::Write, errno))
    }

    /// What a read is, by what lies there.
    pub(super) fn reading(&self, offset: u64) -> &'static str {
        let events = [
            (Kinds::ACTIVE_L2, "l2_load"),
            (Kinds::ACTIVE_L1, "l1_load"),
            (Kinds::REFCOUNT_BLOCK, "refblock_load"),
            (Kinds::REFCOUNT_TABLE, "reftable_load"),
        ];
        self.at(offset, &events).unwrap_or("read_aio")
    }

    /// What a write is. Those of tables are no events: their changes were.
    pub(super) fn writing(&self, offset: u64) -> &'static str {
        if self
            .image
            .get()
            .is_some_and(|image| image.strong_count() == 0)
        {
            // It is being closed, and nobody can tell any more what lies where; but data it has none left.
            return "none";
        }
        let tables = [
            (Kinds::ACTIVE_L2 | Kinds::ACTIVE_L1, "none"),
            (Kinds::REFCOUNT_BLOCK | Kinds::MAIN_HEADER, "none"),
            (Kinds::REFCOUNT_TABLE, "reftable_update"),
        ];
        self.at(offset, &tables).unwrap_or("write_aio")
    }

    fn at(&self, offset: u64, events: &[(Kinds, &'static str)]) -> Option<&'static str> {
        let image = self.image.get().and_then(Weak::upgrade)?;
        let kinds = image.kinds_at(offset);
        let mut events = events.iter();
        events
            .find(|(kind, _)| kinds.intersects(*kind))
            .map(|(_, event)| *event)
    }
}

fn name(step: Step) -> Option<&'static str> {
    Some(match step {
        Step::Allocate => "cluster_alloc",
        Step::AllocateCompressed => "cluster_alloc_bytes",
        Step::ChangeRefcount => "refblock_update_part",
        Step::Free => "cluster_free",
        Step::FindBlock => "refblock_alloc",
        Step::WriteBlock => "refblock_alloc_write",
        Step::LinkBlock => "refblock_alloc_hookup",
        Step::WriteTableBlocks => "refblock_alloc_write_blocks",
        Step::WriteTable => "refblock_alloc_write_table",
        Step::SwitchTable => "refblock_alloc_switch_table",
        Step::WriteL2 => "l2_alloc_write",
        Step::ChangeL2 => "l2_update",
        Step::ChangeL1 => "l1_update",
        Step::AllocateL1 => "l1_grow_alloc_table",
        Step::WriteL1 => "l1_grow_write_table",
        Step::SwitchL1 => "l1_grow_activate_table",
        Step::ReadCow => "cow_read",
        Step::WriteCow => "cow_write",
        _ => return None,
    })
}
