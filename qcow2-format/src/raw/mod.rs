//! The fixed structures as they lie in the file: any bytes are a value, and every byte is a field.

mod bitmap;
mod header;
mod luks;
mod snapshot;

pub use bitmap::BitmapEntry;
pub use header::{BitmapsExtension, CryptoExtension, Header};
pub use luks::{LuksHeader, LuksKeySlot};
pub use snapshot::SnapshotHeader;
