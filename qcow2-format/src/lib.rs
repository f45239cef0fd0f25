//! What the bytes of a qcow2 image mean.
//!
//! Every on-disk structure of qcow2 version 2 and 3, typed and validated, without any I/O: bytes go in, typed facts or
//! typed errors come out, and encoding gives the same bytes back.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod addr;
pub mod bitmap;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod geometry;
pub mod header;
mod l1;
pub mod l2;
pub mod luks;
pub mod raw;
mod refcount;
pub mod snapshot;

pub use addr::{GuestCluster, GuestOffset, HostCluster, HostOffset};
pub use bitmap::{BitmapEntry, BitmapError, BitmapTableEntry};
pub use geometry::{Geometry, GeometryError};
pub use header::{Header, HeaderError, HeaderErrorKind};
pub use l1::L1Entry;
pub use l2::{ClusterKind, CompressedExtent, EntryRules, L2Entry};
pub use luks::{LuksError, LuksHeader};
pub use refcount::{RefcountBlock, RefcountTableEntry, set_refcount};
pub use snapshot::{Snapshot, SnapshotError};
