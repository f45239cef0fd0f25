//! The allocator on images that have nothing else.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// What can't be done, and what is left after it.
mod errors;
/// Refcount blocks and tables that have to be made and moved.
mod growth;
/// An image with nothing but the structures that every image has.
mod image;
/// Random operations beside a map of refcounts.
mod model;
/// Which free clusters are handed out.
mod order;
