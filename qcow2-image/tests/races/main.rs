//! Requests that meet: one test for each kind of accident that users of other engines had, and many threads at once.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// An image on a storage that stops requests where a test wants and records what changes it.
mod rig;

/// First writes over a backing file from two threads.
mod cow;
/// A flush while others allocate.
mod flush;
/// Frequent flushes must not let the file grow for ever.
mod growth;
/// What must not be opened as plain data.
mod refusal;
/// Clusters that change owners while someone is still reading, writing or punching them.
mod reuse;
/// Guest writes must leave snapshots alone.
mod snapshots;
/// Many threads at once, and each can tell whether what it reads is right.
mod stress;
