//! The inputs that fuzzing starts from, built by the encoders of `qcow2-format`.

mod draft;
mod header;
mod image;
mod tables;

pub use header::{header, luks};
pub use image::check_image;
pub use tables::{refcount_block, tables};
