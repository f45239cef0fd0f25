use core::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Fixed part of a bitmap directory entry; extra data and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BitmapEntry {
    /// Host offset of the bitmap table. (0-7)
    pub table_offset: U64,
    /// Entries in that table, 8 bytes each. (8-11)
    pub table_entries: U32,
    /// Bit 0 in use, 1 auto, 2 extra data compatible. (12-15)
    pub flags: U32,
    /// 1: dirty tracking. (16)
    pub kind: u8,
    /// Base-2 logarithm of the guest bytes a bit stands for. (17)
    pub granularity_bits: u8,
    /// Bytes of the name. (18-19)
    pub name_len: U16,
    /// Bytes of extra data. (20-23)
    pub extra_data_len: U32,
}

impl BitmapEntry {
    /// Bytes of this structure.
    pub const LEN: usize = 24;
}

const _: () = {
    assert!(size_of::<BitmapEntry>() == BitmapEntry::LEN);
    assert!(offset_of!(BitmapEntry, flags) == 12);
    assert!(offset_of!(BitmapEntry, name_len) == 18);
};
