//! What is done to an image in its life.

use qcow2_format::header::Version;

use super::super::random::Random;
use super::model::{LIMIT, Model};

/// One operation, with all that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Write {
        offset: u64,
        len: u64,
        byte: u8,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Resize {
        size: u64,
    },
    TakeSnapshot {
        name: String,
    },
    ApplySnapshot {
        name: String,
    },
    DeleteSnapshot {
        name: String,
    },
    AddBitmap {
        name: String,
        granularity: u64,
        enabled: bool,
    },
    RemoveBitmap {
        name: String,
    },
    ClearBitmap {
        name: String,
    },
    EnableBitmap {
        name: String,
    },
    DisableBitmap {
        name: String,
    },
    MergeBitmap {
        into: String,
        from: String,
    },
    Rebase {
        to: Option<usize>,
    },
    Commit,
    AmendVersion {
        version: Version,
    },
    AmendRefcountBits {
        bits: u64,
    },
    AmendLazyRefcounts {
        on: bool,
    },
    Compact {
        sequential: bool,
    },
}

impl Deed {
    /// A deed that the image, as it is, must allow.
    pub(super) fn random(random: &mut Random, model: &Model) -> Self {
        loop {
            if let Some(deed) = Self::draw(random, model) {
                return deed;
            }
        }
    }

    fn draw(random: &mut Random, model: &Model) -> Option<Self> {
        let range = |random: &mut Random| {
            let sectors = model.size() / 512;
            let first = random.below(sectors);
            let most = if random.one_in(4) { sectors } else { 40 };
            let len = random.within(1..(sectors - first).min(most) + 1);
            (first * 512, len * 512)
        };
        let any_snapshot = |random: &mut Random| {
            let at = random.below(model.snapshots.len() as u64) as usize;
            model
                .snapshots
                .get(at)
                .map(|snapshot| snapshot.name.clone())
        };
        let any_bitmap = |random: &mut Random| {
            let at = random.below(model.bitmaps.len() as u64) as usize;
            model.bitmaps.keys().nth(at).cloned()
        };
        let v3 = model.version == Version::V3;
        let alone = model.snapshots.is_empty();
        Some(match random.below(26) {
            0..=6 => {
                let (offset, len) = range(random);
                Self::Write {
                    offset,
                    len,
                    byte: random.within(1..256) as u8,
                }
            }
            7 | 8 => {
                let (offset, len) = range(random);
                Self::Zero {
                    offset,
                    len,
                    unmap: random.one_in(2),
                }
            }
            9 | 10 if v3 || alone => Self::Resize {
                size: random.within(8..LIMIT / 512 + 1) * 512,
            },
            11 | 12 if model.snapshots.len() < 4 => Self::TakeSnapshot {
                name: model.new_name('s'),
            },
            13 => Self::ApplySnapshot {
                name: any_snapshot(random)?,
            },
            14 => Self::DeleteSnapshot {
                name: any_snapshot(random)?,
            },
            15 if v3 && model.bitmaps.len() < 4 => Self::AddBitmap {
                name: model.new_name('b'),
                granularity: 512 << random.below(8),
                enabled: !random.one_in(4),
            },
            16 => match random.below(4) {
                0 => Self::RemoveBitmap {
                    name: any_bitmap(random)?,
                },
                1 => Self::ClearBitmap {
                    name: any_bitmap(random)?,
                },
                2 => Self::EnableBitmap {
                    name: any_bitmap(random)?,
                },
                _ => Self::DisableBitmap {
                    name: any_bitmap(random)?,
                },
            },
            17 if model.bitmaps.len() > 1 => {
                let (into, from) = (any_bitmap(random)?, any_bitmap(random)?);
                if into == from {
                    return None;
                }
                Self::MergeBitmap { into, from }
            }
            // What snapshots see through the image changes with what lies below.
            18 | 19 if alone => {
                let to = random.below(3) as usize;
                Self::Rebase {
                    to: (to < 2).then_some(to),
                }
            }
            20 if alone && model.backing.is_some() => Self::Commit,
            21 if v3 && model.can_be_old() => Self::AmendVersion {
                version: Version::V2,
            },
            21 if !v3 => Self::AmendVersion {
                version: Version::V3,
            },
            22 if v3 => Self::AmendRefcountBits {
                // Of snapshots and the disk together a cluster has at most five references.
                bits: random.pick(&[4, 8, 16, 32, 64]),
            },
            23 if v3 => Self::AmendLazyRefcounts {
                on: random.one_in(2),
            },
            24 | 25 => Self::Compact {
                sequential: random.one_in(2),
            },
            _ => return None,
        })
    }

    /// QEMU can't, or does something else.
    pub(super) fn is_ours_only(&self, model: &Model) -> bool {
        match self {
            Self::Compact { .. } => true,
            // QEMU leaves bitmaps as they are, though the disk is another.
            Self::ApplySnapshot { .. } => !model.bitmaps.is_empty(),
            // What QEMU's rebase stored behind the end, in the last subcluster, comes to light when QEMU grows the disk. And version 2
            // has nothing to hide with what a longer backing file has there, so QEMU refuses.
            Self::Resize { size } => {
                let size_now = model.size();
                let is_cut = !size_now.is_multiple_of(1 << model.cluster_bits);
                let hides = model.version == Version::V2 && model.below_len() as u64 > size_now;
                *size > size_now && (is_cut || hides)
            }
            // QEMU stores no zeros then, and the new backing file shows.
            Self::Rebase { to: Some(_) } => model.version == Version::V2 && model.backing.is_none(),
            _ => false,
        }
    }
}
