//! Writing new images.
