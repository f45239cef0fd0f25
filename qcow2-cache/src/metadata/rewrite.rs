//! Rewriting the first cluster as a whole, such that a crash leaves the old header or the new one.
//!
//! What changes within one sector is one write. Extensions and names reach further; then the header takes a detour. The new
//! extensions are written where nothing is yet, and one write to the first sector makes the header so long that they begin
//! there: what it grows over are header fields that no one knows. Now their proper place is free to be written, and a second
//! write to the first sector takes the header back to its length. In version 2, whose header has one length only, an extension
//! that no one knows takes the place of the fields.

use std::ops::Range;

use qcow2_format::HostOffset;
use qcow2_format::header::{Extension, Header, Version};

use super::Metadata;
use crate::sync::lock;
use crate::{Kinds, MetadataError};

/// What a disk writes as a whole; bytes.
const SECTOR: usize = 512;
/// Type of the extension that fills the first sector of version 2 for a moment.
const FILLER: u32 = 0x6669_6c6c;
/// Where its payload begins: behind the header and its own type and length.
const FILLED: usize = qcow2_format::raw::Header::V2_LEN as usize + 8;

impl Metadata {
    /// Changes anything in the header: `change` makes the new one. Unknown extensions and fields stay unless `change` drops them.
    ///
    /// # Errors
    ///
    /// [`MetadataError::Header`] if the new header doesn't fit in the first cluster, before anything is written; and what
    /// the storage reports. Then the file has the old header or the new one, and memory the old one.
    ///
    /// # Durability
    ///
    /// At each moment the file has the old header or the new one; on return it is the new one, durably.
    pub fn rewrite_header(&self, change: impl FnOnce(&mut Header)) -> Result<(), MetadataError> {
        self.check_writable()?;
        let mut header = lock(&self.header);
        let mut changed = header.clone();
        change(&mut changed);
        let old = header.encode()?;
        let new = changed.encode()?;
        self.check(Kinds::MAIN_HEADER, HostOffset::new(0), new.len() as u64)?;
        self.sync()?;
        let differs = |(old, new): (&u8, &u8)| old != new;
        let mut both = old.iter().zip(&new);
        let (first, last) = (both.clone().position(differs), both.rposition(differs));
        let (Some(first), Some(last)) = (first, last) else {
            return Ok(());
        };
        let way = detour(&changed, &old, &new);
        let sector = first / SECTOR * SECTOR;
        if last - sector < SECTOR {
            self.write_part(&new, sector..new.len().min(sector + SECTOR))?;
        } else if let Some((longer, from)) = way {
            self.write_part(&longer, SECTOR..longer.len())?;
            self.write_sector(&longer)?;
            self.write_part(&new, SECTOR..from)?;
            self.write_sector(&new)?;
            self.write_part(&new, from..new.len())?;
        } else {
            // There is no room for a detour, or no way to take one.
            self.write_part(&new, 0..new.len())?;
        }
        *header = changed;
        Ok(())
    }

    fn write_sector(&self, cluster: &[u8]) -> Result<(), MetadataError> {
        self.write_part(cluster, 0..SECTOR.min(cluster.len()))
    }

    fn write_part(&self, cluster: &[u8], part: Range<usize>) -> Result<(), MetadataError> {
        let bytes = cluster.get(part.clone()).unwrap_or_default();
        self.storage.write_at(bytes, part.start as u64)?;
        self.sync()
    }
}

/// The first cluster with the new header made longer, so that its extensions lie behind all that `old` and `new` use, and where. Between
/// them it has what `old` has there, so that writing all but its first sector changes nothing that `old` means.
fn detour(changed: &Header, old: &[u8], new: &[u8]) -> Option<(Vec<u8>, usize)> {
    let used = |bytes: &[u8]| {
        bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1)
    };
    let from = used(old).max(used(new)).next_multiple_of(SECTOR);
    let known = usize::try_from(qcow2_format::raw::Header::LEN).ok()?;
    let mut longer = changed.clone();
    if changed.version == Version::V2 {
        let data = old.get(FILLED..from)?.to_vec();
        longer
            .extensions
            .insert(0, Extension::Unknown { kind: FILLER, data });
        return Some((longer.encode().ok()?, from));
    }
    longer.header_length = u32::try_from(from).ok()?;
    // What is between is not known to anyone; the old extensions do as well as anything.
    longer.unknown_fields = old.get(known..from)?.to_vec();
    Some((longer.encode().ok()?, from))
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use std::sync::Arc;

    use qcow2_format::Geometry;
    use qcow2_format::header::{
        AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, Extension,
        FeatureName, IncompatibleFeatures,
    };
    use qcow2_io::{Event, Memory, Storage, Trace, replay};

    use super::*;
    use crate::{MetadataOptions, OverlapChecks, Rules};

    fn header(cluster_bits: u32) -> Header {
        Header {
            version: Version::V3,
            geometry: Geometry::new(cluster_bits, 4, false).unwrap(),
            virtual_size_raw: 1 << 20,
            crypt_method: CryptMethod::None,
            l1_table_offset: HostOffset::new(3 << cluster_bits),
            l1_entries: 64,
            refcount_table_offset: HostOffset::new(1 << cluster_bits),
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshot_table_offset: HostOffset::new(0),
            incompatible: IncompatibleFeatures::default(),
            compatible: CompatibleFeatures::default(),
            autoclear: AutoclearFeatures::default(),
            header_length: 112,
            compression_type: CompressionType::Zlib,
            padding: [0; 7],
            unknown_fields: Vec::new(),
            backing_name: None,
            extensions: vec![
                Extension::FeatureNames(FeatureName::known()),
                Extension::Unknown {
                    kind: 0x1234_5678,
                    data: b"kept".to_vec(),
                },
            ],
        }
    }

    /// What a reader makes of it; the length of the header and unknown fields are no one's business.
    fn meaning(bytes: &[u8]) -> Header {
        let mut header = Header::decode(bytes).unwrap();
        header.header_length = 112;
        header.unknown_fields.clear();
        header
            .extensions
            .retain(|extension| extension.kind() != FILLER);
        header
    }

    fn meaning_of(header: &Header) -> Header {
        meaning(&header.encode().unwrap())
    }

    fn set_backing(header: &mut Header) {
        header.backing_name = Some(b"base.qcow2".to_vec());
        header
            .extensions
            .insert(0, Extension::BackingFormat(b"qcow2".to_vec()));
    }

    /// As `header`, in version 2 with extensions that go beyond a sector.
    fn header_v2(cluster_bits: u32) -> Header {
        Header {
            version: Version::V2,
            header_length: 72,
            extensions: vec![Extension::Unknown {
                kind: 0x1234_5678,
                data: vec![7; 600],
            }],
            ..header(cluster_bits)
        }
    }

    fn upgrade(header: &mut Header) {
        header.version = Version::V3;
        header.header_length = 112;
        header.compatible.set_lazy_refcounts(true);
    }

    fn downgrade(header: &mut Header) {
        *header = Header {
            extensions: vec![header.extensions.last().unwrap().clone()],
            ..header_v2(12)
        };
        set_backing(header);
        header.backing_name = Some(vec![b'x'; 700]);
    }

    #[test]
    fn a_crash_while_the_header_is_rewritten_leaves_the_old_or_the_new_one() {
        crash_everywhere(&header(12), set_backing);
    }

    #[test]
    fn a_crash_while_the_version_changes_leaves_the_old_or_the_new_one() {
        crash_everywhere(&header_v2(12), set_backing);
        crash_everywhere(&header_v2(12), upgrade);
        crash_everywhere(&header(12), downgrade);
    }

    fn crash_everywhere(header: &Header, change: fn(&mut Header)) {
        let trace = Arc::new(Trace::new(Memory::new()));
        trace.write_at(&header.encode().unwrap(), 0).unwrap();
        trace.flush().unwrap();
        let options = MetadataOptions {
            read_only: false,
            lazy_refcounts: false,
            overlap_checks: OverlapChecks::default(),
            l2_slice_bytes: 512,
            l2_slices: 2,
            refcount_slice_bytes: 512,
            refcount_slices: 2,
            rules: Rules::ALL,
        };
        let storage: Arc<dyn Storage> = Arc::<Trace<Memory>>::clone(&trace);
        let metadata = Metadata::new(storage, None, header.clone(), &options);
        let mut new = header.clone();
        change(&mut new);
        assert_ne!(
            header.encode().unwrap()[512..],
            new.encode().unwrap()[512..]
        );
        metadata.rewrite_header(change).unwrap();
        assert_eq!(*metadata.header(), new);

        let events = trace.events();
        let mut seen = (false, false);
        for (index, event) in events.iter().enumerate().skip(2) {
            // All before is there; of this write each sector may be there or not.
            let pieces = event.torn(512);
            let count = pieces.len().min(8);
            for subset in 0..1_u32 << count {
                let memory = Memory::new();
                replay(&events[..index], &memory).unwrap();
                let chosen = pieces.iter().enumerate();
                let chosen = chosen.filter(|(bit, _)| *bit >= count || subset & 1 << bit != 0);
                let chosen: Vec<&Event> = chosen.map(|(_, piece)| piece).collect();
                replay(chosen, &memory).unwrap();
                let mut bytes = memory.to_vec().unwrap();
                bytes.resize(4096, 0);
                let found = meaning(&bytes);
                assert!(
                    found == meaning_of(header) || found == meaning_of(&new),
                    "at event {index}"
                );
                seen.0 |= found == meaning_of(header);
                seen.1 |= found == meaning_of(&new);
            }
        }
        assert_eq!(seen, (true, true));
        let mut bytes = vec![0; 4096];
        trace.read_at(&mut bytes, 0).unwrap();
        assert_eq!(Header::decode(&bytes).unwrap(), new);
    }
}
