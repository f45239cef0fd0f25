//! How to compare.

use std::fmt;

use super::CompareError;
use crate::Monitor;
use crate::threads;

/// What one thread reads at a time, unless something else is asked for; bytes. Two such buffers fit a processor's own cache.
const CHUNK: u64 = 256 << 10;
const CHUNK_MAX: u64 = 64 << 20;

/// How to compare.
#[derive(Clone, Copy)]
#[must_use]
pub struct CompareOptions<'a> {
    threads: usize,
    chunk: u64,
    pub(super) strict: bool,
    pub(super) monitor: Option<&'a dyn Monitor>,
}

impl Default for CompareOptions<'_> {
    fn default() -> Self {
        Self {
            threads: 0,
            chunk: CHUNK,
            strict: false,
            monitor: None,
        }
    }
}

impl<'a> CompareOptions<'a> {
    /// The defaults: as many threads as there are processors, and only what a guest sees counts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads to work with, the caller's among them; 0, the default, means one for each processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Bytes that a thread reads at a time from each disk, 256 KiB by default; from 512 bytes to 64 MiB. Each thread has two
    /// buffers of this size.
    pub fn chunk(mut self, bytes: u64) -> Self {
        self.chunk = bytes;
        self
    }

    /// Whether lengths must be the same, and each place be stored in the same way. Told apart are: nothing allocated, zeros without
    /// a place in the file, zeros with one, data, compressed data, encrypted data, and data where an image that [maps](crate::map) much more
    /// than its file has space for has a hole. A hole of a raw disk is zeros with a place; what lies behind the end of a backing
    /// file is zeros without one. Which layer has it does not count.
    pub fn strict(mut self, on: bool) -> Self {
        self.strict = on;
        self
    }

    /// Who watches: the progress is in bytes of the longer disk.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    pub(super) fn thread_count(&self) -> usize {
        match self.threads {
            0 => threads::available(),
            threads => threads.min(threads::MAX),
        }
    }

    pub(super) fn chunk_bytes(&self) -> Result<u64, CompareError> {
        match self.chunk {
            512..=CHUNK_MAX => Ok(self.chunk),
            value => Err(CompareError::Chunk { value }),
        }
    }
}

impl fmt::Debug for CompareOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompareOptions")
            .field("threads", &self.threads)
            .field("chunk", &self.chunk)
            .field("strict", &self.strict)
            .finish_non_exhaustive()
    }
}
