//! Who learns that an image is corrupt.

use std::fmt;
use std::sync::Arc;

use crate::MetadataError;

/// Is told when an image is found corrupt, the first time only: a machine's monitor may want to stop the guest then, or raise
/// an alarm, whoever's request it was that failed.
#[derive(Clone)]
pub struct Watcher(Arc<dyn Fn(&MetadataError) + Send + Sync>);

impl Watcher {
    /// Calls `told`, with what was found: [`MetadataError::Overlap`], [`MetadataError::InUse`], [`MetadataError::BadPointer`] or
    /// [`MetadataError::Corrupt`]. It must not use the image, which is in the middle of a request.
    pub fn new(told: impl Fn(&MetadataError) + Send + Sync + 'static) -> Self {
        Self(Arc::new(told))
    }

    pub(super) fn tell(&self, error: &MetadataError) {
        (self.0)(error);
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}
