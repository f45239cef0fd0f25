//! Changing the options of an image that is there.
//!
//! All options are judged before the first write. Then they are changed in this order, each step whole or not at all:
//!
//! 1. key slots;
//! 2. for an upgrade, the snapshot table gets the sizes that version 3 wants in it;
//! 3. all that stands in the header: upgrade, names, switches;
//! 4. the width of refcounts: new structures beside the old ones, then one write to the header;
//! 5. the size;
//! 6. a downgrade: zero clusters become what version 2 can say, then one write to the header.
//!
//! A step that fails leaves those before it done, and says so by its error; what the options alone can be refused for fails
//! before.

mod downgrade;
mod error;
mod header;
#[cfg(feature = "encryption")]
mod keys;
mod options;
mod plan;
mod refcounts;

use std::sync::Arc;

use qcow2_alloc::Allocator;
use qcow2_cache::sync::atomic::Ordering;
use qcow2_format::header::Version;

use self::plan::Plan;
use crate::mapping::Shape;
use crate::{Image, ImageError, ResizeOptions};

pub use error::AmendError;
pub use options::AmendOptions;
#[cfg(feature = "encryption")]
pub use options::{KeyChange, KeySlot};

impl Image {
    /// Changes options of the image. It must be nobody else's meanwhile, since its geometry may change; what can be changed
    /// while a guest runs has methods of its own: [`resize`](Self::resize) and `key_slots`.
    ///
    /// What is set to what it is already is no change.
    ///
    /// # Errors
    ///
    /// [`AmendError::Refused`] and all errors about values come before the first write. Then what the storage reports: the step that
    /// failed is done or not, those before it are done, and the image is sound. If it could not be found out which, the image takes no
    /// more writes until it is opened again. [`AmendError::Cancelled`] leaves the image as if the step had never begun,
    /// except that a downgrade may have turned some clusters of zeros into data.
    ///
    /// # Durability
    ///
    /// On return all is durable. A crash leaves each step done or not.
    pub fn amend(&mut self, options: &AmendOptions<'_>) -> Result<(), AmendError> {
        self.meta.check_writable()?;
        self.flush_all()?;
        // They are taken up again when the image is next written to, or at the end if they are in use from opening on.
        self.close_bitmaps()?;
        let mut plan = Plan::new(self, options)?;
        #[cfg(feature = "encryption")]
        self.amend_keys(options)?;
        if plan.upgrade {
            self.complete_snapshots()?;
            // Their table has moved, perhaps.
            let now = self.header();
            plan.header.snapshot_table_offset = now.snapshot_table_offset;
            plan.header.snapshot_count = now.snapshot_count;
        }
        if plan.header != self.header() {
            self.close_bitmaps()?;
            self.close_books()?;
            let rewritten = self.meta.rewrite_header(|header| *header = plan.header);
            if let Err(error) = rewritten {
                // Old or new, who knows.
                self.meta.give_up();
                return Err(error.into());
            }
            self.renew()?;
        }
        if let Some(order) = plan.refcount_order {
            self.close_bitmaps()?;
            self.close_books()?;
            self.rebuild_refcounts(order, options.monitor)?;
            self.renew()?;
        }
        if let Some(size) = plan.size {
            let how = ResizeOptions {
                shrink: true,
                ..ResizeOptions::default()
            };
            self.resize(size, how)?;
        }
        if plan.downgrade {
            self.downgrade(options.monitor)?;
            self.renew()?;
        }
        self.occupy_bitmaps();
        Ok(())
    }

    /// Brings everything to the file, and the dirty bit down: what follows goes past the caches, or changes what they are made for.
    pub(crate) fn close_books(&self) -> Result<(), ImageError> {
        self.settle_closed()?;
        Ok(self.meta.settle(self.alloc()?)?)
    }

    /// Takes the header of the file for what the image is from now on.
    fn renew(&mut self) -> Result<(), ImageError> {
        let header = self.header();
        let (pass_discard, order) = (self.alloc()?.pass_discard(), self.alloc()?.order());
        let meta = Arc::new(self.meta.renewed(header.clone()));
        let alloc = match Allocator::open(Arc::clone(&meta), pass_discard) {
            Ok(alloc) => alloc.ordered(order),
            Err(error) => {
                self.meta.give_up();
                return Err(error.into());
            }
        };
        self.forget_places();
        self.geometry = header.geometry;
        self.rules = header.entry_rules();
        self.shape = Shape::new(self.rules, self.crypt.is_some());
        self.raw_data = header.autoclear.raw_external_data();
        self.compression = header.compression_type;
        if header.version == Version::V2 {
            self.discard_no_unref = false;
        }
        self.meta = meta;
        self.alloc = Some(alloc);
        self.ready.store(false, Ordering::Release);
        Ok(())
    }
}
