//! Many references at once: the tables of whole trees and the refcounts of all that they lead to, changed in the file, in its order,
//! past the caches, by all processors. The gate is closed meanwhile.

mod counts;
mod rework;
#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
mod tree;

pub(crate) use counts::Set;
pub(crate) use rework::Change;
pub(crate) use tree::Flags;
