//! Where compressed data goes: one cluster of the file holds that of several guest clusters.

use qcow2_alloc::{AllocError, Allocation, Reason};
use qcow2_cache::sync::{Mutex, lock};
use qcow2_cache::{Purpose, Step};
use qcow2_format::{HostCluster, HostOffset};

use crate::{Image, ImageError};

/// Where the next compressed data fits: behind the last, in the rest of its cluster. It is not on disk, so an image that is
/// opened again begins a new cluster.
#[derive(Default)]
pub(crate) struct Packer {
    /// A byte of the file, never the first of a cluster.
    next: Mutex<Option<u64>>,
}

impl Packer {
    /// Released clusters are about to be free: none of them may get more data. Whoever was faster has a reference of its own.
    pub(crate) fn forget(&self) {
        *lock(&self.next) = None;
    }

    fn forget_cluster(&self, cluster: HostCluster, bits: u32) {
        let mut next = lock(&self.next);
        if next.is_some_and(|at| at >> bits == cluster.get()) {
            *next = None;
        }
    }
}

/// Space for the compressed data of one cluster. Unless it is [kept](Self::keep), it is given back.
#[must_use = "dropping it gives the space back"]
pub(crate) struct Space<'a> {
    image: &'a Image,
    pub(crate) offset: HostOffset,
    /// A cluster that holds other data as well, to which this space is one more reference.
    shared: Option<HostCluster>,
    fresh: Option<Allocation<'a>>,
}

impl Space<'_> {
    pub(crate) fn keep(mut self) {
        self.shared = None;
        if let Some(fresh) = self.fresh.take() {
            fresh.keep();
        }
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        if let Some(cluster) = self.shared
            && let Some(alloc) = &self.image.alloc
        {
            alloc.release(cluster, 1, Reason::Replaced);
        }
        if let Some(fresh) = &self.fresh {
            // It may be free in a moment. Others that have data in it by now have references, too.
            let bits = self.image.geometry.cluster_bits();
            self.image.packer.forget_cluster(fresh.first(), bits);
        }
    }
}

impl Image {
    /// Finds room for `len` bytes, less than a cluster: behind the data that was stored last, if it fits there or if the cluster
    /// that follows is free.
    pub(crate) fn find_space(&self, len: u64) -> Result<Space<'_>, ImageError> {
        let alloc = self.alloc()?;
        let bits = self.geometry.cluster_bits();
        self.meta.before(Step::AllocateCompressed)?;
        let mut next = lock(&self.packer.next);
        let mut fresh = None;
        if let Some(at) = *next {
            let cluster = HostCluster::new(at >> bits);
            let room = self.cluster_size() - self.in_cluster(at);
            let fits = if len <= room {
                true
            } else {
                let follower = cluster.checked_add(1);
                let found = alloc.allocate_for(Purpose::Compressed, follower)?;
                let follows = Some(found.first()) == follower;
                fresh = Some(found);
                follows
            };
            let shared = match fits.then(|| alloc.add_references(cluster, 1)) {
                Some(Ok(())) => true,
                // As many as the refcount can count.
                None | Some(Err(AllocError::RefcountOverflow { .. })) => false,
                Some(Err(error)) => return Err(error.into()),
            };
            if shared {
                *next = self.behind(at + len);
                return Ok(Space {
                    image: self,
                    offset: HostOffset::new(at),
                    shared: Some(cluster),
                    fresh,
                });
            }
        }
        let fresh = match fresh {
            Some(fresh) => fresh,
            None => alloc.allocate_for(Purpose::Compressed, None)?,
        };
        let offset = fresh.offset();
        *next = self.behind(offset.get() + len);
        Ok(Space {
            image: self,
            offset,
            shared: None,
            fresh: Some(fresh),
        })
    }

    fn behind(&self, at: u64) -> Option<u64> {
        (self.in_cluster(at) != 0).then_some(at)
    }
}
