//! Reading compressed clusters.

use std::sync::Arc;

use qcow2_cache::sync::{Mutex, lock};
use qcow2_format::{CompressedExtent, GuestOffset};
use qcow2_io::Storage as _;

use crate::buffer::Buffer;
use crate::{Image, ImageError};

/// Clusters that are kept unpacked: a few, for readers who go through one in small steps.
const KEPT: usize = 4;

/// The clusters unpacked last.
pub(crate) struct Unpacked {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts how often clusters were given to others, after which a place may hold something else.
    generation: u64,
    /// The most recent last.
    clusters: Vec<(CompressedExtent, Arc<Buffer>)>,
}

impl Unpacked {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::default(),
        }
    }

    /// Released clusters are about to be used again: nothing that is kept counts any more.
    pub(crate) fn forget(&self) {
        let mut state = lock(&self.state);
        state.generation += 1;
        state.clusters.clear();
    }

    fn get(&self, extent: CompressedExtent) -> (u64, Option<Arc<Buffer>>) {
        let mut state = lock(&self.state);
        let found = state.clusters.iter().position(|(at, _)| *at == extent);
        let cluster = found.map(|index| {
            let entry = state.clusters.remove(index);
            let bytes = Arc::clone(&entry.1);
            state.clusters.push(entry);
            bytes
        });
        (state.generation, cluster)
    }

    fn put(&self, generation: u64, extent: CompressedExtent, bytes: Arc<Buffer>) {
        let mut state = lock(&self.state);
        if state.generation != generation {
            return;
        }
        if state.clusters.len() >= KEPT {
            state.clusters.remove(0);
        }
        state.clusters.push((extent, bytes));
    }
}

impl Image {
    /// The content of the compressed cluster that holds `guest`.
    pub(crate) fn unpack(
        &self,
        guest: u64,
        extent: CompressedExtent,
    ) -> Result<Arc<Buffer>, ImageError> {
        let (generation, kept) = self.unpacked.get(extent);
        if let Some(bytes) = kept {
            return Ok(bytes);
        }
        let mut cluster = Buffer::unfilled(self.cluster_size());
        self.unpack_to(&mut cluster, guest, extent)?;
        let bytes = Arc::new(cluster);
        self.unpacked.put(generation, extent, Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Fills `cluster` with the content of the whole compressed cluster that holds `guest`.
    pub(crate) fn unpack_to(
        &self,
        cluster: &mut [u8],
        guest: u64,
        extent: CompressedExtent,
    ) -> Result<(), ImageError> {
        // At most two clusters, by the width of the field.
        let mut input = Buffer::unfilled(extent.len_bytes);
        self.meta
            .storage()
            .read_at(&mut input, extent.offset.get())?;
        self.codec()
            .decompress(&input, cluster)
            .map_err(|source| ImageError::Compressed {
                guest: GuestOffset::new(guest - self.in_cluster(guest)),
                source,
            })
    }
}
