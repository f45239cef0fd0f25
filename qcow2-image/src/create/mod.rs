//! Writing new images.
//!
//! [`write_image`] turns [`CreateOptions`] into an image, straight onto a storage: every table is written once, front to
//! back, and none is held in memory. All options are judged before the first byte changes. The header comes last, behind a
//! flush: what was interrupted is no image, rather than a broken one.
//!
//! ```text
//! cluster  0        1               1+t              1+t+b      front
//!          header   refcount table  refcount blocks  L1 table   [L2 table, its data] [L2 table, its data] …
//! ```
//!
//! All that lies behind the L1 table is there only when the image is preallocated; with an external data file only the L2
//! tables are. Where one refcount block is enough, this is byte for byte what `qemu-img create` writes (with
//! `preallocation` off or metadata).

mod encryption;
mod error;
mod footprint;
mod layout;
mod options;
pub(crate) mod parse;
mod plan;
mod size;
mod target;
mod write;

pub use error::{CreateError, CreateErrorKind};
pub(crate) use footprint::Footprint;
pub use options::{CreateOptions, Preallocation};
pub use size::{SizeError, parse_size};
pub use write::write_image;

#[cfg(test)]
mod tests;
