//! Header extensions: typed records between the fixed header and the backing file name.

use alloc::vec::Vec;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::decode::Defects;
use super::{AutoclearFeatures, CryptMethod, HeaderError};
use crate::{Geometry, HostOffset, raw};

/// Type of the record that ends the extensions.
pub const END: u32 = 0;
/// Type of the backing file's format name.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the table of feature names.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the pointer to the LUKS header.
pub const CRYPTO: u32 = 0x0537_be77;
/// Type of the pointer to the bitmap directory.
pub const BITMAPS: u32 = 0x2385_2875;
/// Type of the external data file's name.
pub const DATA_FILE_NAME: u32 = 0x4441_5441;

/// Longest backing format name, in bytes.
pub const MAX_BACKING_FORMAT_LEN: u64 = 15;
/// Largest number of bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory, in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 65535 * 1024;

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Format name of the backing file, such as `raw`.
    BackingFormat(Vec<u8>),
    /// What feature bits are called.
    FeatureNames(Vec<FeatureName>),
    /// Where the LUKS header lies.
    Crypto(CryptoExtension),
    /// Where the bitmap directory lies.
    Bitmaps(BitmapsExtension),
    /// Name of the external data file.
    DataFileName(Vec<u8>),
    /// Any other record, or one of the above that its type can't express; kept byte for byte.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its payload without padding.
        data: Vec<u8>,
    },
}

/// Place of the LUKS header and its key material in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CryptoExtension {
    /// First byte; cluster-aligned.
    pub offset: HostOffset,
    /// Bytes of header and key material, not rounded to clusters.
    pub len_bytes: u64,
}

/// Place of the bitmap directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BitmapsExtension {
    /// Number of bitmaps, 1 to 65535.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_len_bytes: u64,
    /// First byte of the directory; cluster-aligned.
    pub directory_offset: HostOffset,
}

/// One entry of the table of feature names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear; others have no meaning.
    pub kind: u8,
    /// Bit number, 0 to 63.
    pub bit: u8,
    /// The name, filled up with zeros; perhaps without one.
    pub padded_name: [u8; 46],
}

impl FeatureName {
    /// An entry with this name, cut after 46 bytes.
    pub fn new(kind: u8, bit: u8, name: &[u8]) -> Self {
        let mut padded_name = [0; 46];
        for (to, from) in padded_name.iter_mut().zip(name) {
            *to = *from;
        }
        Self {
            kind,
            bit,
            padded_name,
        }
    }

    /// The name up to its first zero.
    pub fn name(&self) -> &[u8] {
        let mut parts = self.padded_name.split(|b| *b == 0);
        parts.next().unwrap_or_default()
    }

    /// The names of all features that are known, as QEMU writes them.
    pub fn known() -> Vec<Self> {
        [
            (0, 0, "dirty bit"),
            (0, 1, "corrupt bit"),
            (0, 2, "external data file"),
            (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"),
            (2, 1, "raw external data"),
        ]
        .map(|(kind, bit, name)| Self::new(kind, bit, name.as_bytes()))
        .into()
    }
}

impl Extension {
    /// Its type.
    pub const fn kind(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => BACKING_FORMAT,
            Self::FeatureNames(_) => FEATURE_NAMES,
            Self::Crypto(_) => CRYPTO,
            Self::Bitmaps(_) => BITMAPS,
            Self::DataFileName(_) => DATA_FILE_NAME,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// Appends the record and its padding.
    pub(super) fn encode_into(&self, out: &mut Vec<u8>) {
        match self {
            Self::BackingFormat(data) | Self::DataFileName(data) | Self::Unknown { data, .. } => {
                record(out, self.kind(), data);
            }
            Self::FeatureNames(names) => {
                let mut data = Vec::with_capacity(names.len().saturating_mul(48));
                for name in names {
                    data.extend([name.kind, name.bit]);
                    data.extend(name.padded_name);
                }
                record(out, FEATURE_NAMES, &data);
            }
            Self::Crypto(crypto) => {
                let data = raw::CryptoExtension {
                    offset: U64::new(crypto.offset.get()),
                    len_bytes: U64::new(crypto.len_bytes),
                };
                record(out, CRYPTO, data.as_bytes());
            }
            Self::Bitmaps(bitmaps) => {
                let data = raw::BitmapsExtension {
                    count: U32::new(bitmaps.count),
                    reserved: U32::ZERO,
                    directory_len_bytes: U64::new(bitmaps.directory_len_bytes),
                    directory_offset: U64::new(bitmaps.directory_offset.get()),
                };
                record(out, BITMAPS, data.as_bytes());
            }
        }
    }
}

/// Appends a record. One of 4 GiB or more has a wrong length; it fits no cluster, and so is never written.
pub(super) fn record(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend(kind.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// What the meaning of extensions depends on.
#[derive(Clone, Copy)]
pub(super) struct Context {
    pub(super) geometry: Geometry,
    pub(super) crypt_method: CryptMethod,
    pub(super) autoclear: AutoclearFeatures,
}

/// A record cut out of the area.
struct Record<'a> {
    offset: u64,
    kind: u32,
    data: &'a [u8],
}

/// Cuts the area into records, up to the end marker or the first that is broken.
struct Records<'a> {
    area: &'a [u8],
    offset: u64,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, HeaderError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.area.is_empty() {
            return None;
        }
        let offset = self.offset;
        let Ok(([kind, len], rest)) = <[U32; 2]>::read_from_prefix(self.area) else {
            let available = self.area.len() as u64;
            self.area = &[];
            return Some(Err(HeaderError::ExtensionCut { offset, available }));
        };
        let len_usize = usize::try_from(len.get()).unwrap_or(usize::MAX);
        let Some((data, _)) = rest.split_at_checked(len_usize) else {
            self.area = &[];
            return Some(Err(HeaderError::ExtensionTooLong {
                offset,
                extension: kind.get(),
                found: len.get(),
                available: rest.len() as u64,
            }));
        };
        let padded = len_usize.next_multiple_of(8);
        self.area = rest.get(padded..).unwrap_or_default();
        self.offset = offset.saturating_add(8).saturating_add(padded as u64);
        if kind.get() == END {
            self.area = &[];
            return None;
        }
        Some(Ok(Record {
            offset,
            kind: kind.get(),
            data,
        }))
    }
}

/// All extensions in `area`, which starts at byte `offset` of the file.
pub(super) fn decode_all(
    area: &[u8],
    offset: u64,
    context: Context,
    defects: &mut Defects,
) -> Result<Vec<Extension>, HeaderError> {
    let mut extensions = Vec::new();
    let mut seen = Vec::new();
    for record in (Records { area, offset }) {
        match record {
            Ok(record) => {
                let extension = decode(&record, context, defects)?;
                let known = !matches!(extension, Extension::Unknown { .. });
                if known && seen.contains(&record.kind) {
                    defects.add(HeaderError::ExtensionRepeated {
                        offset: record.offset,
                        extension: record.kind,
                    })?;
                } else if known {
                    seen.push(record.kind);
                }
                extensions.push(extension);
            }
            Err(error) => defects.add(error)?,
        }
    }
    Ok(extensions)
}

/// What an image calls the incompatible features in `bits`; empty where it doesn't tell.
pub(super) fn names_of_incompatible(area: &[u8], bits: u64) -> Vec<FeatureName> {
    let mut names = Vec::new();
    for record in (Records { area, offset: 0 }).flatten() {
        if record.kind == FEATURE_NAMES {
            names = feature_names(record.data).0;
            names.retain(|name| name.kind == 0 && name.bit < 64 && bits >> name.bit & 1 == 1);
            names.truncate(64);
        }
    }
    names
}

/// The names, and whether the table ends with a whole entry. One that is cut short counts as far as it goes.
fn feature_names(data: &[u8]) -> (Vec<FeatureName>, bool) {
    let (entries, rest) = data.as_chunks::<48>();
    let mut last = [0; 48];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    let last = (!rest.is_empty()).then_some(&last);
    let names = entries
        .iter()
        .chain(last)
        .map(|[kind, bit, name @ ..]| FeatureName {
            kind: *kind,
            bit: *bit,
            padded_name: *name,
        })
        .filter(|name| name.padded_name.iter().any(|byte| *byte != 0) || rest.is_empty())
        .collect();
    (names, rest.is_empty())
}

fn decode(
    record: &Record<'_>,
    context: Context,
    defects: &mut Defects,
) -> Result<Extension, HeaderError> {
    let Record { offset, kind, data } = *record;
    let verbatim = || Extension::Unknown {
        kind,
        data: data.to_vec(),
    };
    // Nothing is as long as 4 GiB here: it lies in one cluster.
    let found = u32::try_from(data.len()).unwrap_or(u32::MAX);
    Ok(match kind {
        BACKING_FORMAT => {
            if u64::from(found) > MAX_BACKING_FORMAT_LEN {
                defects.add(HeaderError::BackingFormatTooLong {
                    offset,
                    found: found.into(),
                    limit: MAX_BACKING_FORMAT_LEN,
                })?;
            }
            Extension::BackingFormat(data.to_vec())
        }
        DATA_FILE_NAME => Extension::DataFileName(data.to_vec()),
        FEATURE_NAMES => match feature_names(data) {
            (names, true) => Extension::FeatureNames(names),
            (_, false) => verbatim(),
        },
        CRYPTO => {
            if context.crypt_method != CryptMethod::Luks {
                defects.add(HeaderError::CryptoUnexpected {
                    offset,
                    crypt_method: context.crypt_method.number(),
                })?;
            }
            let Ok(fields) = raw::CryptoExtension::read_from_bytes(data) else {
                defects.add(HeaderError::CryptoLength { offset, found })?;
                return Ok(verbatim());
            };
            let place = HostOffset::new(fields.offset.get());
            if !context.geometry.is_cluster_aligned(place) {
                defects.add(HeaderError::CryptoUnaligned {
                    offset,
                    found: place,
                    cluster_size: context.geometry.cluster_size(),
                })?;
            }
            Extension::Crypto(CryptoExtension {
                offset: place,
                len_bytes: fields.len_bytes.get(),
            })
        }
        BITMAPS => {
            let Ok(fields) = raw::BitmapsExtension::read_from_bytes(data) else {
                defects.add(HeaderError::BitmapsLength { offset, found })?;
                return Ok(verbatim());
            };
            if context.autoclear.bitmaps() {
                check_bitmaps(&fields, offset, context.geometry, defects)?;
            } else if fields.reserved.get() != 0 {
                return Ok(verbatim());
            }
            Extension::Bitmaps(BitmapsExtension {
                count: fields.count.get(),
                directory_len_bytes: fields.directory_len_bytes.get(),
                directory_offset: HostOffset::new(fields.directory_offset.get()),
            })
        }
        _ => verbatim(),
    })
}

fn check_bitmaps(
    fields: &raw::BitmapsExtension,
    offset: u64,
    geometry: Geometry,
    defects: &mut Defects,
) -> Result<(), HeaderError> {
    if fields.reserved.get() != 0 {
        defects.add(HeaderError::BitmapsReserved {
            offset,
            found: fields.reserved.get(),
        })?;
    }
    if fields.count.get() == 0 || fields.count.get() > MAX_BITMAPS {
        defects.add(HeaderError::BitmapsCount {
            offset,
            found: fields.count.get(),
            limit: MAX_BITMAPS,
        })?;
    }
    let directory = HostOffset::new(fields.directory_offset.get());
    if !geometry.is_cluster_aligned(directory) {
        defects.add(HeaderError::BitmapsDirectoryUnaligned {
            offset,
            found: directory,
            cluster_size: geometry.cluster_size(),
        })?;
    }
    if fields.directory_len_bytes.get() > MAX_BITMAP_DIRECTORY_BYTES {
        defects.add(HeaderError::BitmapsDirectoryTooLarge {
            offset,
            found: fields.directory_len_bytes.get(),
            limit: MAX_BITMAP_DIRECTORY_BYTES,
        })?;
    }
    Ok(())
}
