//! The inputs that fuzzing starts from, built by the encoders of `qcow2-format` and the image writer of `qcow2-check`.

mod header;
mod image;
mod tables;

pub(crate) use header::{header, luks};
pub(crate) use image::{check_image, image};
pub(crate) use tables::{refcount_block, tables};
