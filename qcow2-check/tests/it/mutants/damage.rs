//! All the ways in which an image is damaged, one at a time.

use std::collections::HashSet;
use std::fmt;

use super::layout::{Kind, Layout, OFFSET_MASK, number};

/// One damage.
#[derive(Clone, Debug)]
pub(crate) struct Mutant {
    /// The structure damaged.
    pub(crate) structure: &'static str,
    /// Its field.
    pub(crate) field: &'static str,
    pub(crate) change: Change,
}

/// What the damage consists of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// A number of `width` bytes is overwritten.
    Poke {
        offset: u64,
        width: u64,
        old: u64,
        new: u64,
    },
    /// The file ends at another place.
    Truncate { len: u64 },
}

impl Mutant {
    /// Whether the structure is in one base only, so that leaving a damage out means never to try it.
    pub(crate) fn is_rare(&self) -> bool {
        ["encryption extension", "LUKS key slot"].contains(&self.structure)
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.structure, self.field)?;
        match self.change {
            Change::Poke {
                offset,
                width,
                old,
                new,
            } => {
                write!(f, ": {old:#x} -> {new:#x} ({width} bytes at {offset:#x})")
            }
            Change::Truncate { len } => write!(f, ": {len:#x}"),
        }
    }
}

/// Type of the extension that points at the LUKS header.
const CRYPTO: u32 = 0x0537_be77;
/// Type of the bitmaps extension.
const BITMAPS: u32 = 0x2385_2875;

/// All damages of an image.
pub(crate) fn all(image: &[u8]) -> Vec<Mutant> {
    let mut damage = Damage {
        layout: Layout::of(image),
        mutants: Vec::new(),
        seen: HashSet::new(),
    };
    damage.header();
    damage.extensions();
    damage.refcounts();
    damage.active_tables();
    damage.snapshots();
    damage.bitmaps();
    damage.luks();
    damage.ends();
    damage.mutants
}

struct Damage<'a> {
    layout: Layout<'a>,
    mutants: Vec<Mutant>,
    /// Offsets and values that were taken already.
    seen: HashSet<(u64, u64, u64)>,
}

impl Damage<'_> {
    fn poke(&mut self, structure: &'static str, field: &'static str, at: (u64, u64), new: u64) {
        let (offset, width) = at;
        let new = new & (u64::MAX >> (64 - 8 * width));
        let old = number(self.layout.bytes, offset, width);
        if new != old && self.seen.insert((offset, width, new)) {
            let change = Change::Poke {
                offset,
                width,
                old,
                new,
            };
            self.mutants.push(Mutant {
                structure,
                field,
                change,
            });
        }
    }

    /// Damages a number.
    fn number(&mut self, structure: &'static str, field: &'static str, at: (u64, u64)) {
        let old = number(self.layout.bytes, at.0, at.1);
        let high = 1 << (8 * at.1 - 1);
        for new in [
            0,
            1,
            2,
            3,
            u64::MAX,
            old.wrapping_add(1),
            old.wrapping_sub(1),
            old ^ high,
            old << 8,
            old ^ 8,
        ] {
            self.poke(structure, field, at, new);
        }
    }

    /// Flips each bit by itself.
    fn flip(&mut self, structure: &'static str, field: &'static str, at: (u64, u64)) {
        let old = number(self.layout.bytes, at.0, at.1);
        for bit in 0..8 * at.1 {
            self.poke(structure, field, at, old ^ 1 << bit);
        }
    }

    /// Lets a pointer lead to every other structure, and away. Its bits outside of `mask` stay as they are.
    fn point(&mut self, structure: &'static str, field: &'static str, offset: u64, mask: u64) {
        let at = (offset, 8);
        let old = self.layout.u64(offset);
        let Layout {
            cluster,
            l1,
            refcount_table,
            ..
        } = self.layout;
        let end = self.layout.len().next_multiple_of(cluster);
        let target = old & mask;
        let l2 = self.layout.l2(l1, 0).unwrap_or(l1);
        let data = self.layout.kinds(l1, self.layout.l1_size);
        let mut targets = vec![
            0,
            refcount_table,
            self.layout.refcount_blocks()[0],
            l1,
            l2,
            offset & !(cluster - 1),
            end - cluster,
            end,
            end + cluster,
            end + 16 * cluster,
            1 << 40,
            1 << 55,
            (1 << 56) - cluster,
            1 << 62,
            target.wrapping_add(512),
            target.wrapping_add(cluster),
            target.wrapping_sub(cluster),
        ];
        targets.extend(
            data.iter()
                .map(|(_, entry)| self.layout.u64(*entry) & OFFSET_MASK),
        );
        for new in targets {
            self.poke(structure, field, at, old & !mask | new);
            if old & !mask != 0 {
                self.poke(structure, field, at, new);
            }
        }
        for new in [1, u64::MAX, 1 << 63] {
            self.poke(structure, field, at, new);
        }
    }

    fn header(&mut self) {
        const FIELDS: &[(&str, u64, u64)] = &[
            ("magic", 0, 4),
            ("version", 4, 4),
            ("backing file size", 16, 4),
            ("cluster bits", 20, 4),
            ("virtual size", 24, 8),
            ("encryption method", 32, 4),
            ("L1 size", 36, 4),
            ("refcount table clusters", 56, 4),
            ("snapshot count", 60, 4),
            ("refcount order", 96, 4),
            ("header length", 100, 4),
            ("compression type", 104, 1),
            ("padding", 105, 1),
        ];
        const POINTERS: &[(&str, u64)] = &[
            ("backing file offset", 8),
            ("L1 table offset", 40),
            ("refcount table offset", 48),
            ("snapshot table offset", 64),
        ];
        let end = if self.layout.version == 3 { 112 } else { 72 };
        for (field, offset, width) in FIELDS.iter().filter(|(_, offset, _)| *offset < end) {
            self.number("header", field, (*offset, *width));
        }
        let cluster = self.layout.cluster;
        for size in [
            511,
            513,
            cluster - 1,
            cluster + 1,
            cluster * cluster,
            1 << 40,
            1 << 56,
        ] {
            self.poke("header", "virtual size", (24, 8), size);
        }
        for bits in 8..=22 {
            self.poke("header", "cluster bits", (20, 4), bits);
        }
        for order in 0..=7 {
            if self.layout.version == 3 {
                self.poke("header", "refcount order", (96, 4), order);
            }
        }
        for l1_size in [512, 1 << 16, (1 << 22) + 1] {
            self.poke("header", "L1 size", (36, 4), l1_size);
        }
        for (field, offset) in POINTERS {
            self.point("header", field, *offset, u64::MAX);
        }
        for offset in [self.layout.cluster - 1, self.layout.cluster, 64, 112, 120] {
            self.poke("header", "backing file offset", (8, 8), offset);
        }
        for clusters in [(8 << 20) / cluster, (8 << 20) / cluster + 1] {
            self.poke("header", "refcount table clusters", (56, 4), clusters);
        }
        for count in [4, 100, 65536, 65537] {
            self.poke("header", "snapshot count", (60, 4), count);
        }
        if self.layout.version == 3 {
            for length in [
                72,
                104,
                105,
                108,
                112,
                120,
                128,
                cluster - 8,
                cluster,
                cluster + 8,
            ] {
                self.poke("header", "header length", (100, 4), length);
            }
            self.flip("header", "incompatible features", (72, 8));
            for bit in [0, 1, 63] {
                let old = self.layout.u64(80);
                self.poke("header", "compatible features", (80, 8), old ^ 1 << bit);
            }
            for bit in [0, 1, 2, 63] {
                let old = self.layout.u64(88);
                self.poke("header", "autoclear features", (88, 8), old ^ 1 << bit);
            }
        }
    }

    fn extensions(&mut self) {
        for extension in self.layout.extensions() {
            let payload = extension.payload;
            for kind in [
                0,
                1,
                0xe279_2aca,
                0x6803_f857,
                CRYPTO.into(),
                BITMAPS.into(),
                0x4441_5441,
            ] {
                self.poke("header extension", "type", (payload - 8, 4), kind);
            }
            self.number("header extension", "length", (payload - 4, 4));
            for length in [
                16,
                24,
                1024,
                self.layout.cluster - payload,
                self.layout.cluster,
            ] {
                self.poke("header extension", "length", (payload - 4, 4), length);
            }
            self.number("header extension", "first byte of payload", (payload, 1));
            match extension.kind {
                CRYPTO => {
                    self.point("encryption extension", "offset", payload, u64::MAX);
                    self.number("encryption extension", "length", (payload + 8, 8));
                    for length in [592, 4096, 1 << 20, 1 << 30, 1 << 62] {
                        self.poke("encryption extension", "length", (payload + 8, 8), length);
                    }
                }
                BITMAPS => {
                    self.number("bitmaps extension", "count", (payload, 4));
                    self.number("bitmaps extension", "reserved", (payload + 4, 4));
                    self.number("bitmaps extension", "directory size", (payload + 8, 8));
                    self.point(
                        "bitmaps extension",
                        "directory offset",
                        payload + 16,
                        u64::MAX,
                    );
                }
                _ => {}
            }
        }
    }

    fn refcounts(&mut self) {
        let table = self.layout.refcount_table;
        for index in 0..2 {
            self.point("refcount table", "entry", table + 8 * index, u64::MAX);
        }
        self.flip("refcount table", "entry", (table, 8));
        let last = table + self.layout.refcount_table_len - 8;
        self.point("refcount table", "last entry", last, u64::MAX);

        let block = self.layout.refcount_blocks()[0];
        let bits = self.layout.refcount_bits;
        let clusters = self.layout.len().div_ceil(self.layout.cluster);
        let width = bits.div_ceil(8);
        for cluster in (0..clusters.min(24)).chain([clusters, clusters + 1]) {
            let offset = block + cluster * bits / 8;
            if (offset - block) + width > self.layout.cluster {
                continue;
            }
            self.number("refcount block", "entry", (offset, width));
            if bits < 8 {
                self.flip("refcount block", "entry", (offset, width));
            }
        }
    }

    fn active_tables(&mut self) {
        let Layout { l1, l1_size, .. } = self.layout;
        self.point("L1 table", "first entry", l1, OFFSET_MASK);
        self.flip("L1 table", "first entry", (l1, 8));
        self.point(
            "L1 table",
            "last entry",
            l1 + 8 * (l1_size - 1),
            OFFSET_MASK,
        );
        self.tree("active", l1, l1_size);
    }

    fn tree(&mut self, tree: &str, l1: u64, l1_size: u64) {
        for (kind, entry) in self.layout.kinds(l1, l1_size) {
            let (word, bitmap) = if tree == "active" {
                ("active entry", "subclusters of an active entry")
            } else {
                ("snapshot's entry", "subclusters of a snapshot's entry")
            };
            self.flip(kind.name(), word, (entry, 8));
            if kind == Kind::Compressed {
                self.point(kind.name(), word, entry, (1 << 48) - 1);
                self.number(kind.name(), word, (entry, 8));
            } else {
                self.point(kind.name(), word, entry, OFFSET_MASK);
            }
            if self.layout.extended {
                let words = [
                    0,
                    1,
                    1 << 31,
                    1 << 32,
                    1 << 63,
                    0xffff_ffff,
                    0xffff_ffff_0000_0000,
                    0x0000_0001_0000_0001,
                    0x8000_0000_8000_0000,
                    0x0000_ffff_ffff_0000,
                    u64::MAX,
                ];
                for new in words {
                    self.poke(kind.name(), bitmap, (entry + 8, 8), new);
                }
            }
        }
    }

    fn snapshots(&mut self) {
        const FIELDS: &[(&str, u64, u64)] = &[
            ("L1 size", 8, 4),
            ("id length", 12, 2),
            ("name length", 14, 2),
            ("date", 16, 4),
            ("VM clock", 24, 8),
            ("VM state size", 32, 4),
            ("extra data length", 36, 4),
            ("64-bit VM state size", 40, 8),
            ("disk size", 48, 8),
            ("instruction count", 56, 8),
            ("first byte of id", 64, 1),
            ("first byte of name", 65, 1),
        ];
        for snapshot in self.layout.snapshots() {
            self.point(
                "snapshot table",
                "L1 table offset",
                snapshot.entry,
                u64::MAX,
            );
            for (field, offset, width) in FIELDS {
                self.number("snapshot table", field, (snapshot.entry + offset, *width));
            }
            for length in [8, 16, 32, 1024, 1025] {
                self.poke(
                    "snapshot table",
                    "extra data length",
                    (snapshot.entry + 36, 4),
                    length,
                );
            }
            for l1_size in [4096, 1 << 22, (1 << 22) + 1] {
                self.poke(
                    "snapshot table",
                    "L1 size",
                    (snapshot.entry + 8, 4),
                    l1_size,
                );
            }
            self.point("snapshot L1 table", "first entry", snapshot.l1, OFFSET_MASK);
            self.tree("snapshot", snapshot.l1, snapshot.l1_size);
        }
    }

    fn bitmaps(&mut self) {
        const FIELDS: &[(&str, u64, u64)] = &[
            ("table size", 8, 4),
            ("flags", 12, 4),
            ("type", 16, 1),
            ("granularity", 17, 1),
            ("name length", 18, 2),
            ("extra data length", 20, 4),
            ("first byte of name", 24, 1),
        ];
        let Some(extension) = self.layout.extension(BITMAPS) else {
            return;
        };
        let mut entry = self.layout.u64(extension.payload + 16);
        for _ in 0..number(self.layout.bytes, extension.payload, 4) {
            self.point("bitmap directory", "table offset", entry, u64::MAX);
            for (field, offset, width) in FIELDS {
                self.number("bitmap directory", field, (entry + offset, *width));
            }
            for granularity in [8, 9, 31, 32, 63, 64] {
                self.poke(
                    "bitmap directory",
                    "granularity",
                    (entry + 17, 1),
                    granularity,
                );
            }
            let table = self.layout.u64(entry);
            let slots = number(self.layout.bytes, entry + 8, 4);
            for index in [0, slots - 1] {
                self.point("bitmap table", "entry", table + 8 * index, OFFSET_MASK);
                self.flip("bitmap table", "entry", (table + 8 * index, 8));
                let data = self.layout.u64(table + 8 * index) & OFFSET_MASK;
                if data != 0 {
                    self.number(
                        "bitmap data",
                        "last byte",
                        (data + self.layout.cluster - 1, 1),
                    );
                }
            }
            let len = 24 + number(self.layout.bytes, entry + 18, 2);
            entry += len.next_multiple_of(8);
        }
    }

    fn luks(&mut self) {
        const FIELDS: &[(&str, u64, u64)] = &[
            ("magic", 0, 4),
            ("version", 6, 2),
            ("cipher name", 8, 8),
            ("cipher name's end", 39, 1),
            ("cipher mode", 40, 8),
            ("cipher mode's end", 71, 1),
            ("hash", 72, 8),
            ("hash's end", 103, 1),
            ("payload offset", 104, 4),
            ("key length", 108, 4),
            ("key digest", 112, 8),
            ("salt", 132, 8),
            ("UUID", 168, 8),
        ];
        let Some(extension) = self.layout.extension(CRYPTO) else {
            return;
        };
        let header = self.layout.u64(extension.payload);
        for (field, offset, width) in FIELDS {
            self.number("LUKS header", field, (header + offset, *width));
        }
        for iterations in [0, 1, 2, 999] {
            self.poke("LUKS header", "iterations", (header + 164, 4), iterations);
        }
        for slot in 0..3 {
            let at = header + 208 + 48 * slot;
            self.number("LUKS key slot", "state", (at, 4));
            for iterations in [0, 1, 2, 999] {
                self.poke("LUKS key slot", "iterations", (at + 4, 4), iterations);
            }
            self.number("LUKS key slot", "salt", (at + 8, 8));
            self.number("LUKS key slot", "key offset", (at + 40, 4));
            self.number("LUKS key slot", "stripes", (at + 44, 4));
        }
    }

    /// Other ends of the file.
    fn ends(&mut self) {
        let cluster = self.layout.cluster;
        let len = self.layout.len();
        let mut ends = vec![
            0, 3, 4, 8, 50, 71, 72, 100, 103, 104, 111, 112, 500, 511, 512,
        ];
        let clusters = len.div_ceil(cluster);
        let step = (clusters / 24).max(1);
        for end in (0..=clusters + 2).filter(|n| n % step == 0 || n + 3 > clusters) {
            let end = end * cluster;
            ends.extend([
                end,
                end + 1,
                end + 512,
                end.saturating_sub(1),
                end + cluster / 2,
            ]);
        }
        ends.push(1 << 30);
        ends.sort_unstable();
        ends.dedup();
        for len in ends.into_iter().filter(|end| *end != len) {
            let change = Change::Truncate { len };
            self.mutants.push(Mutant {
                structure: "file",
                field: "end",
                change,
            });
        }
    }
}
