//! The inputs that fuzzing starts from, built by the encoders of `qcow2-format` and `qcow2-io` and the image writer of `qcow2-check`.

mod codec;
mod header;
mod image;
mod luks_open;
mod tables;

pub(crate) use codec::decompress;
pub(crate) use header::{header, luks};
pub(crate) use image::{check_image, image, repair};
pub(crate) use luks_open::luks_open;
pub(crate) use tables::{refcount_block, tables};
