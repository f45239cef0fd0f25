//! Reading a header, as an opener (the first thing wrong is an error) or as a checker (a list of all that is wrong).

use alloc::borrow::Cow;
use alloc::vec::Vec;

use super::extension::{self, Context};
use super::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, Extension, Header,
    HeaderError, HeaderTable, IncompatibleFeatures, Version,
};
use crate::geometry::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::{Geometry, HostOffset, raw};

/// Most snapshots an image may have.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name, in bytes.
pub const MAX_BACKING_NAME_LEN: u64 = 1023;
/// Bytes of a snapshot table entry without its variable parts.
const SNAPSHOT_ENTRY_MIN_BYTES: u64 = 40;
/// Offsets are signed elsewhere.
const TABLE_END_MAX: u64 = i64::MAX as u64;
/// More L1 entries than this are called too many rather than missing.
const L1_ENTRIES_LIMIT: u64 = i32::MAX as u64;

/// Where things that are wrong go: an opener stops at the first one it may not ignore.
pub(super) struct Defects {
    check: bool,
    list: Vec<HeaderError>,
}

impl Defects {
    pub(super) fn add(&mut self, error: HeaderError) -> Result<(), HeaderError> {
        if self.check {
            self.list.push(error);
        } else if error.is_refused() {
            return Err(error);
        }
        Ok(())
    }
}

impl Header {
    /// Bytes of the first cluster, told from the first 112 bytes of the file; missing ones are zeros.
    ///
    /// # Errors
    ///
    /// Another format, an unknown version, or a cluster size out of range. Nothing else is looked at.
    pub fn probe(prefix: &[u8]) -> Result<usize, HeaderError> {
        let (_, geometry) = start(&fixed(prefix))?;
        Ok(geometry.cluster_len())
    }

    /// Reads a header as an opener must. `first_cluster` holds the first cluster of the file; missing bytes are zeros,
    /// bytes behind it are not looked at.
    ///
    /// # Errors
    ///
    /// The first reason for which QEMU would refuse the image, in QEMU's order.
    pub fn decode(first_cluster: &[u8]) -> Result<Self, HeaderError> {
        let mut defects = Defects {
            check: false,
            list: Vec::new(),
        };
        decode(first_cluster, &mut defects)
    }

    /// Reads a header as a checker does: what a check can live with comes as a list beside the header, in the order in
    /// which [`decode`](Self::decode) tests. Entries of the list that are not [refused](HeaderError::is_refused) only
    /// break a rule of the format.
    ///
    /// A broken extension ends the extensions; those before it are kept. Backing names that are out of place are left out.
    ///
    /// # Errors
    ///
    /// Something without which no table of the image can be found: the magic bytes, version, geometry, header length,
    /// unknown incompatible features or compression types, impossible refcount and L1 tables.
    pub fn decode_for_check(first_cluster: &[u8]) -> Result<(Self, Vec<HeaderError>), HeaderError> {
        let mut defects = Defects {
            check: true,
            list: Vec::new(),
        };
        let header = decode(first_cluster, &mut defects)?;
        Ok((header, defects.list))
    }
}

/// The fixed fields, short input completed with zeros.
fn fixed(prefix: &[u8]) -> raw::Header {
    let mut bytes = [0; raw::Header::LEN as usize];
    for (to, from) in bytes.iter_mut().zip(prefix) {
        *to = *from;
    }
    zerocopy::transmute!(bytes)
}

/// Version, and the geometry as far as cluster_bits goes.
fn start(fixed: &raw::Header) -> Result<(Version, Geometry), HeaderError> {
    if fixed.magic != raw::Header::MAGIC {
        return Err(HeaderError::Magic { found: fixed.magic });
    }
    let version = match fixed.version.get() {
        2 => Version::V2,
        3 => Version::V3,
        found => return Err(HeaderError::Version { found }),
    };
    Ok((version, Geometry::new(fixed.cluster_bits.get(), 4, false)?))
}

/// The fields that version 2 lacks get the values they stand for there.
fn complete(mut fixed: raw::Header, version: Version) -> raw::Header {
    if version == Version::V2 {
        fixed.incompatible.set(0);
        fixed.compatible.set(0);
        fixed.autoclear.set(0);
        fixed.refcount_order.set(4);
        fixed.header_length.set(raw::Header::V2_LEN);
    }
    if fixed.header_length.get() <= raw::Header::V3_MIN_LEN {
        fixed.compression_type = 0;
    }
    for (byte, at) in fixed.padding.iter_mut().zip(105..) {
        if at >= fixed.header_length.get() {
            *byte = 0;
        }
    }
    fixed
}

fn decode(input: &[u8], defects: &mut Defects) -> Result<Header, HeaderError> {
    let fixed = fixed(input);
    let (version, geometry) = start(&fixed)?;
    let fixed = complete(fixed, version);
    let cluster_size = geometry.cluster_size();
    let cluster = if let Some(cluster) = input.get(..geometry.cluster_len()) {
        Cow::Borrowed(cluster)
    } else {
        let mut padded = input.to_vec();
        padded.resize(geometry.cluster_len(), 0);
        Cow::Owned(padded)
    };
    let part = |from: u64, to: u64| {
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let to = usize::try_from(to).unwrap_or(usize::MAX);
        cluster.get(from..to).unwrap_or_default()
    };

    let header_length = fixed.header_length.get();
    if version == Version::V3
        && (header_length < raw::Header::V3_MIN_LEN || u64::from(header_length) > cluster_size)
    {
        return Err(HeaderError::HeaderLength {
            found: header_length,
            min: raw::Header::V3_MIN_LEN,
            max: cluster_size,
        });
    }
    if !header_length.is_multiple_of(8) {
        defects.add(HeaderError::HeaderLengthUnaligned {
            found: header_length,
        })?;
    }
    let backing_name_offset = fixed.backing_name_offset.get();
    if backing_name_offset > cluster_size {
        defects.add(HeaderError::BackingNameOffset {
            found: backing_name_offset,
            limit: cluster_size,
        })?;
    }
    let extensions_end = match backing_name_offset {
        0 => cluster_size,
        offset => offset.min(cluster_size),
    };
    let area = part(header_length.into(), extensions_end);

    let compression_type = compression_type(&fixed, defects)?;
    let incompatible = IncompatibleFeatures::from_bits(fixed.incompatible.get());
    let autoclear = AutoclearFeatures::from_bits(fixed.autoclear.get());
    if incompatible.unknown() != 0 {
        return Err(HeaderError::UnknownIncompatible {
            bits: incompatible.unknown(),
            names: extension::names_of_incompatible(area, incompatible.unknown()),
        });
    }
    let geometry = Geometry::new(
        geometry.cluster_bits(),
        fixed.refcount_order.get(),
        incompatible.extended_l2(),
    )?;
    check_tables(&fixed, geometry, defects)?;
    let crypt_method = CryptMethod::from_number(fixed.crypt_method.get());
    if let CryptMethod::Unknown(found) = crypt_method {
        defects.add(HeaderError::CryptMethod { found })?;
    }
    let context = Context {
        geometry,
        crypt_method,
        autoclear,
    };
    let extensions = extension::decode_all(area, header_length.into(), context, defects)?;
    if autoclear.raw_external_data() && !incompatible.external_data() {
        defects.add(HeaderError::RawExternalWithoutData)?;
    }
    let has = |kind| extensions.iter().any(|e: &Extension| e.kind() == kind);
    if crypt_method == CryptMethod::Luks && !has(extension::CRYPTO) {
        defects.add(HeaderError::CryptoMissing)?;
    }
    if autoclear.bitmaps() && !has(extension::BITMAPS) {
        defects.add(HeaderError::BitmapsMissing)?;
    }
    let backing_name = backing_name_range(&fixed, cluster_size, defects)?
        .map(|(from, to)| part(from, to).to_vec());
    if backing_name.is_some() && autoclear.raw_external_data() {
        defects.add(HeaderError::BackingWithRawExternal)?;
    }
    Ok(Header {
        version,
        geometry,
        virtual_size_raw: fixed.virtual_size.get(),
        crypt_method,
        l1_table_offset: HostOffset::new(fixed.l1_table_offset.get()),
        l1_entries: fixed.l1_entries.get(),
        refcount_table_offset: HostOffset::new(fixed.refcount_table_offset.get()),
        refcount_table_clusters: fixed.refcount_table_clusters.get(),
        snapshot_count: fixed.snapshot_count.get(),
        snapshot_table_offset: HostOffset::new(fixed.snapshot_table_offset.get()),
        incompatible,
        compatible: CompatibleFeatures::from_bits(fixed.compatible.get()),
        autoclear,
        header_length,
        compression_type,
        padding: fixed.padding,
        unknown_fields: part(raw::Header::LEN.into(), header_length.into()).to_vec(),
        backing_name,
        extensions,
    })
}

fn compression_type(
    fixed: &raw::Header,
    defects: &mut Defects,
) -> Result<CompressionType, HeaderError> {
    let found = fixed.compression_type;
    let compression_type = match found {
        0 => CompressionType::Zlib,
        1 => CompressionType::Zstd,
        _ => return Err(HeaderError::CompressionType { found }),
    };
    let bit = IncompatibleFeatures::from_bits(fixed.incompatible.get()).compression();
    if bit != (compression_type != CompressionType::Zlib) {
        defects.add(HeaderError::CompressionBit { found, bit })?;
    }
    Ok(compression_type)
}

/// The tables the header points at: a check can do without snapshots, and rebuilds a refcount table that is not there.
fn check_tables(
    fixed: &raw::Header,
    geometry: Geometry,
    defects: &mut Defects,
) -> Result<(), HeaderError> {
    let cluster_size = geometry.cluster_size();
    let refcount_clusters = fixed.refcount_table_clusters.get();
    if refcount_clusters == 0 {
        defects.add(HeaderError::RefcountTableEmpty)?;
    }
    check_table(
        HeaderTable::Refcount,
        HostOffset::new(fixed.refcount_table_offset.get()),
        refcount_clusters,
        cluster_size,
        MAX_REFCOUNT_TABLE_BYTES,
        geometry,
    )?;
    let snapshots = check_table(
        HeaderTable::Snapshots,
        HostOffset::new(fixed.snapshot_table_offset.get()),
        fixed.snapshot_count.get(),
        SNAPSHOT_ENTRY_MIN_BYTES,
        SNAPSHOT_ENTRY_MIN_BYTES.saturating_mul(MAX_SNAPSHOTS.into()),
        geometry,
    );
    if let Err(error) = snapshots {
        defects.add(error)?;
    }
    let l1_entries = fixed.l1_entries.get();
    check_table(
        HeaderTable::L1,
        HostOffset::new(fixed.l1_table_offset.get()),
        l1_entries,
        8,
        MAX_L1_BYTES,
        geometry,
    )?;
    let virtual_size = fixed.virtual_size.get();
    let needed = geometry.l1_entries_for(virtual_size);
    if needed > L1_ENTRIES_LIMIT {
        return Err(HeaderError::VirtualSize {
            found: virtual_size,
            needed,
            limit: L1_ENTRIES_LIMIT,
        });
    }
    if needed > l1_entries.into() {
        return Err(HeaderError::L1TooSmall {
            found: l1_entries,
            needed,
        });
    }
    Ok(())
}

fn check_table(
    table: HeaderTable,
    offset: HostOffset,
    entries: u32,
    entry_bytes: u64,
    max_bytes: u64,
    geometry: Geometry,
) -> Result<(), HeaderError> {
    let len_bytes = u64::from(entries).saturating_mul(entry_bytes);
    if len_bytes > max_bytes {
        let limit = max_bytes.checked_div(entry_bytes).unwrap_or_default();
        return Err(HeaderError::TableTooLarge {
            table,
            found: entries,
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
        });
    }
    if !geometry.is_cluster_aligned(offset) {
        return Err(HeaderError::TableUnaligned {
            table,
            found: offset,
            cluster_size: geometry.cluster_size(),
        });
    }
    match offset.checked_add(len_bytes) {
        Some(end) if end.get() <= TABLE_END_MAX => Ok(()),
        _ => Err(HeaderError::TableEnd {
            table,
            found: offset,
            len_bytes,
        }),
    }
}

/// First byte of the backing file name and the one behind it.
fn backing_name_range(
    fixed: &raw::Header,
    cluster_size: u64,
    defects: &mut Defects,
) -> Result<Option<(u64, u64)>, HeaderError> {
    let offset = fixed.backing_name_offset.get();
    let len = u64::from(fixed.backing_name_len.get());
    // An offset behind the cluster is reported before the extensions are read.
    let Some(room) = cluster_size.checked_sub(offset) else {
        return Ok(None);
    };
    if offset == 0 {
        return Ok(None);
    }
    let limit = room.min(MAX_BACKING_NAME_LEN);
    if len > limit {
        defects.add(HeaderError::BackingNameTooLong { found: len, limit })?;
        return Ok(None);
    }
    if offset < fixed.header_length.get().into() {
        defects.add(HeaderError::BackingNameInHeader {
            found: offset,
            header_length: fixed.header_length.get(),
        })?;
    }
    Ok((len != 0).then(|| (offset, offset.saturating_add(len))))
}
