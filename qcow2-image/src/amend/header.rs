//! What stands in the header, and the snapshot table that an upgrade needs.

use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, Extension, FeatureName, Header,
    IncompatibleFeatures, Version,
};
use qcow2_format::raw;

use crate::{Image, ImageError};

/// Bytes of a snapshot's extra data: sizes of machine state and disk, and a count of instructions.
const EXTRA_LEN: usize = 24;

/// Makes it a header of version 3, with no feature.
pub(super) fn upgrade(header: &mut Header) {
    header.version = Version::V3;
    header.header_length = raw::Header::LEN;
    header.padding = [0; 7];
    header.unknown_fields.clear();
    // Smaller clusters have little room, and QEMU leaves the names out.
    if header.geometry.cluster_size() <= 4096 || !header.feature_names().is_empty() {
        return;
    }
    let before = header.extensions.iter().take_while(|extension| {
        matches!(
            extension,
            Extension::BackingFormat(_) | Extension::DataFileName(_) | Extension::Crypto(_)
        )
    });
    let place = before.count();
    let names = Extension::FeatureNames(FeatureName::known());
    header.extensions.insert(place, names);
}

/// Makes it a header of version 2, which has no features and no names for them.
pub(super) fn downgrade(header: &mut Header) {
    header.version = Version::V2;
    header.header_length = raw::Header::V2_LEN;
    header.unknown_fields.clear();
    header.padding = [0; 7];
    header.incompatible = IncompatibleFeatures::default();
    header.compatible = CompatibleFeatures::default();
    header.autoclear = AutoclearFeatures::default();
    header.compression_type = CompressionType::Zlib;
    header.extensions.retain(|extension| {
        !matches!(
            extension,
            Extension::FeatureNames(_) | Extension::Bitmaps(_)
        )
    });
}

/// Gives the backing file another name and format; `None` takes them away.
pub(super) fn set_backing(header: &mut Header, name: Option<Vec<u8>>, format: Option<Vec<u8>>) {
    let extensions = &mut header.extensions;
    extensions.retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
    if let Some(format) = format {
        extensions.insert(0, Extension::BackingFormat(format));
    }
    header.backing_name = name;
}

/// Gives the data file another name; `None` takes it away.
pub(super) fn set_data_file(header: &mut Header, name: Option<Vec<u8>>) {
    let extensions = &mut header.extensions;
    extensions.retain(|extension| !matches!(extension, Extension::DataFileName(_)));
    if let Some(name) = name {
        let place = extensions
            .iter()
            .take_while(|extension| matches!(extension, Extension::BackingFormat(_)))
            .count();
        extensions.insert(place, Extension::DataFileName(name));
    }
}

impl Image {
    /// Sees to it that all snapshots say how large their disk was, as version 3 wants it.
    pub(super) fn complete_snapshots(&self) -> Result<(), ImageError> {
        let (mut snapshots, _) = self.snapshot_table()?;
        let size = self.virtual_size();
        let mut any = false;
        for snapshot in &mut snapshots {
            let words = [snapshot.vm_state_size(), size, u64::MAX];
            let all = words.map(u64::to_be_bytes);
            let len = snapshot.extra_data.len();
            let whole = len / 8 * 8;
            if len < EXTRA_LEN - 8 {
                snapshot.extra_data.truncate(whole);
                let missing = all.concat();
                snapshot
                    .extra_data
                    .extend(missing.get(whole..).unwrap_or_default());
                any = true;
            }
        }
        if !any {
            return Ok(());
        }
        self.get_ready()?;
        let place = self.place_table(&snapshots)?;
        self.switch_table(&snapshots, place)?;
        self.settle_closed()
    }
}

#[cfg(test)]
mod tests {
    use qcow2_format::header::extension::{BACKING_FORMAT, DATA_FILE_NAME, FEATURE_NAMES};

    use super::*;

    #[test]
    fn names_stand_in_the_order_of_qemu() {
        let memory = qcow2_io::Memory::new();
        let options = crate::create::CreateOptions::new(1 << 20);
        crate::Image::create(&memory, &options.version(Version::V2)).unwrap();
        let image = memory.to_vec().unwrap();
        let mut header = Header::decode(&image[..65536]).unwrap();
        set_backing(&mut header, Some(b"x".to_vec()), Some(b"raw".to_vec()));
        upgrade(&mut header);
        set_data_file(&mut header, Some(b"data".to_vec()));
        let kinds: Vec<u32> = header.extensions.iter().map(Extension::kind).collect();
        assert_eq!(kinds, [BACKING_FORMAT, DATA_FILE_NAME, FEATURE_NAMES]);
        header.encode().unwrap();
        downgrade(&mut header);
        set_data_file(&mut header, None);
        set_backing(&mut header, None, None);
        assert_eq!(header.extensions, []);
        header.encode().unwrap();
    }
}
