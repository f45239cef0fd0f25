//! Reading compressed clusters.

use std::sync::Arc;

use qcow2_cache::sync::{Mutex, lock};
use qcow2_format::header::CompressionType;
use qcow2_format::{CompressedExtent, GuestOffset};
use qcow2_io::Storage as _;
use qcow2_io::codec::Codec;

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
    clusters: Vec<(CompressedExtent, Arc<[u8]>)>,
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

    fn get(&self, extent: CompressedExtent) -> (u64, Option<Arc<[u8]>>) {
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

    fn put(&self, generation: u64, extent: CompressedExtent, bytes: Arc<[u8]>) {
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
    ) -> Result<Arc<[u8]>, ImageError> {
        let (generation, kept) = self.unpacked.get(extent);
        if let Some(bytes) = kept {
            return Ok(bytes);
        }
        // At most two clusters, by the width of the field.
        let mut input = vec![0; usize::try_from(extent.len_bytes).unwrap_or(0)];
        self.meta
            .storage()
            .read_at(&mut input, extent.offset.get())?;
        let mut cluster = vec![0; self.geometry.cluster_len()];
        let codec = match self.compression {
            CompressionType::Zlib => Codec::Zlib,
            CompressionType::Zstd => Codec::Zstd,
        };
        codec
            .decompress(&input, &mut cluster)
            .map_err(|source| ImageError::Compressed {
                guest: GuestOffset::new(guest - self.in_cluster(guest)),
                source,
            })?;
        let bytes: Arc<[u8]> = cluster.into();
        self.unpacked.put(generation, extent, Arc::clone(&bytes));
        Ok(bytes)
    }
}
