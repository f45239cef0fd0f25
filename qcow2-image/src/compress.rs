//! Writing compressed clusters.

use std::io::IoSlice;

use qcow2_alloc::Reason;
use qcow2_cache::sync::atomic::Ordering;
use qcow2_format::header::CompressionType;
use qcow2_format::{GuestOffset, L2Entry};
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Storage as _, StorageErrorKind};

use crate::buffer::Buffer;
use crate::{Image, ImageError};

/// Clusters that are compressed before the first of them is stored.
const GROUP: usize = 64;

/// A cluster on its way to the disk.
pub(crate) struct Packed {
    /// Room for a cluster, and how much of it the stream has; none where compressing does not pay.
    stream: Option<(Buffer, usize)>,
}

impl Packed {
    /// Whether compressing has made it smaller.
    pub(crate) fn pays(&self) -> bool {
        self.stream.is_some()
    }

    fn stream(&self) -> Option<&[u8]> {
        let (buffer, len) = self.stream.as_ref()?;
        buffer.get(..*len)
    }
}

impl Image {
    /// The codec of its compressed clusters.
    pub fn codec(&self) -> Codec {
        match self.compression {
            CompressionType::Zlib => Codec::Zlib,
            CompressionType::Zstd => Codec::Zstd,
        }
    }

    /// Writes whole clusters, compressed.
    ///
    /// A cluster for which that saves nothing is stored as it is. Clusters that had data before get the new one; their old
    /// space becomes free. The clusters are compressed by all threads of rayon's pool if this build has the feature
    /// `parallel`; several threads may also call this at once.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] for images whose data lies in an external file or is encrypted: compressed clusters can't be
    /// there, or would be in clear text. [`ImageError::Unaligned`] unless `offset` and length are whole clusters or the end
    /// of the disk. [`ImageError::Compress`] for a level that the codec doesn't have or a codec that this build doesn't. What the
    /// storage reports; some of the clusters may be written then.
    ///
    /// # Durability
    ///
    /// That of any write: a [flush](qcow2_io::Storage::flush) makes it durable.
    pub fn write_compressed(
        &self,
        bytes: &[u8],
        offset: u64,
        level: Level,
    ) -> Result<(), ImageError> {
        self.check_compressible(offset, bytes.len() as u64)?;
        let cluster_len = self.geometry.cluster_len();
        for (group, at) in bytes
            .chunks(cluster_len.saturating_mul(GROUP))
            .zip((offset..).step_by(cluster_len.saturating_mul(GROUP)))
        {
            let packed = self.compress_group(group, at, level)?;
            let clusters = group.chunks(cluster_len);
            for ((packed, cluster), guest) in
                packed.iter().zip(clusters).zip((at..).step_by(cluster_len))
            {
                self.store_packed(packed, cluster, guest)?;
            }
        }
        Ok(())
    }

    /// Tests whether a range can be written compressed.
    pub(crate) fn check_compressible(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        let end = self.check_range(offset, len)?;
        if self.rules.external_data {
            return Err(ImageError::Unsupported {
                what: "an external data file can't hold compressed clusters",
            });
        }
        if self.is_encrypted() {
            return Err(ImageError::Unsupported {
                what: "compressed clusters are not encrypted, so an encrypted image takes none",
            });
        }
        let whole = self.in_cluster(end) == 0 || end == self.virtual_size();
        if self.in_cluster(offset) != 0 || !whole {
            return Err(ImageError::Unaligned {
                offset: GuestOffset::new(offset),
                len,
                unit: self.cluster_size(),
            });
        }
        Ok(())
    }

    #[cfg(feature = "parallel")]
    fn compress_group(
        &self,
        group: &[u8],
        at: u64,
        level: Level,
    ) -> Result<Vec<Packed>, ImageError> {
        use rayon::prelude::*;

        let len = self.geometry.cluster_len();
        group
            .par_chunks(len)
            .enumerate()
            .map(|(number, cluster)| self.pack(cluster, at + (number * len) as u64, level))
            .collect()
    }

    #[cfg(not(feature = "parallel"))]
    fn compress_group(
        &self,
        group: &[u8],
        at: u64,
        level: Level,
    ) -> Result<Vec<Packed>, ImageError> {
        let len = self.geometry.cluster_len();
        group
            .chunks(len)
            .zip((at..).step_by(len))
            .map(|(cluster, guest)| self.pack(cluster, guest, level))
            .collect()
    }

    /// Compresses a cluster; the last of a disk may be shorter.
    pub(crate) fn pack(
        &self,
        cluster: &[u8],
        guest: u64,
        level: Level,
    ) -> Result<Packed, ImageError> {
        let size = self.cluster_size();
        let mut out = Buffer::unfilled(size);
        let compress = |cluster: &[u8], out: &mut [u8]| {
            self.codec()
                .compress(level, cluster, out)
                .map_err(|source| ImageError::Compress {
                    guest: GuestOffset::new(guest),
                    source,
                })
        };
        let len = if cluster.len() as u64 == size {
            compress(cluster, &mut out)?
        } else {
            // Readers expect a whole cluster.
            let mut whole = Buffer::unfilled(size);
            let (head, tail) = whole
                .split_at_mut_checked(cluster.len())
                .unwrap_or_default();
            head.copy_from_slice(cluster);
            tail.fill(0);
            compress(&whole, &mut out)?
        };
        Ok(Packed {
            stream: len.map(|len| (out, len)),
        })
    }

    /// Stores a cluster that was compressed; `cluster` is what it was made from.
    pub(crate) fn store_packed(
        &self,
        packed: &Packed,
        cluster: &[u8],
        guest: u64,
    ) -> Result<(), ImageError> {
        let Some(stream) = packed.stream() else {
            return self.write(&[IoSlice::new(cluster)], guest, cluster.len() as u64);
        };
        self.write_stream(stream, guest)
    }

    /// Stores a stream, shorter than a cluster, that gives all of the cluster at `guest`.
    pub(crate) fn write_stream(&self, stream: &[u8], guest: u64) -> Result<(), ImageError> {
        self.get_ready()?;
        {
            let _pass = self.gate.enter();
            self.check_range(guest, 1)?;
            self.meta.check_writable()?;
            let len = self.cluster_size().min(self.virtual_size() - guest);
            self.record(guest, len)?;
            let number = guest >> self.geometry.cluster_bits();
            let _held = self.stripes.lock(number, number);
            self.store_stream(stream, guest)?;
        }
        self.tidy()
    }

    /// Stores a stream as the content of the cluster at `guest`, whose stripe the caller holds.
    fn store_stream(&self, stream: &[u8], guest: u64) -> Result<(), ImageError> {
        self.prepare_table(guest)?;
        let len = stream.len() as u64;
        let space = self.find_space(len)?;
        let entry = L2Entry::compressed(self.geometry, space.offset, len).ok_or_else(|| {
            ImageError::Refused {
                what: "compressed data",
                offset: space.offset,
                detail: "no L2 entry can point so far".to_owned(),
            }
        })?;
        self.meta.check_data(space.offset, len)?;
        self.meta.storage().write_at(stream, space.offset.get())?;
        self.ends_in_sector.store(true, Ordering::Relaxed);
        self.change(guest, 1, Reason::Replaced, |_, _| Some(entry))
            .map_err(|(_, error)| error)?;
        space.keep();
        Ok(())
    }

    /// Clusters of the file that are or were in use.
    pub(crate) fn file_clusters(&self) -> u64 {
        self.alloc
            .as_ref()
            .map_or(0, qcow2_alloc::Allocator::file_clusters)
    }

    /// Lengthens the file to whole clusters. What was not written of the last one reads as zeros anyway; but which one that is, when
    /// several threads write, is chance, and the file's length should not be.
    pub(crate) fn fill_last_cluster(&self) -> Result<(), ImageError> {
        let _closed = self.gate.close();
        let end = self.file_clusters() << self.geometry.cluster_bits();
        let storage = self.meta.storage();
        if storage.len()? < end {
            match storage.set_len(end) {
                Err(error) if error.kind() == StorageErrorKind::Unsupported => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Lengthens a file that ends within a sector, as compressed data does: what reads it may want whole ones.
    pub(crate) fn fill_last_sector(&self) -> Result<(), ImageError> {
        if !self.ends_in_sector.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let storage = self.meta.storage();
        let len = storage.len()?;
        if !len.is_multiple_of(512) {
            storage.set_len(len.next_multiple_of(512))?;
        }
        Ok(())
    }
}
