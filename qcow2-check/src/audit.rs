//! What is dangerous about an image, though it may be consistent.

use qcow2_format::header::CryptMethod;
use qcow2_io::ExtentKind;

use crate::image::{Image, MetaRange};
use crate::load::Loaded;
use crate::walk::{L1Scan, Tally};
use crate::{Code, Finding, Place, Run, Structure};

/// Disks beyond this are absurd: larger than file systems of today are made.
const DISK_BYTES_SANE: u64 = 256 << 40;
/// A table may reach this far past the end of the file before it is called absurd.
const TABLE_PAST_END_SANE: u64 = 1 << 20;
/// References to one table beyond this are no accident.
const FAN_IN_SANE: u64 = 1000;
/// More snapshots than this take long to walk.
const SNAPSHOTS_SANE: u64 = 1000;
/// Formats that backing files have.
const FORMATS: [&[u8]; 12] = [
    b"qcow2",
    b"raw",
    b"qcow",
    b"qed",
    b"vmdk",
    b"vdi",
    b"vpc",
    b"vhdx",
    b"parallels",
    b"luks",
    b"bochs",
    b"file",
];

/// Looks for data behind the image's last cluster.
pub(crate) fn file_end(image: &Image<'_>, end_cluster: u64, run: &Run<'_>) {
    let end = end_cluster.saturating_mul(image.cluster_size());
    let len = image.file_len();
    if end >= len {
        return;
    }
    let mut from = end;
    let mut data = 0_u64;
    let mut first = None;
    // A look at the first extents is enough to know.
    if let Ok(extents) = image.reader.storage().extents(from..len, 64) {
        for extent in extents {
            if extent.kind == ExtentKind::Data {
                data = data.saturating_add(extent.len);
                first = first.or(Some(from.max(extent.offset)));
            }
            from = extent.end();
        }
    }
    if let Some(first) = first {
        let place = Place::of(Structure::File).at(first, data);
        let detail = format!("the image ends at {end:#x}, the file at {len:#x}");
        run.find(Finding::new(Code::DataPastImage, place, detail));
    }
}

/// Everything that may harm who opens or uses the image.
pub(crate) fn hazards(loaded: &Loaded<'_>, scan: &L1Scan, tally: &Tally, run: &Run<'_>) {
    let image = &loaded.image;
    let header = &image.header;
    let hazard = |code, place: Place, detail: String| run.find(Finding::new(code, place, detail));
    let in_header = || Place::of(Structure::Header);
    backing(image, run);
    if let Some(name) = header.data_file_name() {
        let code = if header.incompatible.external_data() {
            Code::ExternalData
        } else {
            Code::ExternalNameUnused
        };
        hazard(
            code,
            in_header(),
            format!("data file {:?}", String::from_utf8_lossy(name)),
        );
    } else if header.incompatible.external_data() {
        hazard(
            Code::ExternalDataUnnamed,
            in_header(),
            "no data file name".into(),
        );
    }
    let disk = header.virtual_size();
    if disk > DISK_BYTES_SANE {
        hazard(
            Code::HugeDisk,
            in_header().at(24, 8),
            format!("{disk} bytes"),
        );
    }
    for range in &image.metadata {
        huge_table(image, range, run);
    }
    for table in scan
        .duplicates
        .iter()
        .filter(|table| table.weight > FAN_IN_SANE)
    {
        let detail = format!("{} L1 entries lead to this L2 table", table.weight);
        hazard(Code::FanIn, image.table_place(table), detail);
    }
    for tree in image.trees.iter().filter(|tree| tree.weight > FAN_IN_SANE) {
        let place = Place::of(Structure::SnapshotL1)
            .at(tree.offset, 0)
            .snapshot(tree.snapshot);
        hazard(
            Code::FanIn,
            place,
            format!("{} snapshots have this L1 table", tree.weight),
        );
    }
    let snapshots = loaded.snapshots.len() as u64;
    if snapshots.max(header.snapshot_count.into()) > SNAPSHOTS_SANE {
        let detail = format!("{} snapshots", header.snapshot_count);
        hazard(
            Code::ManySnapshots,
            Place::of(Structure::SnapshotTable),
            detail,
        );
    }
    if header.crypt_method == CryptMethod::Aes {
        hazard(
            Code::CryptoLegacy,
            in_header().at(32, 4),
            "crypt_method 1".into(),
        );
    }
    if tally.clear_text > 0 {
        let detail = format!("{} compressed L2 entries", tally.clear_text);
        let finding = Finding::new(
            Code::CompressedEncrypted,
            Place::of(Structure::ActiveL1),
            detail,
        );
        run.find(finding.times(tally.clear_text));
    }
    crate::crypto::hazards(image, run);
}

fn huge_table(image: &Image<'_>, range: &MetaRange, run: &Run<'_>) {
    let past = range
        .offset
        .saturating_add(range.len)
        .saturating_sub(image.file_len());
    if past > TABLE_PAST_END_SANE && range.structure != Structure::Header {
        let detail = format!(
            "{} bytes from {:#x} on, the file ends at {:#x}",
            range.len,
            range.offset,
            image.file_len()
        );
        run.find(Finding::new(Code::HugeTable, range.place(), detail));
    }
}

/// Judges the backing file's name and format, without looking for the file.
fn backing(image: &Image<'_>, run: &Run<'_>) {
    let header = &image.header;
    let Some(name) = &header.backing_name else {
        return;
    };
    let text = String::from_utf8_lossy(name);
    let place = Place::of(Structure::Header);
    let hazard = |code| {
        run.find(Finding::new(
            code,
            place.clone(),
            format!("backing file {text:?}"),
        ));
    };
    hazard(Code::BackingReference);
    let name_kind = BackingName::of(name);
    match name_kind {
        BackingName::Protocol => hazard(Code::BackingProtocol),
        BackingName::Absolute => hazard(Code::BackingAbsolute),
        BackingName::Escaping => hazard(Code::BackingEscapes),
        BackingName::Beside => {}
    }
    if std::str::from_utf8(name).is_err() || name.iter().any(u8::is_ascii_control) {
        hazard(Code::BackingOddName);
    }
    match header.backing_format() {
        None => hazard(Code::BackingProbed),
        Some(format) if !FORMATS.contains(&format) => {
            let detail = format!("format {:?}", String::from_utf8_lossy(format));
            run.find(Finding::new(Code::BackingFormatOdd, place.clone(), detail));
        }
        Some(_) => {}
    }
}

/// Where a backing file's name leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BackingName {
    /// `json:`, `nbd:` and the like.
    Protocol,
    /// From the root of the file system.
    Absolute,
    /// Out of the image's directory by `..`.
    Escaping,
    /// In the image's directory or below.
    Beside,
}

impl BackingName {
    /// Sorts a name as QEMU would read it: a colon before the first slash makes a protocol.
    pub(crate) fn of(name: &[u8]) -> Self {
        let first = name.split(|byte| *byte == b'/').next().unwrap_or_default();
        if first.contains(&b':') {
            return Self::Protocol;
        }
        if name.first() == Some(&b'/') {
            return Self::Absolute;
        }
        let mut depth = 0_u32;
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => match depth.checked_sub(1) {
                    Some(up) => depth = up,
                    None => return Self::Escaping,
                },
                _ => depth += 1,
            }
        }
        Self::Beside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_by_where_they_lead() {
        for (name, kind) in [
            (&b"base.qcow2"[..], BackingName::Beside),
            (b"./sub/../base.qcow2", BackingName::Beside),
            (b"sub/../../base.qcow2", BackingName::Escaping),
            (b"../base.qcow2", BackingName::Escaping),
            (b"/etc/passwd", BackingName::Absolute),
            (b"json:{\"driver\":\"raw\"}", BackingName::Protocol),
            (b"nbd://host/disk", BackingName::Protocol),
            (b"./odd:name", BackingName::Beside),
        ] {
            assert_eq!(
                BackingName::of(name),
                kind,
                "{}",
                String::from_utf8_lossy(name)
            );
        }
    }
}
