//! Writing a header.

use alloc::vec::Vec;

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::decode::MAX_BACKING_NAME_LEN;
use super::extension::{self, MAX_BACKING_FORMAT_LEN};
use super::{CompressionType, Extension, Header, HeaderError, Version};
use crate::raw;

impl Header {
    /// The whole first cluster: fixed header, extensions in their order, end marker, backing file name, zeros.
    ///
    /// The bytes are those QEMU would write for the same content. The end marker is left out where only that makes
    /// everything fit.
    ///
    /// # Errors
    ///
    /// [`HeaderError::NoSpace`] where it doesn't fit in the cluster, [`HeaderError::Contradiction`] where two fields
    /// say different things or version 2 can't say them, and names that are too long. What the header points at is not
    /// judged.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        self.check_consistency()?;
        let mut area = Vec::new();
        for extension in &self.extensions {
            extension.encode_into(&mut area);
        }
        let cluster_size = self.geometry.cluster_size();
        let name = self.backing_name.as_deref().unwrap_or_default();
        let without_marker = u64::from(self.header_length)
            .saturating_add(area.len() as u64)
            .saturating_add(name.len() as u64);
        let needed = without_marker.saturating_add(8);
        if needed <= cluster_size {
            extension::record(&mut area, extension::END, &[]);
        } else if without_marker > cluster_size
            || (name.is_empty() && without_marker != cluster_size)
        {
            return Err(HeaderError::NoSpace {
                needed,
                available: cluster_size,
            });
        }

        let name_offset = match name {
            [] => 0,
            _ => u64::from(self.header_length).saturating_add(area.len() as u64),
        };
        let mut out = Vec::with_capacity(self.geometry.cluster_len());
        let fixed = self.fixed(name_offset, name.len());
        let known_len = self.header_length.min(raw::Header::LEN) as usize;
        out.extend(fixed.as_bytes().iter().take(known_len));
        out.extend_from_slice(&self.unknown_fields);
        out.append(&mut area);
        out.extend_from_slice(name);
        out.resize(self.geometry.cluster_len(), 0);
        Ok(out)
    }

    fn fixed(&self, name_offset: u64, name_len: usize) -> raw::Header {
        raw::Header {
            magic: raw::Header::MAGIC,
            version: U32::new(self.version.number()),
            backing_name_offset: U64::new(name_offset),
            backing_name_len: U32::new(u32::try_from(name_len).unwrap_or(u32::MAX)),
            cluster_bits: U32::new(self.geometry.cluster_bits()),
            virtual_size: U64::new(self.virtual_size_raw),
            crypt_method: U32::new(self.crypt_method.number()),
            l1_entries: U32::new(self.l1_entries),
            l1_table_offset: U64::new(self.l1_table_offset.get()),
            refcount_table_offset: U64::new(self.refcount_table_offset.get()),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            snapshot_count: U32::new(self.snapshot_count),
            snapshot_table_offset: U64::new(self.snapshot_table_offset.get()),
            incompatible: U64::new(self.incompatible.bits()),
            compatible: U64::new(self.compatible.bits()),
            autoclear: U64::new(self.autoclear.bits()),
            refcount_order: U32::new(self.geometry.refcount_order()),
            header_length: U32::new(self.header_length),
            compression_type: self.compression_type.number(),
            padding: self.padding,
        }
    }

    fn check_consistency(&self) -> Result<(), HeaderError> {
        let cluster_size = self.geometry.cluster_size();
        let header_length = self.header_length;
        let agree = |field, found: u64, expected: u64| {
            if found == expected {
                Ok(())
            } else {
                Err(HeaderError::Contradiction {
                    field,
                    found,
                    expected,
                })
            }
        };
        match self.version {
            Version::V2 => {
                agree(
                    "header_length",
                    header_length.into(),
                    raw::Header::V2_LEN.into(),
                )?;
                agree("incompatible_features", self.incompatible.bits(), 0)?;
                agree("compatible_features", self.compatible.bits(), 0)?;
                agree("autoclear_features", self.autoclear.bits(), 0)?;
                agree("refcount_order", self.geometry.refcount_order().into(), 4)?;
            }
            Version::V3 => {
                if header_length < raw::Header::V3_MIN_LEN
                    || u64::from(header_length) > cluster_size
                {
                    return Err(HeaderError::HeaderLength {
                        found: header_length,
                        min: raw::Header::V3_MIN_LEN,
                        max: cluster_size,
                    });
                }
            }
        }
        agree(
            "incompatible_features",
            self.incompatible.extended_l2().into(),
            self.geometry.extended_l2().into(),
        )?;
        if header_length <= raw::Header::V3_MIN_LEN {
            let expected = CompressionType::Zlib.number();
            agree(
                "compression_type",
                self.compression_type.number().into(),
                expected.into(),
            )?;
        }
        agree(
            "unknown header fields",
            self.unknown_fields.len() as u64,
            header_length.saturating_sub(raw::Header::LEN).into(),
        )?;
        let name_len = self.backing_name.as_ref().map_or(0, Vec::len) as u64;
        if name_len > MAX_BACKING_NAME_LEN {
            return Err(HeaderError::BackingNameTooLong {
                found: name_len,
                limit: MAX_BACKING_NAME_LEN,
            });
        }
        for extension in &self.extensions {
            match extension {
                Extension::BackingFormat(name) if name.len() as u64 > MAX_BACKING_FORMAT_LEN => {
                    return Err(HeaderError::BackingFormatTooLong {
                        offset: 0,
                        found: name.len() as u64,
                        limit: MAX_BACKING_FORMAT_LEN,
                    });
                }
                Extension::Unknown { kind, data } if *kind == extension::END => {
                    // Readers would stop here.
                    return Err(HeaderError::Contradiction {
                        field: "header extensions",
                        found: extension::END.into(),
                        expected: data.len() as u64,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
