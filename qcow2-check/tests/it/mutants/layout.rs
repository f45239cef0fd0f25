//! Where the structures of a sound image lie: just enough to damage each of them.

/// Big-endian number of `width` bytes.
pub(super) fn number(bytes: &[u8], offset: u64, width: u64) -> u64 {
    let at = usize::try_from(offset).unwrap();
    let field = &bytes[at..at + usize::try_from(width).unwrap()];
    field
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Bits of L1 and L2 entries that hold a host offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// What an L2 entry of a sound image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Unallocated,
    Data,
    ZeroPlain,
    ZeroAllocated,
    Compressed,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unallocated => "L2 entry without cluster",
            Self::Data => "L2 entry of data",
            Self::ZeroPlain => "L2 entry of zeros",
            Self::ZeroAllocated => "L2 entry of zeros with cluster",
            Self::Compressed => "L2 entry of compressed data",
        }
    }
}

/// A header extension: its type, and where its payload lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extension {
    pub(super) kind: u32,
    pub(super) payload: u64,
}

/// An entry of the snapshot table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Snapshot {
    pub(super) entry: u64,
    pub(super) l1: u64,
    pub(super) l1_size: u64,
}

/// Structures of an image, read from its bytes.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) version: u64,
    pub(super) cluster: u64,
    pub(super) extended: bool,
    pub(super) external: bool,
    pub(super) refcount_bits: u64,
    pub(super) l1: u64,
    pub(super) l1_size: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_len: u64,
}

impl<'a> Layout<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        let version = number(bytes, 4, 4);
        let features = if version == 3 {
            number(bytes, 72, 8)
        } else {
            0
        };
        let cluster = 1 << number(bytes, 20, 4);
        Self {
            bytes,
            version,
            cluster,
            extended: features & 0x10 != 0,
            external: features & 4 != 0,
            refcount_bits: if version == 3 {
                1 << number(bytes, 96, 4)
            } else {
                16
            },
            l1: number(bytes, 40, 8),
            l1_size: number(bytes, 36, 4),
            refcount_table: number(bytes, 48, 8),
            refcount_table_len: number(bytes, 56, 4) * cluster,
        }
    }

    pub(super) fn u64(&self, offset: u64) -> u64 {
        number(self.bytes, offset, 8)
    }

    /// The file's length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(super) fn extensions(&self) -> Vec<Extension> {
        let mut at = if self.version == 3 {
            number(self.bytes, 100, 4)
        } else {
            72
        };
        let mut found = Vec::new();
        loop {
            let kind = u32::try_from(number(self.bytes, at, 4)).unwrap();
            if kind == 0 {
                return found;
            }
            let len = number(self.bytes, at + 4, 4);
            found.push(Extension {
                kind,
                payload: at + 8,
            });
            at += 8 + len.next_multiple_of(8);
        }
    }

    /// The payload of the extension of this type.
    pub(super) fn extension(&self, kind: u32) -> Option<Extension> {
        self.extensions().into_iter().find(|e| e.kind == kind)
    }

    /// Host offsets of all refcount blocks.
    pub(super) fn refcount_blocks(&self) -> Vec<u64> {
        let entries = self.refcount_table_len / 8;
        (0..entries)
            .map(|i| self.u64(self.refcount_table + 8 * i))
            .filter(|b| *b != 0)
            .collect()
    }

    /// Host offset of the L2 table that entry `index` of an L1 table leads to.
    pub(super) fn l2(&self, l1: u64, index: u64) -> Option<u64> {
        let offset = self.u64(l1 + 8 * index) & OFFSET_MASK;
        (offset != 0).then_some(offset)
    }

    pub(super) fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// The first entry of each kind in a tree: where it lies.
    pub(super) fn kinds(&self, l1: u64, l1_size: u64) -> Vec<(Kind, u64)> {
        let mut found: Vec<(Kind, u64)> = Vec::new();
        for table in (0..l1_size).filter_map(|index| self.l2(l1, index)) {
            for entry in
                (table..table + self.cluster).step_by(usize::try_from(self.entry_size()).unwrap())
            {
                if entry + self.entry_size() > self.len() {
                    continue;
                }
                let kind = self.kind(entry);
                if !found.iter().any(|(k, _)| *k == kind) {
                    found.push((kind, entry));
                }
            }
        }
        found
    }

    fn kind(&self, entry: u64) -> Kind {
        let word = self.u64(entry);
        let zero = if self.extended {
            self.u64(entry + 8) >> 32 != 0
        } else {
            word & 1 != 0
        };
        let offset = word & OFFSET_MASK;
        match (word & COMPRESSED != 0, zero, offset) {
            (true, ..) => Kind::Compressed,
            (_, true, 0) => Kind::ZeroPlain,
            (_, true, _) => Kind::ZeroAllocated,
            (_, false, 0) if !(self.external && word >> 63 == 1) => Kind::Unallocated,
            _ => Kind::Data,
        }
    }

    pub(super) fn snapshots(&self) -> Vec<Snapshot> {
        let mut entry = number(self.bytes, 64, 8);
        let mut found = Vec::new();
        for _ in 0..number(self.bytes, 60, 4) {
            let field = |offset, width| number(self.bytes, entry + offset, width);
            found.push(Snapshot {
                entry,
                l1: field(0, 8),
                l1_size: field(8, 4),
            });
            let len = 40 + field(36, 4) + field(12, 2) + field(14, 2);
            entry += len.next_multiple_of(8);
        }
        found
    }
}
