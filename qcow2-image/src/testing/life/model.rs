//! What an image should be: plain bytes, and sets of numbers.

use std::collections::{BTreeMap, BTreeSet};

use qcow2_format::header::Version;

use super::super::random::Random;
use super::deed::Deed;

/// No disk is larger; bytes.
pub(super) const LIMIT: u64 = 384 << 10;

/// A snapshot and its disk.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) name: String,
    pub(super) disk: Vec<u8>,
}

/// A bitmap.
#[derive(Clone, Debug)]
pub(super) struct Bits {
    pub(super) granularity: u64,
    pub(super) enabled: bool,
    /// The numbers of the bits that are set.
    pub(super) dirty: BTreeSet<u64>,
}

impl Bits {
    fn mark(&mut self, start: u64, end: u64) {
        if self.enabled && start < end {
            self.dirty
                .extend(start / self.granularity..end.div_ceil(self.granularity));
        }
    }
}

/// All that can be said of an image.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) cluster_bits: u32,
    pub(super) extended_l2: bool,
    pub(super) version: Version,
    pub(super) refcount_bits: u64,
    pub(super) lazy_refcounts: bool,
    pub(super) disk: Vec<u8>,
    pub(super) snapshots: Vec<Kept>,
    pub(super) bitmaps: BTreeMap<String, Bits>,
    /// Which of the bases it lies over.
    pub(super) backing: Option<usize>,
    /// What the bases hold.
    pub(super) bases: [Vec<u8>; 2],
    names: u64,
}

impl Model {
    pub(super) fn random(random: &mut Random) -> Self {
        let base = |random: &mut Random| {
            let mut bytes = Vec::new();
            let len = random.within(1..LIMIT / 512 + 1) * 512;
            while (bytes.len() as u64) < len {
                let run = random.within(1..64) as usize * 512;
                let byte = if random.one_in(3) {
                    0
                } else {
                    random.below(256) as u8
                };
                bytes.extend(std::iter::repeat_n(byte, run));
            }
            bytes.truncate(len as usize);
            bytes
        };
        let first = base(random);
        // The other one has much in common with it.
        let mut second = first.clone();
        let at = random.below(second.len() as u64) as usize;
        let other = base(random);
        let end = second.len().min(at + other.len());
        second[at..end].copy_from_slice(&other[..end - at]);
        let extended_l2 = random.one_in(4);
        let backing = (!random.one_in(3)).then_some(0);
        let size = random.within(8..LIMIT / 512 + 1) * 512;
        let mut disk = if backing.is_some() {
            first.clone()
        } else {
            Vec::new()
        };
        disk.resize(size as usize, 0);
        Self {
            cluster_bits: if extended_l2 {
                random.pick(&[14, 16])
            } else {
                random.pick(&[9, 10, 12, 16])
            },
            extended_l2,
            version: Version::V3,
            refcount_bits: random.pick(&[4, 8, 16, 64]),
            lazy_refcounts: random.one_in(4),
            disk,
            snapshots: Vec::new(),
            bitmaps: BTreeMap::new(),
            backing,
            bases: [first, second],
            names: 0,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.disk.len() as u64
    }

    /// What it is at the beginning, in words.
    pub(super) fn birth(&self) -> String {
        format!(
            "{} bytes, clusters of {}, extended L2 {}, {} refcount bits, lazy {}, over {:?}",
            self.size(),
            1 << self.cluster_bits,
            self.extended_l2,
            self.refcount_bits,
            self.lazy_refcounts,
            self.backing
        )
    }

    /// A name that nothing had before.
    pub(super) fn new_name(&self, kind: char) -> String {
        format!("{kind}{}", self.names)
    }

    /// Whether version 2 can express it.
    pub(super) fn can_be_old(&self) -> bool {
        let sizes = self.snapshots.iter();
        self.bitmaps.is_empty()
            && self.refcount_bits == 16
            && !self.extended_l2
            && sizes.clone().all(|kept| kept.disk.len() == self.disk.len())
    }

    /// The disk over a base.
    fn below(&self) -> &[u8] {
        match self.backing {
            Some(number) => &self.bases[number],
            None => &[],
        }
    }

    fn mark(&mut self, start: u64, end: u64) {
        for bits in self.bitmaps.values_mut() {
            bits.mark(start, end);
        }
    }

    /// Does what was done to the image.
    pub(super) fn follow(&mut self, deed: &Deed) {
        self.names += 1;
        match deed {
            Deed::Write { offset, len, byte } => {
                self.disk[*offset as usize..(offset + len) as usize].fill(*byte);
                self.mark(*offset, offset + len);
            }
            Deed::Zero { offset, len, .. } => {
                self.disk[*offset as usize..(offset + len) as usize].fill(0);
                self.mark(*offset, offset + len);
            }
            Deed::Resize { size } => self.resize(*size),
            Deed::TakeSnapshot { name } => self.snapshots.push(Kept {
                name: name.clone(),
                disk: self.disk.clone(),
            }),
            Deed::ApplySnapshot { name } => {
                if let Some(kept) = self.snapshots.iter().find(|kept| kept.name == *name) {
                    let new = kept.disk.clone();
                    self.apply(new);
                }
            }
            Deed::DeleteSnapshot { name } => self.snapshots.retain(|kept| kept.name != *name),
            Deed::AddBitmap {
                name,
                granularity,
                enabled,
            } => {
                self.bitmaps.insert(
                    name.clone(),
                    Bits {
                        granularity: *granularity,
                        enabled: *enabled,
                        dirty: BTreeSet::new(),
                    },
                );
            }
            Deed::RemoveBitmap { name } => {
                self.bitmaps.remove(name);
            }
            Deed::ClearBitmap { name } => self.change(name, |bits| bits.dirty.clear()),
            Deed::EnableBitmap { name } => self.change(name, |bits| bits.enabled = true),
            Deed::DisableBitmap { name } => self.change(name, |bits| bits.enabled = false),
            Deed::MergeBitmap { into, from } => {
                let (size, from) = (self.size(), self.bitmaps[from].clone());
                self.change(into, |bits| {
                    let enabled = std::mem::replace(&mut bits.enabled, true);
                    for number in from.dirty {
                        let start = number * from.granularity;
                        bits.mark(start, (start + from.granularity).min(size));
                    }
                    bits.enabled = enabled;
                });
            }
            Deed::Rebase { to } => self.backing = *to,
            Deed::Commit => {
                if let Some(number) = self.backing {
                    let base = &mut self.bases[number];
                    base.resize(base.len().max(self.disk.len()), 0);
                    base[..self.disk.len()].copy_from_slice(&self.disk);
                }
            }
            Deed::AmendVersion { version } => {
                self.version = *version;
                self.lazy_refcounts &= *version == Version::V3;
            }
            Deed::AmendRefcountBits { bits } => self.refcount_bits = *bits,
            Deed::AmendLazyRefcounts { on } => self.lazy_refcounts = *on,
            Deed::Compact { .. } => {}
        }
    }

    fn change(&mut self, name: &str, change: impl FnOnce(&mut Bits)) {
        if let Some(bits) = self.bitmaps.get_mut(name) {
            change(bits);
        }
    }

    fn resize(&mut self, size: u64) {
        self.disk.resize(size as usize, 0);
        for bits in self.bitmaps.values_mut() {
            bits.dirty.retain(|number| number * bits.granularity < size);
        }
    }

    fn apply(&mut self, new: Vec<u8>) {
        let old = std::mem::replace(&mut self.disk, new);
        let size = self.size();
        self.resize(size);
        for start in (0..size).step_by(512) {
            let range = start as usize..(start + 512).min(size) as usize;
            let before = old.get(range.clone());
            if before != Some(&self.disk[range]) {
                self.mark(start, (start + 512).min(size));
            }
        }
    }

    /// Bytes of the base that the disk reads through to.
    pub(super) fn below_len(&self) -> usize {
        self.below().len()
    }
}
