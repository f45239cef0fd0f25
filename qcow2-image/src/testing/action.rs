//! What a guest, or who manages its disk, can do; and sequences of it.

use std::ops::Range;

use crate::create::Preallocation;

use super::content::Content;
use super::random::Random;
use super::shape::{PREALLOCATIONS, Scale, Shape};

/// One thing done to a disk. Ranges that reach past the end of the disk are cut there when they are played, so that an
/// action may be left out and the rest still means something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Bytes are written.
    Write {
        /// Where.
        range: Range<u64>,
        /// What.
        content: Content,
        /// From how many buffers.
        pieces: u8,
    },
    /// Whole clusters are written in compressed form.
    Pack {
        /// Where; it starts with a cluster.
        range: Range<u64>,
        /// What.
        content: Content,
    },
    /// A range is made to read as zeros.
    Zero {
        /// Where.
        range: Range<u64>,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// A range is given back; all of it reads as zeros then.
    Discard {
        /// Where.
        range: Range<u64>,
    },
    /// A range is given back as QEMU does it for guests: whole clusters only.
    DiscardWhole {
        /// Where.
        range: Range<u64>,
    },
    /// Bytes are read and compared.
    Read {
        /// Where.
        range: Range<u64>,
        /// Into how many buffers.
        pieces: u8,
    },
    /// Several of the above at once, on ranges that don't touch.
    Batch(Vec<Action>),
    /// All before is made durable.
    Flush,
    /// The image is closed and opened.
    Reopen,
    /// The program that uses the image is killed, and another opens it: what was not flushed may be there or not.
    Kill,
    /// The disk gets another size.
    Resize {
        /// The new size in bytes, a multiple of 512.
        size: u64,
        /// Space reserved for new bytes.
        preallocation: Preallocation,
    },
    /// Where data and holes are is asked, and compared with what is read.
    Extents {
        /// Where.
        range: Range<u64>,
        /// At most so many.
        max: usize,
    },
    /// A write that begins before the end of the disk and leaves it; it must fail and change nothing.
    WriteBeyond {
        /// How far it goes past the end; bytes.
        past: u64,
    },
}

/// An image and what is done to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// What it was made of.
    pub seed: u64,
    /// The image before.
    pub shape: Shape,
    /// What is done.
    pub actions: Vec<Action>,
}

impl Program {
    /// The program of a seed.
    pub fn random(seed: u64, scale: Scale, qemu: bool) -> Self {
        let mut random = Random::new(seed);
        let shape = Shape::random(&mut random, scale, qemu);
        let count = match scale {
            Scale::Full => random.within(5..60),
            Scale::Small => random.within(4..24),
        };
        let mut writer = Writer::new(&shape, random);
        writer.may_kill = scale == Scale::Small;
        let actions = (0..count).map(|_| writer.action()).collect();
        Self {
            seed,
            shape,
            actions,
        }
    }

    /// `count` more actions for a disk of this shape, such as after a crash. Their tags begin at `first_tag`.
    pub fn more(shape: &Shape, random: Random, count: usize, first_tag: u32) -> Vec<Action> {
        let mut writer = Writer::new(shape, random);
        writer.tag = first_tag;
        (0..count).map(|_| writer.change()).collect()
    }
}

/// Makes up actions.
struct Writer<'a> {
    shape: &'a Shape,
    random: Random,
    size: u64,
    tag: u32,
    /// Whether space may be lost, as it is when a program is killed.
    may_kill: bool,
    /// Places that are met again and again.
    hot: Vec<u64>,
}

impl<'a> Writer<'a> {
    fn new(shape: &'a Shape, mut random: Random) -> Self {
        let size = shape.format.size;
        let cluster = shape.format.cluster_size();
        let mut hot = vec![0, size, size / 2];
        // The border of the first L2 table, and where the chain ends.
        hot.push(shape.format.geometry().l2_coverage());
        hot.extend(shape.backing.iter().map(super::shape::Layer::size));
        hot.push(random.below(size));
        hot.push(random.below(size) / cluster * cluster);
        hot.retain(|place| *place <= size);
        Self {
            shape,
            random,
            size,
            tag: 0,
            may_kill: false,
            hot,
        }
    }

    fn action(&mut self) -> Action {
        match self.random.below(20) {
            0..12 => self.change(),
            12 | 13 => self.read(),
            14 | 15 => Action::Flush,
            16 if self.may_kill && self.random.one_in(3) => Action::Kill,
            16 => Action::Reopen,
            17 => self.batch(),
            18 if self.random.one_in(2) => Action::WriteBeyond {
                past: self.random.within(1..5000),
            },
            18 => Action::Extents {
                range: self.range(),
                max: self.random.pick(&[1, 2, 7, 40, usize::MAX]),
            },
            _ => self.resize(),
        }
    }

    fn change(&mut self) -> Action {
        let range = self.range();
        if self.shape.can_pack() && self.random.one_in(8) {
            return self.pack(&range);
        }
        match self.random.below(10) {
            0..6 => self.write(range),
            6 | 7 => Action::Zero {
                range,
                unmap: self.random.one_in(2),
            },
            8 => Action::Discard { range },
            _ => Action::DiscardWhole { range },
        }
    }

    fn write(&mut self, range: Range<u64>) -> Action {
        self.tag += 1;
        Action::Write {
            range,
            content: Content::Tagged(self.tag),
            pieces: self.pieces(),
        }
    }

    fn pack(&mut self, near: &Range<u64>) -> Action {
        self.tag += 1;
        let cluster = self.shape.format.cluster_size();
        let start = near.start / cluster * cluster;
        let clusters = self.random.within(1..5);
        let content = if self.random.one_in(3) {
            Content::Byte(self.random.within(1..255) as u8)
        } else {
            Content::Tagged(self.tag)
        };
        Action::Pack {
            range: start..(start + clusters * cluster).min(self.size),
            content,
        }
    }

    fn read(&mut self) -> Action {
        Action::Read {
            range: self.range(),
            pieces: self.pieces(),
        }
    }

    fn pieces(&mut self) -> u8 {
        self.random.pick(&[1, 1, 1, 2, 3, 7])
    }

    fn batch(&mut self) -> Action {
        let mut actions: Vec<Action> = Vec::new();
        let mut taken: Vec<Range<u64>> = Vec::new();
        for _ in 0..self.random.within(2..12) {
            let range = self.range();
            // Neighbours in one cluster are welcome, overlaps are not.
            if taken
                .iter()
                .any(|other| range.start < other.end && other.start < range.end)
            {
                continue;
            }
            taken.push(range.clone());
            actions.push(match self.random.below(8) {
                0..4 => self.write(range),
                4 => Action::Zero {
                    range,
                    unmap: self.random.one_in(2),
                },
                5 => Action::Discard { range },
                _ => Action::Read {
                    range,
                    pieces: self.pieces(),
                },
            });
        }
        Action::Batch(actions)
    }

    fn resize(&mut self) -> Action {
        let first = self.shape.format.size;
        let v2_snapshots = self.shape.format.version == 2 && self.shape.snapshots() > 0;
        if v2_snapshots {
            return Action::Flush;
        }
        let cluster = self.shape.format.cluster_size();
        let size = match self.random.below(6) {
            0 => first,
            1 => self.size + self.random.within(1..4) * cluster,
            2 => self.size.saturating_sub(self.random.within(1..4) * cluster),
            3 => self.random.within(self.size / 2..self.size + 1),
            _ => self.random.within(self.size..self.size + first / 2),
        };
        let size = size.clamp(512, 2 * first).next_multiple_of(512);
        let mut preallocation = Preallocation::Off;
        if size > self.size && self.shape.backing.is_empty() && self.random.one_in(3) {
            preallocation = self.random.pick(&PREALLOCATIONS);
        }
        self.size = size;
        self.hot.push(size);
        Action::Resize {
            size,
            preallocation,
        }
    }

    /// A range near a hot place, of a length and alignment that guests use, or that nobody does.
    fn range(&mut self) -> Range<u64> {
        let cluster = self.shape.format.cluster_size();
        let unit = self
            .random
            .pick(&[1, 1, 512, 512, 4096, cluster / 32, cluster, cluster])
            .max(1);
        let place = self.random.below(self.hot.len() as u64) as usize;
        let spread = (4 * cluster).min(self.size);
        let start = (self.hot[place] + self.random.below(2 * spread)).saturating_sub(spread);
        let start = start.min(self.size - 1) / unit * unit;
        let units = match self.random.below(4) {
            0 => 1,
            1 => self.random.within(1..4),
            2 => self.random.within(1..1 + (2 * cluster / unit).clamp(1, 64)),
            _ => self.random.within(1..9),
        };
        let longest = (3 << 20).min(16 * cluster.max(4096));
        let len = (units * unit).min(longest).min(self.size - start);
        start..start + len
    }
}
