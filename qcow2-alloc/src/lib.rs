//! Who owns which cluster: refcounts, free space, growth of the refcount structures.
#![forbid(unsafe_code)]
