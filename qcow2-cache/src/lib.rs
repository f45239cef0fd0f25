//! Metadata of a qcow2 image in memory: slices of its tables, the order in which changes reach the disk, and the map of
//! where metadata lies.
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod commit;
mod error;
mod metadata;
mod overlap;
mod rules;
#[doc(hidden)]
pub mod sync;
mod table;

pub use commit::GroupCommit;
pub use error::{MetadataError, PointerKind, Purpose};
pub use metadata::{Metadata, MetadataOptions, Probe, Releases, Step, Watcher, field};
pub use overlap::{Kinds, OverlapChecks, OverlapMap, Template, TooMuchMetadata};
pub use rules::Rules;
pub use table::{DirtySlice, Room, SliceWriter, TableCache};
