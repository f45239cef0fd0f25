//! Header extensions and the backing file's name, read with patience.

use qcow2_format::bitmap::BitmapDirectory;
use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::header::extension::{
    BACKING_FORMAT, BITMAPS, CRYPTO, DATA_FILE_NAME, FEATURE_NAMES, MAX_BACKING_FORMAT_LEN,
};
use qcow2_format::header::{
    BitmapsExtension, CompressionType, CryptoExtension, Extension, FeatureName, Header,
};
use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, EntryRules, HostOffset, L1Entry};
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::plan::Planner;
use super::luks::luks;
use super::number;

/// Magic bytes of a Zstandard frame.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Extensions from `offset` on, read with patience: what makes no sense is stepped over.
pub(super) fn extensions(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    offset: u64,
) -> Result<Vec<Extension>, PlanError> {
    let end = match number(cluster, 8, 8) {
        0 => cluster.len(),
        end => usize::try_from(end)
            .unwrap_or(usize::MAX)
            .min(cluster.len()),
    };
    let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    while at.saturating_add(8) <= end {
        let kind = u32::try_from(number(cluster, at, 4)).unwrap_or(0);
        let len = usize::try_from(number(cluster, at + 4, 4)).unwrap_or(usize::MAX);
        let payload = |len: usize| {
            let from = at + 8;
            let to = from.checked_add(len).filter(|to| *to <= end)?;
            cluster.get(from..to)
        };
        let (extension, len) = match kind {
            CRYPTO => (
                payload(16).and_then(|_| crypto(planner, header, cluster, at + 8)),
                16,
            ),
            BITMAPS => (
                match payload(24) {
                    Some(_) => bitmaps(planner, header, cluster, at + 8)?,
                    None => None,
                },
                24,
            ),
            FEATURE_NAMES => {
                // Its names are known whatever has become of them.
                let whole = len.is_multiple_of(48) && payload(len).is_some();
                let names = Extension::FeatureNames(FeatureName::known());
                (Some(names), if whole { len } else { 0 })
            }
            BACKING_FORMAT => {
                let name = cluster.get(at + 8..end).unwrap_or_default();
                let name = name.iter().take_while(|byte| byte.is_ascii_alphanumeric());
                let name: Vec<u8> = name.copied().collect();
                let len = name.len();
                let fits = len > 0 && len as u64 <= MAX_BACKING_FORMAT_LEN;
                (fits.then_some(Extension::BackingFormat(name)), len)
            }
            DATA_FILE_NAME => (
                payload(len).map(|name| Extension::DataFileName(name.to_vec())),
                len,
            ),
            _ => (None, 0),
        };
        at += 8;
        if let Some(extension) = extension {
            found.push(extension);
            at += len.next_multiple_of(8);
        }
    }
    Ok(found)
}

fn crypto(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    at: usize,
) -> Option<Extension> {
    let offset = HostOffset::new(number(cluster, at, 8));
    let aligned = header.geometry.is_cluster_aligned(offset);
    // Where it does not lead to a LUKS header, one is searched for later.
    let known = aligned && luks(planner, offset.get()).is_some();
    known.then(|| {
        Extension::Crypto(CryptoExtension {
            offset,
            len_bytes: number(cluster, at + 8, 8),
        })
    })
}

/// The bitmaps extension, its count by the directory. `None` if there is no such directory.
fn bitmaps(
    planner: &Planner<'_, '_>,
    header: &Header,
    cluster: &[u8],
    at: usize,
) -> Result<Option<Extension>, PlanError> {
    let len = number(cluster, at + 8, 8);
    let offset = HostOffset::new(number(cluster, at + 16, 8));
    let end = offset.checked_add(len).map_or(u64::MAX, HostOffset::get);
    if len == 0 || end > planner.overlay.new_len() || !header.geometry.is_cluster_aligned(offset) {
        return Ok(None);
    }
    let limit = qcow2_format::header::extension::MAX_BITMAP_DIRECTORY_BYTES;
    if len > limit {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    planner.overlay.read_at(&mut bytes, offset.get())?;
    let max = qcow2_format::header::extension::MAX_BITMAPS;
    let count = (1..=max).find(|count| {
        let mut entries = BitmapDirectory::new(&bytes, *count);
        entries.all(|entry| entry.is_ok())
    });
    Ok(count.map(|count| {
        Extension::Bitmaps(BitmapsExtension {
            count,
            directory_len_bytes: len,
            directory_offset: offset,
        })
    }))
}

/// The backing file's name where a writer puts it: behind the extensions, up to the first zero.
pub(super) fn backing_name(header: &Header, cluster: &[u8]) -> Option<Vec<u8>> {
    let without = Header {
        backing_name: None,
        ..header.clone()
    };
    let used = without.encode().ok()?;
    let from = used.iter().rposition(|byte| *byte != 0)? + 1;
    let rest = cluster.get(from.next_multiple_of(8)..)?;
    // The end marker is all zeros.
    let start = rest.iter().position(|byte| *byte != 0)?;
    let name = rest.get(start..)?.split(|byte| *byte == 0).next()?;
    let fits = name.len() as u64 <= qcow2_format::header::MAX_BACKING_NAME_LEN;
    (start <= 16 && fits).then(|| name.to_vec())
}

/// By which codec the first compressed clusters are compressed.
pub(super) fn compression(
    planner: &Planner<'_, '_>,
    header: &Header,
) -> Result<CompressionType, PlanError> {
    let geometry = header.geometry;
    let rules = header.entry_rules();
    let l1_bytes = (u64::from(header.l1_entries) * 8).min(MAX_L1_BYTES);
    let mut l1 = vec![0; usize::try_from(l1_bytes).unwrap_or(0)];
    planner
        .overlay
        .read_at(&mut l1, header.l1_table_offset.get())?;
    let mut table = vec![0; geometry.cluster_len()];
    for word in l1.as_chunks::<8>().0 {
        let offset = L1Entry::from_be_bytes(*word).l2_table();
        let inside = offset.get() < planner.overlay.new_len();
        if offset.get() == 0 || !inside || !geometry.is_cluster_aligned(offset) {
            continue;
        }
        if let Some(found) = compression_in(planner, rules, offset.get(), &mut table)? {
            return Ok(found);
        }
    }
    Ok(CompressionType::Zlib)
}

/// By which codec the first compressed cluster of an L2 table is compressed. `room` has the size of a cluster.
pub(in super::super) fn compression_in(
    planner: &Planner<'_, '_>,
    rules: EntryRules,
    table: u64,
    room: &mut [u8],
) -> Result<Option<CompressionType>, PlanError> {
    planner.overlay.read_at(room, table)?;
    for entry in L2Table::new(room, rules.geometry).iter() {
        if let ClusterKind::Compressed(extent) = entry.kind(rules) {
            let mut magic = [0; 4];
            planner.overlay.read_at(&mut magic, extent.offset.get())?;
            return Ok(Some(if magic == ZSTD {
                CompressionType::Zstd
            } else {
                CompressionType::Zlib
            }));
        }
    }
    Ok(None)
}
