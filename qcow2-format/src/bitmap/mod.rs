//! Persistent bitmaps: directory entries and bitmap tables.

mod entry;
mod error;
mod table;

pub use entry::{BitmapDirectory, BitmapEntry, BitmapFlags};
pub use error::BitmapError;
pub use table::{BitmapCluster, BitmapTableEntry, required_table_entries};

/// Most entries a bitmap table may have.
pub const MAX_TABLE_ENTRIES: u32 = 0x0800_0000;
/// Most bytes of clusters a bitmap table may have entries for.
pub const MAX_DATA_BYTES: u64 = 512 << 20;
/// Smallest `granularity_bits`: a bit for every sector.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// Largest `granularity_bits`: a bit for every 2 GiB.
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// Longest name, in bytes.
pub const MAX_NAME_LEN: u64 = 1023;
/// The type of a bitmap that tracks which parts of the disk were written.
pub const DIRTY_TRACKING: u8 = 1;
