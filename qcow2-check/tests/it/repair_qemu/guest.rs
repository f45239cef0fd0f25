//! What a guest can read: the test's own reader, which shares no code with the repair it judges.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use qcow2_io::codec;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// What is in the backing files that the images name.
const BACKING: u8 = 7;
const BACKING_LEN: u64 = 1 << 20;

/// A cluster of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// All that leads to its content, as a hash.
    pub(crate) path: u64,
    /// Its content, as a hash; `None` where it can't be read.
    pub(crate) content: Option<u64>,
    /// What it would read as without data of its own, as a hash.
    pub(crate) empty: Option<u64>,
}

/// The clusters of a disk.
pub(crate) type Disk = Vec<Cluster>;

/// All that an image holds for guests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) active: Disk,
    /// By id and name.
    pub(crate) snapshots: BTreeMap<(Vec<u8>, Vec<u8>), Disk>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    cluster: u64,
    version: u64,
    extended: bool,
    external: bool,
    backing: bool,
    zstd: bool,
}

/// Reads everything; `None` if the header is none that could be read by.
pub(crate) fn read(bytes: &[u8]) -> Option<Guest> {
    let header = |at: u64, len: u64| number(bytes, at, len);
    let bits = header(20, 4);
    if header(0, 4) != 0x5146_49fb || !(9..=21).contains(&bits) {
        return None;
    }
    let version = header(4, 4);
    let features = if version == 3 { header(72, 8) } else { 0 };
    if features >> 5 != 0 {
        return None;
    }
    let reader = Reader {
        bytes,
        cluster: 1 << bits,
        version,
        extended: features & 0x10 != 0,
        external: features & 4 != 0,
        backing: header(8, 8) != 0 && header(16, 4) != 0,
        zstd: version == 3 && header(100, 4) > 104 && header(104, 1) == 1,
    };
    if reader.extended && bits < 14 {
        return None;
    }
    let size = header(24, 8) & !511;
    if size > 1 << 32 {
        return None;
    }
    let mut guest = Guest {
        active: reader.disk(header(40, 8), header(36, 4), size),
        ..Guest::default()
    };
    let mut at = header(64, 8);
    for _ in 0..header(60, 4).min(100) {
        let field = |offset: u64, len| number(bytes, at.saturating_add(offset), len);
        let (extra, id, name) = (field(36, 4), field(12, 2), field(14, 2));
        let start = at.saturating_add(40 + extra);
        if extra > 1024 || start + id + name > bytes.len() as u64 {
            break;
        }
        let text = |from: u64, len: u64| {
            let from = usize::try_from(from).unwrap();
            bytes[from..from + usize::try_from(len).unwrap()].to_vec()
        };
        let key = (text(start, id), text(start + id, name));
        let disk = if extra >= 16 { field(48, 8) } else { size };
        if field(0, 8).is_multiple_of(reader.cluster) && disk <= 1 << 32 {
            let content = reader.disk(field(0, 8), field(8, 4), disk);
            guest.snapshots.insert(key, content);
        }
        at = (start + id + name).next_multiple_of(8);
    }
    Some(guest)
}

/// What stands for a content.
pub(crate) fn hash(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

fn number(bytes: &[u8], offset: u64, len: u64) -> u64 {
    (offset..offset.saturating_add(len)).fold(0, |sum, at| {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        sum << 8 | u64::from(bytes.get(at).copied().unwrap_or(0))
    })
}

impl Reader<'_> {
    fn disk(&self, l1: u64, entries: u64, size: u64) -> Disk {
        let entry_size = if self.extended { 16 } else { 8 };
        let per_table = self.cluster / entry_size;
        let clusters = size.div_ceil(self.cluster);
        let hash = |content: Option<Vec<u8>>| content.map(|content| hash(&content));
        let empty = hash(Some(self.none(u64::MAX / 2)));
        let below = hash(Some(self.none(0)));
        (0..clusters)
            .map(|cluster| {
                let guest = cluster * self.cluster;
                let nothing = if guest < BACKING_LEN { below } else { empty };
                let index = cluster / per_table;
                let mut path = DefaultHasher::new();
                l1.hash(&mut path);
                let done = |path: DefaultHasher, content| Cluster {
                    path: path.finish(),
                    content,
                    empty: nothing,
                };
                if index >= entries {
                    entries.hash(&mut path);
                    return done(path, nothing);
                }
                let entry = number(self.bytes, l1.saturating_add(index * 8), 8);
                entry.hash(&mut path);
                let table = entry & OFFSET_MASK;
                if table == 0 {
                    return done(path, nothing);
                }
                if !table.is_multiple_of(self.cluster) {
                    return done(path, None);
                }
                let at = table + cluster % per_table * entry_size;
                let word = number(self.bytes, at, 8);
                let bitmap = if self.extended {
                    number(self.bytes, at + 8, 8)
                } else {
                    0
                };
                (word, bitmap).hash(&mut path);
                if word == 0 && bitmap == 0 {
                    return done(path, nothing);
                }
                done(path, hash(self.cluster(guest, word, bitmap)))
            })
            .collect()
    }

    fn none(&self, guest: u64) -> Vec<u8> {
        let byte = if self.backing && guest < BACKING_LEN {
            BACKING
        } else {
            0
        };
        vec![byte; usize::try_from(self.cluster).unwrap()]
    }

    fn raw(&self, offset: u64, len: u64) -> Vec<u8> {
        (offset..offset + len)
            .map(|at| {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                self.bytes.get(at).copied().unwrap_or(0)
            })
            .collect()
    }

    fn cluster(&self, guest: u64, word: u64, bitmap: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(self.cluster).unwrap();
        if word >> 62 & 1 == 1 {
            let offset_bits = 70 - self.cluster.trailing_zeros();
            let offset = word & ((1 << offset_bits) - 1);
            let sectors = (word & !(3 << 62)) >> offset_bits;
            if self.external || offset > self.bytes.len() as u64 {
                return None;
            }
            let window = self.raw(offset, (sectors + 1) * 512 - offset % 512);
            let mut out = vec![0; len];
            let kind = if self.zstd {
                codec::Codec::Zstd
            } else {
                codec::Codec::Zlib
            };
            kind.decompress(&window, &mut out).ok()?;
            return Some(out);
        }
        let offset = word & OFFSET_MASK;
        let allocated = offset != 0 || self.external && word >> 63 == 1;
        if allocated && !offset.is_multiple_of(self.cluster) {
            return None;
        }
        let data = |from: u64, len: u64| {
            if self.external {
                // Where it lies is all there is to know.
                (offset == guest).then(|| vec![0xee; usize::try_from(len).unwrap()])
            } else {
                Some(self.raw(offset + from, len))
            }
        };
        if !self.extended {
            return match (word & 1 == 1, allocated) {
                (true, _) if self.version == 2 => None,
                (true, _) => Some(vec![0; len]),
                (false, true) => data(0, self.cluster),
                (false, false) => Some(self.none(guest)),
            };
        }
        let (alloc, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        if alloc & zero != 0 || !allocated && alloc != 0 {
            return None;
        }
        let part = self.cluster / 32;
        let mut out = self.none(guest);
        for (index, out) in (0..32).zip(out.chunks_exact_mut(usize::try_from(part).unwrap())) {
            if zero >> index & 1 == 1 {
                out.fill(0);
            } else if alloc >> index & 1 == 1 {
                out.copy_from_slice(&data(index * part, part)?);
            }
        }
        Some(out)
    }
}
