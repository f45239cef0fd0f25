//! The rules of crash safety, as switches.

/// Which rules are kept. All are; tests switch one off to show that its absence is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "test-utils"), non_exhaustive)]
pub struct Rules {
    /// A refcount is raised on disk before a pointer to the cluster is there.
    pub refcount_before_pointer: bool,
    /// A cluster's content is on disk before a pointer to it is.
    pub data_before_pointer: bool,
    /// A pointer is gone from disk before its cluster is given to others.
    pub release_after_pointer: bool,
    /// What a root points at is on disk before the root is.
    pub root_last: bool,
    /// A flush returns when everything before it is durable.
    pub flush_is_complete: bool,
    /// The dirty bit is set around refcounts that wait.
    pub dirty_bit_first: bool,
}

impl Rules {
    /// All of them.
    pub const ALL: Self = Self {
        refcount_before_pointer: true,
        data_before_pointer: true,
        release_after_pointer: true,
        root_last: true,
        flush_is_complete: true,
        dirty_bit_first: true,
    };
}

impl Default for Rules {
    fn default() -> Self {
        Self::ALL
    }
}
