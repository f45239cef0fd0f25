//! First clusters: every field and every kind of extension that a header can have.

use qcow2_check::synth::Builder;
use qcow2_format::header::{
    BitmapsExtension, CompressionType, CryptMethod, CryptoExtension, Extension, FeatureName,
    Version,
};
use qcow2_format::luks::{HEADER_SECTORS, STRIPES};
use qcow2_format::{Geometry, Header, HostOffset};

use crate::Seed;

/// A name, a version, and what makes the header special.
type Variant = (&'static str, Version, fn(&mut Header));

/// First clusters with every kind of field and extension.
pub(crate) fn header() -> Vec<Seed> {
    let variants: [Variant; 8] = [
        ("v2", Version::V2, |_| {}),
        ("v3", Version::V3, |_| {}),
        ("backing", Version::V3, |header| {
            header.backing_name = Some(b"base.raw".to_vec());
            header
                .extensions
                .push(Extension::BackingFormat(b"raw".to_vec()));
        }),
        ("feature-names", Version::V3, |header| {
            header.compatible.set_lazy_refcounts(true);
            header.incompatible.set_dirty(true);
            header
                .extensions
                .push(Extension::FeatureNames(FeatureName::known()));
        }),
        ("data-file", Version::V3, |header| {
            header.incompatible.set_external_data(true);
            header.autoclear.set_raw_external_data(true);
            header
                .extensions
                .push(Extension::DataFileName(b"data.raw".to_vec()));
        }),
        ("luks", Version::V3, |header| {
            header.crypt_method = CryptMethod::Luks;
            let crypto = CryptoExtension {
                offset: HostOffset::new(0x8000),
                len_bytes: 528_384,
            };
            header.extensions.push(Extension::Crypto(crypto));
        }),
        ("bitmaps", Version::V3, |header| {
            header.autoclear.set_bitmaps(true);
            header.extensions.push(Extension::Bitmaps(BitmapsExtension {
                count: 2,
                directory_len_bytes: 64,
                directory_offset: HostOffset::new(0x9000),
            }));
        }),
        ("unknown", Version::V3, |header| {
            header.header_length = 120;
            header.unknown_fields = vec![7; 8];
            header.incompatible.set_compression(true);
            header.compression_type = CompressionType::Zstd;
            header.extensions.push(Extension::Unknown {
                kind: 0x1234_5678,
                data: b"kept".to_vec(),
            });
        }),
    ];
    let geometry = Geometry::new(12, 4, false).expect("within the format's limits");
    let seed = |(name, version, change): Variant| {
        let mut header = Builder::new(version, geometry, 1 << 20).header;
        header.refcount_table_offset = HostOffset::new(0x1000);
        header.refcount_table_clusters = 1;
        header.l1_table_offset = HostOffset::new(0x3000);
        header.l1_entries = 1;
        change(&mut header);
        Seed::new(name, header.encode().expect("the header fits its cluster"))
    };
    variants.into_iter().map(seed).collect()
}

/// A LUKS header with one key in use and one with all eight.
pub(crate) fn luks() -> Vec<Seed> {
    vec![
        Seed::new("aes-128-cbc", luks_header("cbc-essiv:sha256", 16, 1)),
        Seed::new("aes-256-xts", luks_header("xts-plain64", 64, 8)),
    ]
}

/// A LUKS header for AES, with `key_len` bytes of master key and `enabled` of eight key slots in use.
pub(super) fn luks_header(mode: &str, key_len: u32, enabled: u32) -> Vec<u8> {
    let text = |text: &str, len: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(len, 0);
        bytes
    };
    let area_sectors = (key_len * STRIPES).div_ceil(512).next_multiple_of(8);
    let mut bytes = b"LUKS\xba\xbe\0\x01".to_vec();
    bytes.extend(text("aes", 32));
    bytes.extend(text(mode, 32));
    bytes.extend(text("sha256", 32));
    bytes.extend((HEADER_SECTORS + 8 * area_sectors).to_be_bytes());
    bytes.extend(key_len.to_be_bytes());
    bytes.extend([0xd1; 20]); // digest of the master key
    bytes.extend([0x5a; 32]); // its salt
    bytes.extend(1000_u32.to_be_bytes()); // and iterations
    bytes.extend(text("01234567-89ab-cdef-0123-456789abcdef", 40));
    for slot in 0..8 {
        let (state, iterations): (u32, u32) = if slot < enabled {
            (0x00ac_71f3, 1000)
        } else {
            (0xdead, 0)
        };
        bytes.extend(state.to_be_bytes());
        bytes.extend(iterations.to_be_bytes());
        bytes.extend([0x5a; 32]);
        bytes.extend((HEADER_SECTORS + slot * area_sectors).to_be_bytes());
        bytes.extend(STRIPES.to_be_bytes());
    }
    bytes
}
