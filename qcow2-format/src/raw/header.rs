use core::mem::{offset_of, size_of};

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Start of the image file: the fixed header with all fields known today.
///
/// Version 2 has the first 72 bytes only.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// `QFI` and 0xfb. (0-3)
    pub magic: [u8; 4],
    /// 2 or 3. (4-7)
    pub version: U32,
    /// Where the backing file name lies; 0 where there is none. Bounds the extensions. (8-15)
    pub backing_name_offset: U64,
    /// Bytes of the backing file name. (16-19)
    pub backing_name_len: U32,
    /// Base-2 logarithm of the cluster size. (20-23)
    pub cluster_bits: U32,
    /// Virtual size in bytes. (24-31)
    pub virtual_size: U64,
    /// 0 none, 1 AES, 2 LUKS. (32-35)
    pub crypt_method: U32,
    /// Entries in the active L1 table, 8 bytes each. (36-39)
    pub l1_entries: U32,
    /// Host offset of the active L1 table. (40-47)
    pub l1_table_offset: U64,
    /// Host offset of the refcount table. (48-55)
    pub refcount_table_offset: U64,
    /// Clusters that the refcount table fills. (56-59)
    pub refcount_table_clusters: U32,
    /// Entries in the snapshot table. (60-63)
    pub snapshot_count: U32,
    /// Host offset of the snapshot table. (64-71)
    pub snapshot_table_offset: U64,
    /// Features without which the image can't be read. (72-79)
    pub incompatible: U64,
    /// Features that may be ignored. (80-87)
    pub compatible: U64,
    /// Features that a writer clears unless it knows them. (88-95)
    pub autoclear: U64,
    /// Base-2 logarithm of the refcount width in bits. (96-99)
    pub refcount_order: U32,
    /// Bytes before the first extension. (100-103)
    pub header_length: U32,
    /// 0 deflate, 1 zstd; present where `header_length` is above 104. (104)
    pub compression_type: u8,
    /// Must be zero. (105-111)
    pub padding: [u8; 7],
}

impl Header {
    /// The first bytes of every image.
    pub const MAGIC: [u8; 4] = *b"QFI\xfb";
    /// Bytes of a version 2 header.
    pub const V2_LEN: u32 = 72;
    /// Bytes of the shortest version 3 header, which ends before the compression type.
    pub const V3_MIN_LEN: u32 = 104;
    /// Bytes of this structure.
    pub const LEN: u32 = 112;
}

/// Payload of the header extension that says where the LUKS header lies.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CryptoExtension {
    /// Host offset of the LUKS header. (0-7)
    pub offset: U64,
    /// Bytes of header and key material. (8-15)
    pub len_bytes: U64,
}

/// Payload of the header extension that says where the bitmap directory lies.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BitmapsExtension {
    /// Number of bitmaps. (0-3)
    pub count: U32,
    /// Must be zero. (4-7)
    pub reserved: U32,
    /// Bytes of the directory. (8-15)
    pub directory_len_bytes: U64,
    /// Host offset of the directory. (16-23)
    pub directory_offset: U64,
}

const _: () = {
    assert!(size_of::<CryptoExtension>() == 16);
    assert!(size_of::<BitmapsExtension>() == 24);
    assert!(size_of::<Header>() == 112);
    assert!(offset_of!(Header, virtual_size) == 24);
    assert!(offset_of!(Header, l1_table_offset) == 40);
    assert!(offset_of!(Header, snapshot_table_offset) == 64);
    assert!(offset_of!(Header, incompatible) == 72);
    assert!(offset_of!(Header, refcount_order) == 96);
    assert!(offset_of!(Header, compression_type) == 104);
};
