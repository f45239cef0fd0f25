//! How to compact, and what came of it.

use std::fmt;

use crate::copy::Monitor;

/// Bytes that are moved while requests wait, unless something else is asked for.
const SLICE: u64 = 64 << 20;
/// Clusters that are moved at a time, at most: they are kept in memory.
pub(super) const SLICE_MAX: u64 = 1 << 20;

/// What is wanted of the places of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CompactMode {
    /// A file as small as it can get, with few moves: what is at its end goes into holes.
    #[default]
    Truncate,
    /// Everything in the order of the disk, and then the same.
    Sequential,
}

/// How to compact.
#[derive(Clone, Copy)]
#[must_use]
pub struct CompactOptions<'a> {
    pub(super) mode: CompactMode,
    slice: u64,
    pub(super) monitor: Option<&'a dyn Monitor>,
}

impl Default for CompactOptions<'_> {
    fn default() -> Self {
        Self {
            mode: CompactMode::default(),
            slice: SLICE,
            monitor: None,
        }
    }
}

impl<'a> CompactOptions<'a> {
    /// The file gets small, in slices of 64 MiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// What is wanted.
    pub fn mode(mut self, mode: CompactMode) -> Self {
        self.mode = mode;
        self
    }

    /// Bytes that are moved at a time, while requests wait; four times what L2 tables take if that is more, since all of those are
    /// read for each slice. By so much the file may grow in between.
    pub fn slice(mut self, bytes: u64) -> Self {
        self.slice = bytes;
        self
    }

    /// Who watches. Progress is told in bytes of the file; after a cancellation the image is sound and partly compacted.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    pub(super) fn slice_bytes(&self) -> u64 {
        self.slice
    }
}

impl fmt::Debug for CompactOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompactOptions")
            .field("mode", &self.mode)
            .field("slice", &self.slice)
            .finish_non_exhaustive()
    }
}

/// What compaction has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactReport {
    /// Whether it went through to its end, and was not cancelled.
    pub complete: bool,
    /// Bytes that were copied from one place to another; some more than once.
    pub moved_bytes: u64,
    /// Bytes of the file before.
    pub bytes_before: u64,
    /// Bytes of the file afterwards.
    pub bytes_after: u64,
    /// In how many stretches of the file the disk lay: each is read in one go.
    pub fragments_before: u64,
    /// In how many it lies now.
    pub fragments_after: u64,
}
