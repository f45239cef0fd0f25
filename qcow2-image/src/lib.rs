//! The virtual disk: create, open, read and write qcow2 images.
#![forbid(unsafe_code)]

pub mod create;
