//! How long the file of an image is, before it exists.

use qcow2_format::header::Version;
use qcow2_format::{Geometry, geometry::MAX_REFCOUNT_TABLE_BYTES};

use super::layout::Layout;
use super::plan::Plan;
use super::{CreateError, CreateOptions, Preallocation};

/// What an image will need, as far as its options tell.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Footprint {
    layout: Layout,
    preallocation: Preallocation,
    /// Bytes of the disk, whole sectors.
    pub(crate) size: u64,
    pub(crate) is_version3: bool,
    pub(crate) has_backing: bool,
    /// Guest data lies in a file of its own.
    pub(crate) is_external: bool,
}

impl Footprint {
    /// That of an image with these options, which are tested as they are when it is created.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self, CreateError> {
        let plan = Plan::new(options)?;
        Ok(Self {
            layout: plan.layout,
            preallocation: plan.preallocation,
            size: plan.size,
            is_version3: options.version == Version::V3,
            has_backing: options.backing_file.is_some(),
            is_external: options.data_file.is_some(),
        })
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.layout.geometry()
    }

    /// Clusters of the LUKS area, in bytes.
    pub(crate) fn crypto_bytes(&self) -> u64 {
        let size = self.geometry().cluster_size();
        self.layout.crypto_len().next_multiple_of(size)
    }

    /// Whether space for all data is reserved, rather than only mapped.
    pub(crate) fn reserves_data(&self) -> bool {
        [Preallocation::Falloc, Preallocation::Full].contains(&self.preallocation)
    }

    /// Length of the file with so many L2 tables and data clusters of the disk; bytes.
    pub(crate) fn len_with(&self, tables: u64, data: u64) -> Result<u64, CreateError> {
        let is_laid_out = self.preallocation != Preallocation::Off;
        let data = if self.is_external { 0 } else { data };
        if is_laid_out || tables + data == 0 {
            return Ok(self.layout.file_len());
        }
        let geometry = self.geometry();
        let others = self.layout.clusters_beside_refcounts() + tables + data;
        let first = self.layout.refcount_table_clusters();
        let (table, blocks) = Layout::refcounts_for(geometry, others, first);
        if table > MAX_REFCOUNT_TABLE_BYTES / geometry.cluster_size() {
            return Err(CreateError::RefcountTableTooLarge {
                preallocation: self.preallocation,
                limit: MAX_REFCOUNT_TABLE_BYTES,
            });
        }
        Ok((others + table + blocks) << geometry.cluster_bits())
    }
}
