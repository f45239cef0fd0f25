//! Images that were not closed. With lazy refcounts, those on disk are then out of date, and with them the COPIED flags.

use std::ops::ControlFlow;

use qcow2_check::{CopiedDifference, Options, RecountError, Structure, recount};
use qcow2_format::{HostOffset, L1Entry};

use crate::{Image, ImageError};

/// Bit 63 of L1 and L2 entries.
const COPIED: u64 = 1 << 63;

impl Image {
    /// Counts all references, puts refcounts and COPIED flags right and clears the dirty bit. Until that is cleared, last of
    /// all, the image is as good or bad as before. Of the autoclear bits it leaves those in `keep`.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unrecoverable`] if anything else is wrong with the image, before the first write.
    pub(crate) fn recover(&self, keep: u64) -> Result<(), ImageError> {
        self.recount_references(|| Ok(self.meta.clear_autoclear(keep)?))
            .map(drop)
    }

    /// As [`recover`](Self::recover); `before` comes before the first write. Tells whether compressed data claims clusters that
    /// hold other data.
    pub(crate) fn recount_references(
        &self,
        before: impl FnOnce() -> Result<(), ImageError>,
    ) -> Result<bool, ImageError> {
        let storage = self.meta.storage();
        let alloc = self.alloc()?;
        let references =
            recount(storage, &Options::default()).map_err(|error| unrecoverable(&error))?;
        if let Some((code, _)) = references.totals().first() {
            let count: u64 = references.totals().iter().map(|(_, count)| count).sum();
            let first = references.problems().first();
            let first = first.map_or_else(|| code.to_string(), ToString::to_string);
            return Err(ImageError::Unrecoverable {
                detail: format!("{first} ({count} problems in all)"),
            });
        }
        if !references.is_complete() {
            return Err(ImageError::Unrecoverable {
                detail: "not all references could be found".to_owned(),
            });
        }
        before()?;
        alloc.cover(references.end())?;
        let set = references
            .refcount_differences(|wrong| flow(alloc.set_refcount(wrong.cluster, wrong.expected)))
            .map_err(|error| unrecoverable(&error))?;
        if let ControlFlow::Break(error) = set {
            return Err(error.into());
        }
        let set = references
            .copied_differences(|wrong| flow(self.set_copied(&wrong)))
            .map_err(|error| unrecoverable(&error))?;
        if let ControlFlow::Break(error) = set {
            return Err(error);
        }
        let mixed = references.has_compressed_on_data();
        self.meta.settle(alloc)?;
        Ok(mixed)
    }

    fn set_copied(&self, wrong: &CopiedDifference) -> Result<(), ImageError> {
        let flagged = |bits: u64| {
            if wrong.should_be_set {
                bits | COPIED
            } else {
                bits & !COPIED
            }
        };
        if wrong.structure == Structure::ActiveL1 {
            let entry = L1Entry::from_bits(flagged(self.l1.get(wrong.index).bits()));
            self.l1.set(wrong.index, entry);
            self.meta.change_l1(wrong.index, entry.bits());
            return Ok(());
        }
        let cache = self.meta.l2();
        let in_slice = wrong.entry.get() & (cache.slice_bytes() as u64 - 1);
        let index = usize::try_from(in_slice / 8).unwrap_or(usize::MAX);
        let at = HostOffset::new(wrong.entry.get());
        loop {
            let done = cache.update(at, |slice| slice.set(index, flagged(slice.get(index))));
            if done.is_some() {
                return Ok(());
            }
            self.load_slice(at)?;
        }
    }
}

fn flow<E>(result: Result<(), E>) -> ControlFlow<E> {
    match result {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => ControlFlow::Break(error),
    }
}

fn unrecoverable(error: &RecountError) -> ImageError {
    ImageError::Unrecoverable {
        detail: error.to_string(),
    }
}
