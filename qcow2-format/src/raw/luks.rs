use core::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The LUKS1 header. Sectors are of 512 bytes and count from the header's start.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LuksHeader {
    /// `LUKS`, 0xba, 0xbe. (0-5)
    pub magic: [u8; 6],
    /// 1. (6-7)
    pub version: U16,
    /// Cipher, ended by a zero. (8-39)
    pub cipher_name: [u8; 32],
    /// Mode and initialization vector, ended by a zero. (40-71)
    pub cipher_mode: [u8; 32],
    /// Hash, ended by a zero. (72-103)
    pub hash_spec: [u8; 32],
    /// Sector behind the key material. (104-107)
    pub payload_sector: U32,
    /// Bytes of the master key. (108-111)
    pub master_key_len: U32,
    /// Digest of the master key. (112-131)
    pub master_key_digest: [u8; 20],
    /// Salt of the digest. (132-163)
    pub master_key_salt: [u8; 32],
    /// Iterations of the digest. (164-167)
    pub master_key_iterations: U32,
    /// UUID as text. (168-207)
    pub uuid: [u8; 40],
    /// The key slots. (208-591)
    pub slots: [LuksKeySlot; 8],
}

/// A key slot of the LUKS1 header.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LuksKeySlot {
    /// 0x00ac71f3 enabled, 0x0000dead disabled. (0-3)
    pub state: U32,
    /// Iterations to derive the slot's key. (4-7)
    pub iterations: U32,
    /// Salt to derive the slot's key. (8-39)
    pub salt: [u8; 32],
    /// First sector of the key material. (40-43)
    pub key_material_sector: U32,
    /// Anti-forensic stripes, 4000. (44-47)
    pub stripes: U32,
}

impl LuksHeader {
    /// The first bytes of a LUKS header.
    pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
    /// Bytes of this structure.
    pub const LEN: usize = 592;
}

const _: () = {
    assert!(size_of::<LuksHeader>() == LuksHeader::LEN);
    assert!(size_of::<LuksKeySlot>() == 48);
    assert!(offset_of!(LuksHeader, payload_sector) == 104);
    assert!(offset_of!(LuksHeader, master_key_iterations) == 164);
    assert!(offset_of!(LuksHeader, slots) == 208);
};
