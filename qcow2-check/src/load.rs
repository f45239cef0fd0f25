//! Reading the header and the tables it names, as far as the walk needs them.

use qcow2_format::header::{Header, HeaderError};
use qcow2_io::{Storage, StorageError};

use crate::bitmaps::BitmapInfo;
use crate::image::{Image, MetaRange, Tree};
use crate::reader::Reader;
use crate::snapshots::{self, SnapshotInfo};
use crate::{Code, Finding, Place, Run, Structure};

/// Bytes of a header without extensions.
const PREFIX_LEN: usize = 112;

/// What is known of an image before the walk.
pub(crate) struct Loaded<'a> {
    pub(crate) image: Image<'a>,
    pub(crate) snapshots: Vec<SnapshotInfo>,
    pub(crate) bitmaps: Vec<BitmapInfo>,
    /// What is wrong with the header, and may hide references.
    pub(crate) defects: Vec<HeaderError>,
    /// QEMU would not have got to counting.
    pub(crate) fatal: bool,
}

/// Reads the first cluster and makes a header of it.
///
/// # Errors
///
/// The finding that ends the check.
fn header(reader: &Reader<'_>) -> Result<(Header, Vec<HeaderError>, Vec<u8>), Box<Finding>> {
    let ends = |code, at, detail: String| {
        Box::new(Finding::new(
            code,
            Place::of(Structure::Header).at(at, 0),
            detail,
        ))
    };
    let unreadable =
        |error: StorageError| ends(Code::HeaderUnreadable, 0, format!("can't be read: {error}"));
    let refused = |error: HeaderError| {
        let code = match error {
            HeaderError::UnknownIncompatible { .. } => Code::FeatureUnknown,
            _ => Code::HeaderUnreadable,
        };
        ends(code, error.offset(), format!("{}: {error}", error.field()))
    };
    if reader.len() == 0 {
        return Err(ends(Code::HeaderUnreadable, 0, "the file is empty".into()));
    }
    let mut prefix = vec![0; PREFIX_LEN];
    reader.read(&mut prefix, 0).map_err(unreadable)?;
    let mut cluster = vec![0; Header::probe(&prefix).map_err(refused)?];
    reader.read(&mut cluster, 0).map_err(unreadable)?;
    let (header, defects) = Header::decode_for_check(&cluster).map_err(refused)?;
    Ok((header, defects, cluster))
}

/// Reads everything but L1 tables, L2 tables and refcounts.
pub(crate) fn load<'a>(storage: &'a dyn Storage, run: &Run<'_>) -> Option<Loaded<'a>> {
    let reader = match Reader::new(storage) {
        Ok(reader) => reader,
        Err(error) => {
            let place = Place::of(Structure::File);
            run.find(Finding::new(
                Code::HeaderUnreadable,
                place,
                error.to_string(),
            ));
            return None;
        }
    };
    let (header, defects, cluster) = match header(&reader) {
        Ok(read) => read,
        Err(finding) => {
            run.find(*finding);
            return None;
        }
    };
    for defect in &defects {
        let place = Place::of(Structure::Header).at(defect.offset(), 0);
        let code = match defect {
            HeaderError::RefcountTableEmpty => Code::RefcountTableEmpty,
            HeaderError::BackingWithRawExternal => Code::BackingWithRaw,
            HeaderError::BitmapsMissing => Code::AutoclearBitmaps,
            defect if !defect.is_refused() => Code::HeaderOdd,
            _ => Code::HeaderInvalid,
        };
        run.find(Finding::new(
            code,
            place,
            format!("{}: {defect}", defect.field()),
        ));
    }
    notes(&header, &cluster, run);
    let mut image = Image {
        geometry: header.geometry,
        rules: header.entry_rules(),
        reader,
        header,
        trees: Vec::new(),
        metadata: Vec::new(),
        as_written: run.reads_as_written(),
    };
    named_ranges(&mut image);
    let (snapshots, fatal) = snapshots::load(&mut image, run);
    let bitmaps = crate::bitmaps::load(&mut image, run);
    Some(Loaded {
        image,
        snapshots,
        bitmaps,
        defects,
        fatal,
    })
}

/// What is worth knowing of a header that is in order.
fn notes(header: &Header, cluster: &[u8], run: &Run<'_>) {
    let note = |code, at: u64, len, detail: String| {
        run.find(Finding::new(
            code,
            Place::of(Structure::Header).at(at, len),
            detail,
        ));
    };
    if header.incompatible.dirty() {
        note(
            Code::FeatureDirty,
            72,
            8,
            "incompatible feature bit 0".into(),
        );
    }
    if header.incompatible.corrupt() {
        note(
            Code::FeatureCorrupt,
            72,
            8,
            "incompatible feature bit 1".into(),
        );
    }
    if header.autoclear.unknown() != 0 {
        note(
            Code::AutoclearUnknown,
            88,
            8,
            format!("bits {:#x}", header.autoclear.unknown()),
        );
    }
    if !header.virtual_size_raw.is_multiple_of(512) {
        note(
            Code::SizeUnaligned,
            24,
            8,
            format!("{} bytes", header.virtual_size_raw),
        );
    }
    if header.bitmaps().is_some() && !header.autoclear.bitmaps() {
        note(
            Code::BitmapsUntrusted,
            88,
            8,
            "autoclear feature bit 0 is clear".into(),
        );
    }
    let odd = header
        .feature_names()
        .iter()
        .filter(|name| name.kind > 2 || name.bit > 63)
        .count();
    if odd > 0 {
        note(Code::FeatureNamesInvalid, 0, 0, format!("{odd} entries"));
    }
    if let Ok(encoded) = header.encode() {
        let differs = encoded
            .iter()
            .zip(cluster)
            .position(|(ours, theirs)| ours != theirs);
        if let Some(at) = differs {
            let at = at as u64;
            note(
                Code::HeaderJunk,
                at,
                1,
                "a rewrite would give other bytes from here on".into(),
            );
        }
    }
}

/// The ranges that the header itself names, and the active tree.
fn named_ranges(image: &mut Image<'_>) {
    let header = &image.header;
    let size = image.geometry.cluster_size();
    let mut add = |structure, offset, len| {
        image.metadata.push(MetaRange {
            structure,
            offset,
            len,
            index: None,
            weight: 1,
        });
    };
    add(Structure::Header, 0, size);
    add(
        Structure::ActiveL1,
        header.l1_table_offset.get(),
        u64::from(header.l1_entries) * 8,
    );
    add(
        Structure::RefcountTable,
        header.refcount_table_offset.get(),
        u64::from(header.refcount_table_clusters) << image.geometry.cluster_bits(),
    );
    if let Some(crypto) = header.crypto() {
        add(
            Structure::CryptoHeader,
            crypto.offset.get(),
            crypto.len_bytes,
        );
    }
    let tree = Tree {
        offset: header.l1_table_offset.get(),
        entries: entries_in_file(image, header.l1_table_offset.get(), header.l1_entries),
        active: true,
        weight: 1,
        snapshot: None,
    };
    image.trees.push(tree);
}

/// How many of an L1 table's entries lie in the file, the last one perhaps in part.
pub(crate) fn entries_in_file(image: &Image<'_>, offset: u64, entries: u32) -> u64 {
    image
        .file_len()
        .saturating_sub(offset)
        .div_ceil(8)
        .min(entries.into())
}
