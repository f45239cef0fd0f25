//! The virtual disk: create, open, read and write qcow2 images.
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod amend;
mod backing;
mod batch;
mod bitmap;
mod buffer;
mod bulk;
mod cache;
pub mod chain;
pub mod commit;
pub mod compact;
pub mod compare;
mod compress;
mod compressed;
pub mod copy;
mod cow;
pub mod create;
mod crypt;
mod cuts;
pub mod difference;
mod error;
mod extents;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod image;
mod l1;
mod link;
#[cfg(feature = "encryption")]
pub mod luks;
pub mod map;
mod mapping;
pub mod measure;
mod named;
mod open;
mod options;
mod pack;
#[cfg(feature = "queue")]
pub mod queue;
mod rate;
mod read;
mod ready;
pub mod rebase;
mod recover;
#[cfg(feature = "encryption")]
mod repair_key;
mod reserved;
mod resize;
mod scan;
mod snapshot;
mod stripes;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod threads;
mod transfer;
mod trees;
mod unlock;
mod vm_state;
mod write;
mod zero;

pub use amend::{AmendError, AmendOptions};
pub use bitmap::{BitmapInfo, BitmapOptions, BitmapRecovery, BitmapState, DirtyRanges};
pub use cache::CacheOptions;
pub use compact::{CompactMode, CompactOptions, CompactReport};
pub use copy::Monitor;
pub use error::{ImageError, SnapshotL1Problem};
pub use image::Image;
pub use options::ImageOptions;
pub use qcow2_alloc::{AllocError, PassDiscard};
pub use qcow2_cache::{
    Kinds, MetadataError, OverlapChecks, PointerKind, Probe, Purpose, Rules, Step, Template,
    Watcher,
};
pub use qcow2_check::chain::References;
#[cfg(feature = "encryption")]
pub use repair_key::RepairKey;
pub use resize::ResizeOptions;
pub use snapshot::{SnapshotInfo, SnapshotKey, SnapshotOptions};
