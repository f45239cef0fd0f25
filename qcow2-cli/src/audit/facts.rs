//! What kind of image it is: the facts of its header.

use qcow2_format::header::{CompressionType, CryptMethod, Header};
use qcow2_format::{Snapshot, raw, snapshot};
use qcow2_io::Storage;
use serde::Serialize;

use super::text::{plural, quoted, size};

/// Bytes of a header without extensions.
const PREFIX_LEN: usize = 112;

/// What the header says of an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Facts {
    version: u32,
    pub(crate) cluster_size: u64,
    virtual_size: u64,
    file_size: u64,
    refcount_bits: u32,
    features: Vec<String>,
    compression: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<&'static str>,
    snapshots: u32,
    bitmaps: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_format: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<Name>,
}

/// A name in an image: any bytes.
#[derive(Clone, Debug)]
struct Name(Vec<u8>);

impl Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&String::from_utf8_lossy(&self.0))
    }
}

/// The header, however much is wrong with it, if it is one.
pub(crate) fn header(storage: &dyn Storage) -> Option<Header> {
    let mut prefix = [0; PREFIX_LEN];
    storage.read_at(&mut prefix, 0).ok()?;
    let mut cluster = vec![0; Header::probe(&prefix).ok()?];
    storage.read_at(&mut cluster, 0).ok()?;
    Header::decode_for_check(&cluster)
        .ok()
        .map(|(header, _)| header)
}

/// Whether it starts as a qcow2 image does.
pub(crate) fn has_magic(storage: &dyn Storage) -> bool {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0).is_ok() && magic == raw::Header::MAGIC
}

/// The names of an image's snapshots in the order of the table, as far as it can be read.
pub(crate) fn snapshot_names(storage: &dyn Storage) -> Vec<Vec<u8>> {
    let (Some(header), Ok(len)) = (header(storage), storage.len()) else {
        return Vec::new();
    };
    let start = header.snapshot_table_offset.get();
    let bytes = len.saturating_sub(start).min(snapshot::MAX_TABLE_BYTES);
    let Ok(bytes) = usize::try_from(bytes) else {
        return Vec::new();
    };
    if header.snapshot_count == 0 {
        return Vec::new();
    }
    let mut table = vec![0; bytes];
    if storage.read_at(&mut table, start).is_err() {
        return Vec::new();
    }
    snapshot::decode_table(&table, header.snapshot_count)
        .map_while(Result::ok)
        .map(|Snapshot { name, .. }| name)
        .collect()
}

impl Facts {
    /// The facts, if there is a header that can be read.
    pub(crate) fn read(storage: &dyn Storage) -> Option<Self> {
        let header = header(storage)?;
        let name = |bytes: &[u8]| Name(bytes.to_vec());
        Some(Self {
            version: header.version.number(),
            cluster_size: header.geometry.cluster_size(),
            virtual_size: header.virtual_size(),
            file_size: storage.len().ok()?,
            refcount_bits: header.geometry.refcount_bits(),
            features: features(&header),
            compression: match header.compression_type {
                CompressionType::Zlib => "zlib",
                CompressionType::Zstd => "zstd",
            },
            encryption: match header.crypt_method {
                CryptMethod::None => None,
                CryptMethod::Aes => Some("aes"),
                CryptMethod::Luks => Some("luks"),
                CryptMethod::Unknown(_) => Some("unknown"),
            },
            snapshots: header.snapshot_count,
            bitmaps: header.bitmaps().map_or(0, |bitmaps| bitmaps.count),
            backing_file: header.backing_name.as_deref().map(name),
            backing_format: header.backing_format().map(name),
            data_file: header.data_file_name().map(name),
        })
    }

    /// The facts in words, a few of them in each item.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec![
            format!("qcow2 version {}", self.version),
            format!("disk of {}", size(self.virtual_size)),
            format!("file of {}", size(self.file_size)),
            format!("clusters of {}", size(self.cluster_size)),
            format!("{}-bit refcounts", self.refcount_bits),
        ];
        words.extend(self.features.iter().cloned());
        if self.compression != "zlib" {
            words.push(self.compression.to_owned());
        }
        if let Some(method) = self.encryption {
            words.push(format!("encrypted ({method})"));
        }
        if self.snapshots > 0 {
            words.push(plural(self.snapshots.into(), "snapshot"));
        }
        if self.bitmaps > 0 {
            words.push(plural(self.bitmaps.into(), "bitmap"));
        }
        if let Some(backing) = &self.backing_file {
            let format = match &self.backing_format {
                Some(format) if format.0.iter().all(u8::is_ascii_alphanumeric) => {
                    String::from_utf8_lossy(&format.0).into_owned()
                }
                Some(format) => quoted(&format.0),
                None => "format not recorded".to_owned(),
            };
            words.push(format!("backing file {} ({format})", quoted(&backing.0)));
        }
        if let Some(data) = &self.data_file {
            words.push(format!("data file {}", quoted(&data.0)));
        }
        words
    }
}

fn features(header: &Header) -> Vec<String> {
    let known = [
        (header.incompatible.dirty(), "dirty"),
        (header.incompatible.corrupt(), "marked corrupt"),
        (header.incompatible.external_data(), "external data file"),
        (header.incompatible.extended_l2(), "extended L2"),
        (header.compatible.lazy_refcounts(), "lazy refcounts"),
        (header.autoclear.raw_external_data(), "raw external data"),
    ];
    let mut names: Vec<String> = known
        .into_iter()
        .filter(|(set, _)| *set)
        .map(|(_, name)| name.to_owned())
        .collect();
    for (kind, bits) in [
        ("compatible", header.compatible.unknown()),
        ("autoclear", header.autoclear.unknown()),
    ] {
        if bits != 0 {
            names.push(format!("unknown {kind} features {bits:#x}"));
        }
    }
    names
}
