//! Entries of extended L2 tables whose bitmap contradicts itself or its entry.
//!
//! Which of two things that an entry says is right, its data may tell: zeros read as zeros either way, and what decodes is compressed. Where it
//! doesn't, the data stays, so that nothing is lost, and the guest range is called ambiguous.

use qcow2_format::header::CompressionType;
use qcow2_format::{ClusterKind, L2Entry};
use qcow2_io::codec::{Codec, CodecError};

use super::action::{ActionKind, Effect};
use crate::ByteRange;
use crate::image::Image;
use crate::reader::is_zero;

const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
const SUBCLUSTERS: u32 = 32;
/// Longest window of compressed data: that of the largest cluster, and a sector.
const WINDOW_MAX: u64 = (2 << 20) + 512;

/// What a contradictory entry becomes.
pub(super) struct Settled {
    pub(super) entry: L2Entry,
    pub(super) parts: Vec<Part>,
    /// Its cluster is not known, and may be one that nothing refers to.
    pub(super) hidden: bool,
}

/// What that means for a part of its cluster.
pub(super) struct Part {
    pub(super) guest: ByteRange,
    pub(super) kind: ActionKind,
    pub(super) reason: String,
    pub(super) effect: Effect,
}

/// Settles an entry that belongs at `guest`; `None` if its bitmap contradicts nothing, or its cluster is none.
pub(super) fn settle(image: &Image<'_>, guest: u64, entry: L2Entry) -> Option<Settled> {
    if !image.geometry.extended_l2() {
        return None;
    }
    match entry.kind(image.rules) {
        ClusterKind::Unallocated if entry.allocated_subclusters() != 0 => {
            Some(without_cluster(image, guest, entry))
        }
        ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
            let both = entry.allocated_subclusters() & entry.zero_subclusters();
            let usable = image.rules.external_data
                || image.geometry.is_cluster_aligned(host)
                    && image.is_inside(host.get(), image.cluster_size());
            (both != 0 && usable).then(|| both_ways(image, guest, entry, host.get()))
        }
        ClusterKind::Compressed(extent) if entry.bitmap() != 0 && !image.rules.external_data => {
            let window = (extent.offset.get(), extent.len_bytes);
            Some(compressed(image, guest, entry, window))
        }
        _ => None,
    }
}

/// Runs of set bits: the first one, and how many.
fn runs(bits: u32) -> impl Iterator<Item = (u32, u32)> {
    let mut left = bits;
    std::iter::from_fn(move || {
        (left != 0).then(|| {
            let first = left.trailing_zeros();
            let count = (!(left >> first)).trailing_zeros().min(SUBCLUSTERS - first);
            let mask = u32::MAX >> (SUBCLUSTERS - count) << first;
            left &= !mask;
            (first, count)
        })
    })
}

fn range(image: &Image<'_>, guest: u64, (first, count): (u32, u32)) -> ByteRange {
    let size = image.cluster_size() / u64::from(SUBCLUSTERS);
    ByteRange::new(
        guest.saturating_add(u64::from(first) * size),
        u64::from(count) * size,
    )
}

/// Subclusters are said to have data, and no cluster is there.
fn without_cluster(image: &Image<'_>, guest: u64, entry: L2Entry) -> Settled {
    let alloc = entry.allocated_subclusters();
    let parts = runs(alloc).map(|run| Part {
        guest: range(image, guest, run),
        kind: ActionKind::DropL2Entry,
        reason: format!("subclusters {:#x} without a cluster", entry.bitmap()),
        effect: Effect::Lost,
    });
    Settled {
        parts: parts.collect(),
        // What is in a backing file is older, and must not show through.
        entry: L2Entry::from_bits(
            entry.word(),
            u64::from(alloc | entry.zero_subclusters()) << 32,
        ),
        hidden: true,
    }
}

/// Subclusters are said to have data, and to read as zeros.
fn both_ways(image: &Image<'_>, guest: u64, entry: L2Entry, host: u64) -> Settled {
    let both = entry.allocated_subclusters() & entry.zero_subclusters();
    // What is elsewhere, or encrypted, tells nothing.
    let tells = !image.rules.external_data && !image.is_encrypted();
    let size = image.cluster_size() / u64::from(SUBCLUSTERS);
    let mut zeros = 0;
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    for index in (0..SUBCLUSTERS).filter(|index| tells && both >> index & 1 != 0) {
        let at = host.saturating_add(u64::from(index) * size);
        if image.reader.read(&mut bytes, at).is_ok() && is_zero(&bytes) {
            zeros |= 1 << index;
        }
    }
    let told = |bits: u32, words: &str, effect| {
        let words = words.to_owned();
        runs(bits).map(move |run| Part {
            guest: range(image, guest, run),
            kind: ActionKind::MendL2Entry,
            reason: format!("subclusters {both:#x} both allocated and zero; {words}"),
            effect,
        })
    };
    let same = told(zeros, "their data is zeros, so it is one", Effect::None);
    let open = told(
        both & !zeros,
        "their data is not, so that one of them is wrong; it stays",
        Effect::Ambiguous,
    );
    Settled {
        parts: same.chain(open).collect(),
        entry: L2Entry::from_bits(entry.word(), entry.bitmap() & !(u64::from(both) << 32)),
        hidden: false,
    }
}

/// Compressed data has no subclusters: either it is none, or the bitmap is wrong.
fn compressed(image: &Image<'_>, guest: u64, entry: L2Entry, window: (u64, u64)) -> Settled {
    let bitmap = entry.bitmap();
    let as_compressed = L2Entry::from_bits(entry.word() & !COPIED, 0);
    let as_normal = L2Entry::from_bits(entry.word() & !COMPRESSED, bitmap);
    let (word, why, effect, hidden) = match decodes(image, window) {
        Some(true) => (as_compressed, "its data decodes", Effect::Reachable, false),
        None => (
            as_compressed,
            "nobody can tell whether its data decodes",
            Effect::Reachable,
            false,
        ),
        Some(false) if is_sound(image, as_normal) => (
            as_normal,
            "its data does not decode, so it is not compressed",
            Effect::Reachable,
            false,
        ),
        Some(false) => (
            as_compressed,
            "its data does not decode, and nothing else makes sense",
            Effect::Ambiguous,
            true,
        ),
    };
    Settled {
        entry: word,
        parts: vec![Part {
            guest: ByteRange::new(guest, image.cluster_size()),
            kind: ActionKind::MendL2Entry,
            reason: format!("compressed, and subclusters {bitmap:#x}; {why}"),
            effect,
        }],
        hidden,
    }
}

/// Whether compressed data gives a cluster; `None` where that can't be tried.
fn decodes(image: &Image<'_>, (offset, len): (u64, u64)) -> Option<bool> {
    if offset >= image.file_len() {
        return Some(false);
    }
    let mut window = vec![0; usize::try_from(len.min(WINDOW_MAX)).ok()?];
    image.reader.read(&mut window, offset).ok()?;
    let codec = match image.header.compression_type {
        CompressionType::Zlib => Codec::Zlib,
        CompressionType::Zstd => Codec::Zstd,
    };
    let mut out = vec![0; image.geometry.cluster_len()];
    match codec.decompress(&window, &mut out) {
        Ok(()) => Some(true),
        Err(CodecError::Unavailable { .. } | CodecError::NoMemory { .. }) => None,
        Err(_) => Some(false),
    }
}

/// Whether an entry makes sense as one that has a cluster of its own.
fn is_sound(image: &Image<'_>, entry: L2Entry) -> bool {
    let alloc = entry.allocated_subclusters();
    match entry.kind(image.rules) {
        ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
            entry.reserved_bits() == 0
                && alloc != 0
                && alloc & entry.zero_subclusters() == 0
                && image.geometry.is_cluster_aligned(host)
                && image.is_inside(host.get(), image.cluster_size())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_set_bits() {
        let of = |bits| runs(bits).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(u32::MAX), [(0, 32)]);
        assert_eq!(of(0x8000_0001), [(0, 1), (31, 1)]);
        assert_eq!(of(0b0111_0110), [(1, 2), (4, 3)]);
    }
}
