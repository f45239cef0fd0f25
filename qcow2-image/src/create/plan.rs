//! From options to a header and a layout: all rules are tested here.

use qcow2_format::geometry::{
    MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS, MIN_EXTENDED_CLUSTER_BITS,
};
use qcow2_format::header::extension::MAX_BACKING_FORMAT_LEN;
use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptoExtension, Extension,
    FeatureName, IncompatibleFeatures, MAX_BACKING_NAME_LEN, Version,
};
use qcow2_format::{Geometry, Header, HostOffset, raw};

use super::layout::Layout;
use super::{CreateError, CreateOptions, Preallocation};

/// Virtual sizes end here, however large the clusters are.
const MAX_SIZE: u64 = (1 << 63) - (1 << 30);
/// Clusters must be larger than this for the names of features to be written.
const FEATURE_NAMES_ABOVE: u64 = 4096;

/// An image that can be written: nothing but the storage can fail now.
#[derive(Debug)]
pub(super) struct Plan {
    /// Virtual size in bytes, whole sectors.
    pub(super) size: u64,
    pub(super) preallocation: Preallocation,
    pub(super) layout: Layout,
    /// The header's cluster.
    pub(super) first_cluster: Vec<u8>,
}

impl Plan {
    pub(super) fn new(options: &CreateOptions) -> Result<Self, CreateError> {
        let geometry = geometry(options)?;
        check_version(options)?;
        check_names(options)?;
        check_files(options)?;
        options.encryption.check(options.data_file_raw)?;
        let size = size(options, geometry)?;
        let preallocation = options.effective_preallocation();
        let external = options.data_file.is_some();
        let crypto_len = options.encryption.area_len()?;
        let layout = Layout::new(
            geometry,
            size,
            preallocation,
            external,
            crypto_len,
            options.room,
        )?;
        let header = header(options, size, &layout);
        check_space(&header)?;
        Ok(Self {
            size,
            preallocation,
            layout,
            first_cluster: header.encode()?,
        })
    }
}

fn geometry(options: &CreateOptions) -> Result<Geometry, CreateError> {
    let found = options.cluster_size;
    let cluster_bits = found.trailing_zeros();
    if !found.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(CreateError::ClusterSize { found });
    }
    if options.extended_l2 && cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
        return Err(CreateError::ExtendedClusterSize { found });
    }
    let bits = options.refcount_bits;
    let order = bits.trailing_zeros();
    if !bits.is_power_of_two() || order > MAX_REFCOUNT_ORDER {
        return Err(CreateError::RefcountBits { found: bits });
    }
    Geometry::new(cluster_bits, order, options.extended_l2)
        .map_err(|error| CreateError::Header(error.into()))
}

fn check_version(options: &CreateOptions) -> Result<(), CreateError> {
    if options.version == Version::V3 {
        return Ok(());
    }
    let bits = options.refcount_bits.to_string();
    let needed = [
        (options.refcount_bits != 16, "refcount_bits", bits.as_str()),
        (options.lazy_refcounts, "lazy_refcounts", "on"),
        (options.extended_l2, "extended_l2", "on"),
        (
            options.compression_type != CompressionType::Zlib,
            "compression_type",
            "zstd",
        ),
        (options.data_file_raw, "data_file_raw", "on"),
    ];
    if let Some((_, option, value)) = needed.into_iter().find(|(set, ..)| *set) {
        let value = value.to_owned();
        return Err(CreateError::NeedsVersion3 { option, value });
    }
    match &options.data_file {
        Some(name) => Err(CreateError::NeedsVersion3 {
            option: "data_file",
            value: name.escape_ascii().to_string(),
        }),
        None => Ok(()),
    }
}

fn check_names(options: &CreateOptions) -> Result<(), CreateError> {
    let names = [
        ("backing_file", &options.backing_file, MAX_BACKING_NAME_LEN),
        (
            "backing_fmt",
            &options.backing_format,
            MAX_BACKING_FORMAT_LEN,
        ),
        ("data_file", &options.data_file, u64::MAX),
    ];
    for (option, name, limit) in names {
        let Some(name) = name else { continue };
        let found = name.len() as u64;
        if found == 0 {
            return Err(CreateError::NameEmpty { option });
        }
        if name.contains(&0) {
            return Err(CreateError::NameWithZero { option });
        }
        if found > limit {
            return Err(CreateError::NameTooLong {
                option,
                found,
                limit,
            });
        }
    }
    Ok(())
}

fn check_files(options: &CreateOptions) -> Result<(), CreateError> {
    let overlay = options.backing_file.is_some();
    if overlay && options.backing_format.is_none() {
        return Err(CreateError::BackingFormatMissing);
    }
    if !overlay && options.backing_format.is_some() {
        return Err(CreateError::BackingFileMissing);
    }
    if options.data_file_raw && options.data_file.is_none() {
        return Err(CreateError::RawWithoutDataFile);
    }
    if options.data_file_raw && overlay {
        return Err(CreateError::RawWithBackingFile);
    }
    let preallocation = options.preallocation;
    if overlay && preallocation != Preallocation::Off && !options.extended_l2 {
        return Err(CreateError::PreallocatedOverlay { preallocation });
    }
    Ok(())
}

/// The size in whole sectors, if an L1 table can map it.
fn size(options: &CreateOptions, geometry: Geometry) -> Result<u64, CreateError> {
    let size = options.size.ok_or(CreateError::SizeMissing)?;
    let limit = (MAX_L1_BYTES / 8)
        .saturating_mul(geometry.l2_coverage())
        .min(MAX_SIZE);
    if size > limit {
        return Err(CreateError::SizeTooLarge {
            size,
            cluster_size: geometry.cluster_size(),
            extended_l2: geometry.extended_l2(),
            limit,
        });
    }
    // The limit is a multiple of 512.
    Ok(size.next_multiple_of(512))
}

fn header(options: &CreateOptions, size: u64, layout: &Layout) -> Header {
    let mut incompatible = IncompatibleFeatures::default();
    incompatible.set_external_data(options.data_file.is_some());
    incompatible.set_compression(options.compression_type != CompressionType::Zlib);
    incompatible.set_extended_l2(options.extended_l2);
    let mut compatible = CompatibleFeatures::default();
    compatible.set_lazy_refcounts(options.lazy_refcounts);
    let mut autoclear = AutoclearFeatures::default();
    autoclear.set_raw_external_data(options.data_file_raw);

    let mut extensions = Vec::new();
    if let Some(format) = &options.backing_format {
        extensions.push(Extension::BackingFormat(format.clone()));
    }
    if let Some(name) = &options.data_file {
        extensions.push(Extension::DataFileName(name.clone()));
    }
    if layout.crypto_len() > 0 {
        extensions.push(Extension::Crypto(CryptoExtension {
            offset: layout.crypto(),
            len_bytes: layout.crypto_len(),
        }));
    }
    if options.version == Version::V3 && layout.geometry().cluster_size() > FEATURE_NAMES_ABOVE {
        extensions.push(Extension::FeatureNames(FeatureName::known()));
    }
    let count = |n: u64| u32::try_from(n).expect("tables are within their limits");
    Header {
        version: options.version,
        geometry: layout.geometry(),
        virtual_size_raw: size,
        crypt_method: options.encryption.method,
        l1_table_offset: layout.l1_table(),
        l1_entries: count(layout.l1_entries()),
        refcount_table_offset: layout.refcount_table(),
        refcount_table_clusters: count(layout.refcount_table_clusters()),
        snapshot_count: 0,
        snapshot_table_offset: HostOffset::new(0),
        incompatible,
        compatible,
        autoclear,
        header_length: match options.version {
            Version::V2 => raw::Header::V2_LEN,
            Version::V3 => raw::Header::LEN,
        },
        compression_type: options.compression_type,
        padding: [0; 7],
        unknown_fields: Vec::new(),
        backing_name: options.backing_file.clone(),
        extensions,
    }
}

/// Whether everything fits in the first cluster, the end marker included: some readers want it.
fn check_space(header: &Header) -> Result<(), CreateError> {
    let payload = |extension: &Extension| match extension {
        Extension::BackingFormat(name) | Extension::DataFileName(name) => name.len(),
        Extension::FeatureNames(names) => names.len() * 48,
        Extension::Crypto(_) => 16,
        _ => 0,
    };
    let records = header.extensions.iter().map(payload);
    let needed = records.fold(u64::from(header.header_length) + 8, |sum, len| {
        sum + 8 + (len as u64).next_multiple_of(8)
    }) + header.backing_name.as_ref().map_or(0, Vec::len) as u64;
    let available = header.geometry.cluster_size();
    if needed > available {
        return Err(CreateError::HeaderSpace { needed, available });
    }
    Ok(())
}
