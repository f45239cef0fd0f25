//! Feature bits and the small enumerations of the header.

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Version 2, `compat=0.10`: no features, 16-bit refcounts.
    V2,
    /// Version 3, `compat=1.1`.
    V3,
}

impl Version {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CryptMethod {
    /// Not at all.
    None,
    /// The legacy AES-128-CBC without a header of its own.
    Aes,
    /// LUKS1, with its header where the encryption extension says.
    Luks,
    /// A number without a meaning. Only [`Header::decode_for_check`](super::Header::decode_for_check) gives it.
    Unknown(u32),
}

impl core::fmt::Display for CryptMethod {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Aes => f.write_str("aes"),
            Self::Luks => f.write_str("luks"),
            Self::Unknown(number) => write!(f, "method {number}"),
        }
    }
}

impl CryptMethod {
    /// What the number in the header means.
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Aes,
            2 => Self::Luks,
            other => Self::Unknown(other),
        }
    }

    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Aes => 1,
            Self::Luks => 2,
            Self::Unknown(number) => number,
        }
    }
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum CompressionType {
    /// Raw deflate streams; called zlib by all tools.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl CompressionType {
    /// The number in the header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }
}

macro_rules! features {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:literal $get:ident $set:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            const KNOWN: u64 = 0 $(| 1 << $bit)+;

            /// The features with these 64 bits.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            /// All 64 bits.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// The set bits that no accessor stands for.
            pub const fn unknown(self) -> u64 {
                self.0 & !Self::KNOWN
            }

            $(
                $(#[$bit_doc])*
                pub const fn $get(self) -> bool {
                    self.0 & 1 << $bit != 0
                }

                #[doc = concat!("Sets or clears [`", stringify!($get), "`](Self::", stringify!($get), ").")]
                pub const fn $set(&mut self, on: bool) {
                    if on {
                        self.0 |= 1 << $bit;
                    } else {
                        self.0 &= !(1 << $bit);
                    }
                }
            )+
        }
    };
}

features! {
    /// Features without which an image can't be read: whoever doesn't know a set bit must refuse it.
    IncompatibleFeatures {
        /// Refcounts on disk may be too low and must be rebuilt before the first write.
        0 dirty set_dirty,
        /// Some structure is known to be inconsistent; only a repair may write.
        1 corrupt set_corrupt,
        /// Guest clusters lie in another file.
        2 external_data set_external_data,
        /// The compression type is not deflate.
        3 compression set_compression,
        /// L2 entries have 16 bytes and subclusters.
        4 extended_l2 set_extended_l2,
    }
}

features! {
    /// Features that may be ignored; unknown bits are kept.
    CompatibleFeatures {
        /// A writer may set the dirty bit and postpone refcount updates.
        0 lazy_refcounts set_lazy_refcounts,
    }
}

features! {
    /// Features that a writer must clear before its first change unless it knows them.
    AutoclearFeatures {
        /// The bitmaps extension agrees with the disk's content.
        0 bitmaps set_bitmaps,
        /// The external data file on its own is a valid raw image.
        1 raw_external_data set_raw_external_data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setter_changes_its_own_bit_only() {
        let mut features = IncompatibleFeatures::from_bits(1 << 63 | 1);
        features.set_extended_l2(true);
        assert_eq!(features.bits(), 1 << 63 | 1 << 4 | 1);
        features.set_dirty(false);
        assert!(!features.dirty() && features.extended_l2() && !features.compression());
        assert_eq!(features.unknown(), 1 << 63);
    }
}
