//! Who owns which cluster of a qcow2 image: refcounts, free space, growth of the refcount structures.
//!
//! A cluster goes round: it is [allocated](Allocator::allocate), which raises its refcount in the cache, and
//! [kept](Allocation::keep) when something points at it. When nothing in memory does any more it is
//! [released](Allocator::release). The next commit brings that to the disk; then the release is ripe. When no request is in
//! flight that could know the old pointer, it is [reclaimed](Allocator::reclaim): punched out of the file if that is
//! wanted, its refcount lowered, and free for others.
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod allocation;
mod allocator;
mod counts;
mod error;
mod grow;
mod reclaim;
mod refcounts;
mod release;
mod relocate;
mod search;
mod state;
mod trim;

pub use allocation::Allocation;
pub use allocator::Allocator;
pub use error::AllocError;
pub use release::{PassDiscard, Reason, Release};
pub use search::Order;
