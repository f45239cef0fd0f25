use core::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Fixed part of a snapshot table entry; extra data, id and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SnapshotHeader {
    /// Host offset of the snapshot's L1 table. (0-7)
    pub l1_table_offset: U64,
    /// Entries in that table, 8 bytes each. (8-11)
    pub l1_entries: U32,
    /// Bytes of the id. (12-13)
    pub id_len: U16,
    /// Bytes of the name. (14-15)
    pub name_len: U16,
    /// When it was taken: seconds since 1970. (16-19)
    pub date_sec: U32,
    /// When it was taken: nanoseconds. (20-23)
    pub date_nsec: U32,
    /// Run time of the guest in nanoseconds. (24-31)
    pub vm_clock_nsec: U64,
    /// Bytes of VM state, where the extra data doesn't tell. (32-35)
    pub vm_state_size: U32,
    /// Bytes of extra data. (36-39)
    pub extra_data_len: U32,
}

impl SnapshotHeader {
    /// Bytes of this structure.
    pub const LEN: usize = 40;

    /// The structure that these bytes are.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        zerocopy::transmute!(bytes)
    }
}

const _: () = {
    assert!(size_of::<SnapshotHeader>() == SnapshotHeader::LEN);
    assert!(offset_of!(SnapshotHeader, id_len) == 12);
    assert!(offset_of!(SnapshotHeader, vm_clock_nsec) == 24);
    assert!(offset_of!(SnapshotHeader, extra_data_len) == 36);
};
