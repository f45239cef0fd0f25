//! What an image is like before a program runs on it: geometry, options, backing files, first content.

use qcow2_format::Geometry;
use qcow2_io::codec::Codec;

use crate::create::Preallocation;

use super::content::Content;
use super::random::Random;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// All ways to reserve space.
pub(super) const PREALLOCATIONS: [Preallocation; 4] = [
    Preallocation::Off,
    Preallocation::Metadata,
    Preallocation::Falloc,
    Preallocation::Full,
];
/// Tags from here on are those of content that was there before the program.
pub(super) const FIRST_TAG: u32 = 1000;

/// How large images may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Up to 64 MiB.
    Full,
    /// Up to about one MiB, for runs that look at every state of an image.
    Small,
}

/// The numbers of one qcow2 file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u8,
    /// Base-2 logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Base-2 logarithm of the refcount width.
    pub refcount_order: u32,
    /// Extended L2 entries.
    pub extended_l2: bool,
    /// Postponed refcounts.
    pub lazy_refcounts: bool,
    /// Compression by zstd rather than zlib.
    pub zstd: bool,
}

impl Format {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The geometry of it.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.cluster_bits, self.refcount_order, self.extended_l2)
            .expect("generated within the format's limits")
    }

    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }
}

/// One thing that was done to an image before the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A whole cluster was written.
    Data {
        /// Which.
        cluster: u64,
        /// What with.
        content: Content,
    },
    /// A cluster was made to read as zero.
    Zero {
        /// Which.
        cluster: u64,
        /// Whether it has space.
        allocated: bool,
    },
    /// A cluster was written in compressed form, one byte all over.
    Compressed {
        /// Which.
        cluster: u64,
        /// The byte.
        byte: u8,
    },
    /// Only some subclusters were written; the rest reads through.
    Subclusters {
        /// Which cluster.
        cluster: u64,
        /// Allocated subclusters in bits 0 to 31, zero ones in bits 32 to 63.
        bitmap: u64,
        /// What with.
        content: Content,
    },
    /// An internal snapshot was taken.
    Snapshot,
}

/// One file below the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// A raw file; every second stretch of it is a hole.
    Raw {
        /// Length in bytes.
        size: u64,
        /// What its data is.
        content: Content,
    },
    /// A qcow2 file.
    Qcow2 {
        /// Its numbers.
        format: Format,
        /// Its content.
        steps: Vec<Step>,
    },
}

impl Layer {
    /// The length of what it shows; bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2 { format, .. } => format.size,
        }
    }
}

/// Where guest data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// In the image.
    None,
    /// In a file of its own.
    External,
    /// In a file of its own that is a complete raw image.
    Raw,
}

/// Who made the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The engine under test.
    Engine,
    /// The image writer of the checker's tests: snapshots and compressed clusters without QEMU.
    Written(Vec<Step>),
    /// `qemu-img` and `qemu-io`.
    Qemu(Vec<Step>),
}

/// How the engine is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// How much metadata is kept in memory.
    pub cache: CacheSize,
    /// Lets the engine postpone refcounts, whatever the image says.
    pub lazy_refcounts: Option<bool>,
    /// Whether space given back by the guest is given back to the file.
    pub pass_discard: bool,
    /// Whether clusters that are discarded stay with their place.
    pub discard_no_unref: bool,
}

/// How much metadata is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSize {
    /// What the engine thinks right.
    Default,
    /// As little as it takes: everything is evicted all the time.
    Tiny,
    /// A handful of tables, in parts of 512 bytes.
    Slices,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// As before LUKS.
    Aes,
    /// With a LUKS area.
    Luks,
}

/// The passphrase of all encrypted images.
pub(super) const PASSPHRASE: &str = "open-sesame";

/// An image before the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The image's numbers.
    pub format: Format,
    /// Space reserved at creation.
    pub preallocation: Preallocation,
    /// Where guest data lies.
    pub data_file: DataFile,
    /// How guest data is encrypted.
    pub encryption: Encryption,
    /// Files below, the nearest first.
    pub backing: Vec<Layer>,
    /// Who made it, and with what content.
    pub origin: Origin,
    /// How the engine runs on it.
    pub tuning: Tuning,
}

impl Shape {
    /// A shape; `qemu` tells whether QEMU may have made it.
    pub fn random(random: &mut Random, scale: Scale, qemu: bool) -> Self {
        if scale == Scale::Small && random.one_in(16) {
            return Self::crowded(random);
        }
        let mut format = random_format(random, scale);
        let mut data_file = DataFile::None;
        if format.version == 3 && random.one_in(6) {
            data_file = random.pick(&[DataFile::External, DataFile::Raw]);
        }
        let backing = if data_file != DataFile::Raw && random.one_in(2) {
            random_chain(random, scale, &format)
        } else {
            Vec::new()
        };
        let mut preallocation = Preallocation::Off;
        if (backing.is_empty() || format.extended_l2) && random.one_in(4) && format.size <= 8 * MIB
        {
            preallocation = random.pick(&PREALLOCATIONS);
        }
        let mut origin = random_origin(random, &mut format, data_file, preallocation, qemu);
        let encryption = if data_file != DataFile::Raw && random.one_in(6) {
            encrypt(random, &mut origin, preallocation)
        } else {
            Encryption::None
        };
        let tuning = Tuning {
            cache: random.pick(&[CacheSize::Default, CacheSize::Tiny, CacheSize::Slices]),
            lazy_refcounts: (format.version == 3 && random.one_in(8)).then(|| random.one_in(2)),
            pass_discard: !random.one_in(4),
            discard_no_unref: format.version == 3 && random.one_in(8),
        };
        Self {
            format,
            preallocation,
            data_file,
            encryption,
            backing,
            origin,
            tuning,
        }
    }

    /// An image that soon needs another refcount table.
    fn crowded(random: &mut Random) -> Self {
        let format = Format {
            size: random.within(3500..4000) * 512,
            version: 3,
            cluster_bits: 9,
            refcount_order: 6,
            extended_l2: false,
            lazy_refcounts: random.one_in(4),
            zstd: false,
        };
        Self {
            format,
            preallocation: Preallocation::Metadata,
            data_file: DataFile::None,
            encryption: Encryption::None,
            backing: Vec::new(),
            origin: Origin::Engine,
            tuning: Tuning {
                cache: random.pick(&[CacheSize::Default, CacheSize::Tiny]),
                lazy_refcounts: None,
                pass_discard: true,
                discard_no_unref: false,
            },
        }
    }

    /// Snapshots that the image has.
    pub fn snapshots(&self) -> usize {
        let (Origin::Written(steps) | Origin::Qemu(steps)) = &self.origin else {
            return 0;
        };
        steps.iter().filter(|step| **step == Step::Snapshot).count()
    }

    /// Whether compressed clusters can be written to it.
    pub fn can_pack(&self) -> bool {
        let codec = if self.format.zstd {
            Codec::Zstd
        } else {
            Codec::Zlib
        };
        self.data_file == DataFile::None
            && self.encryption == Encryption::None
            && codec.is_available()
    }

    /// Whether discards can't make the guest see zeros.
    pub fn cannot_discard(&self) -> bool {
        self.format.version == 2 && !self.backing.is_empty()
    }
}

/// Makes the image an encrypted one, if whoever makes it can.
fn encrypt(random: &mut Random, origin: &mut Origin, preallocation: Preallocation) -> Encryption {
    match origin {
        Origin::Written(_) => return Encryption::None,
        // Its preallocated clusters show deciphered zeros.
        Origin::Qemu(_) if preallocation != Preallocation::Off => *origin = Origin::Engine,
        Origin::Engine | Origin::Qemu(_) => {}
    }
    // QEMU takes a second or more to make a LUKS area.
    random.pick(&[
        Encryption::Aes,
        Encryption::Aes,
        Encryption::Aes,
        Encryption::Luks,
    ])
}

fn random_format(random: &mut Random, scale: Scale) -> Format {
    let cluster_bits = match scale {
        Scale::Full => random.pick(&[9, 9, 12, 12, 14, 16, 16, 16, 21]),
        Scale::Small => random.pick(&[9, 9, 9, 10, 12, 12, 14, 16]),
    };
    let size = random_size(random, scale, cluster_bits);
    let version = if random.one_in(5) { 2 } else { 3 };
    let v3 = version == 3;
    Format {
        size,
        version,
        cluster_bits,
        refcount_order: if v3 {
            random.pick(&[0, 1, 2, 3, 4, 4, 4, 5, 6])
        } else {
            4
        },
        extended_l2: v3 && cluster_bits >= 14 && random.one_in(2),
        lazy_refcounts: v3 && random.one_in(4),
        zstd: v3 && random.one_in(3),
    }
}

fn random_size(random: &mut Random, scale: Scale, cluster_bits: u32) -> u64 {
    let cluster = 1 << cluster_bits;
    let bytes = match scale {
        Scale::Full => match random.below(20) {
            0..13 => random.within(100 * KIB..MIB),
            13..19 => random.within(MIB..8 * MIB),
            _ => random.within(8 * MIB..64 * MIB),
        },
        // A few L2 tables, where they are small.
        Scale::Small => match cluster_bits {
            9 => random.within(12 * KIB..300 * KIB),
            10 => random.within(24 * KIB..500 * KIB),
            12 => random.within(100 * KIB..700 * KIB),
            _ => random.within(200 * KIB..MIB),
        },
    };
    let bytes = bytes.max(3 * cluster);
    match random.below(3) {
        0 => bytes.next_multiple_of(cluster),
        // A disk that ends within a cluster.
        _ => bytes.next_multiple_of(512),
    }
}

fn random_chain(random: &mut Random, scale: Scale, top: &Format) -> Vec<Layer> {
    let depth = random.pick(&[1, 1, 1, 2, 2, 3]);
    let mut chain = Vec::new();
    for level in 1..=depth {
        let size = match random.below(4) {
            0 => top.size,
            // Not even sectors are whole at the end of a raw file.
            1 => random.within(1..top.size),
            2 => random.within(top.size..top.size + top.size / 2 + 1),
            _ => random.within(top.size / 2..top.size),
        };
        let tag = Content::Tagged(FIRST_TAG + 1000 * level);
        if level == depth && random.one_in(2) {
            chain.push(Layer::Raw { size, content: tag });
            break;
        }
        let mut format = random_format(random, scale);
        format.size = size.next_multiple_of(512).max(512);
        format.zstd = false;
        format.lazy_refcounts = false;
        format.refcount_order = 4;
        let steps = random_steps(random, &format, FIRST_TAG + 1000 * level, false, false);
        chain.push(Layer::Qcow2 { format, steps });
    }
    chain
}

fn random_origin(
    random: &mut Random,
    format: &mut Format,
    data_file: DataFile,
    preallocation: Preallocation,
    qemu: bool,
) -> Origin {
    if random.one_in(2) {
        return Origin::Engine;
    }
    if qemu && random.one_in(2) {
        let snapshots = preallocation == Preallocation::Off && data_file == DataFile::None;
        let mut steps = random_steps(random, format, 0, snapshots, true);
        if data_file != DataFile::None || preallocation != Preallocation::Off {
            // No compressed clusters outside the image, nor over space that is there.
            steps.retain(|step| !matches!(step, Step::Compressed { .. }));
        }
        return Origin::Qemu(steps);
    }
    if data_file == DataFile::None && preallocation == Preallocation::Off {
        // Its payloads are zlib's.
        format.zstd = false;
        return Origin::Written(random_steps(random, format, FIRST_TAG, true, false));
    }
    Origin::Engine
}

/// Content by clusters, crowded at the start, at the end and around the borders of tables.
fn random_steps(
    random: &mut Random,
    format: &Format,
    first_tag: u32,
    snapshots: bool,
    by_qemu: bool,
) -> Vec<Step> {
    let clusters = format.clusters();
    let table = format.geometry().l2_entries();
    let count = random.within(3..24).min(clusters);
    let mut steps = Vec::new();
    let mut written = std::collections::BTreeSet::new();
    let mut taken = 0;
    // The widest sharing that the refcounts can say.
    let snapshots_max = match format.refcount_order {
        _ if !snapshots => 0,
        0 => 0,
        1 => 1,
        _ => 2,
    };
    for number in 0..count {
        let cluster = match random.below(4) {
            0 => random.below(clusters.min(8)),
            1 => clusters - 1 - random.below(clusters.min(3)),
            2 => (table + random.below(4)).saturating_sub(2) % clusters,
            _ => random.below(clusters),
        };
        let is_compressed = |step: &Step| matches!(step, Step::Compressed { cluster: other, .. } if *other == cluster);
        if by_qemu && steps.iter().any(is_compressed) {
            // QEMU goes on packing compressed data into a cluster that it has freed and reused for other data.
            continue;
        }
        let content = if by_qemu {
            Content::Byte(random.within(1..255) as u8)
        } else {
            Content::Tagged(first_tag + number as u32)
        };
        let step = match random.below(8) {
            0 if format.version == 3 => Step::Zero {
                cluster,
                allocated: random.one_in(2) && !by_qemu,
            },
            // QEMU doesn't overwrite with compressed data, and a refcount of one bit can't say that extents share a cluster.
            1 | 2 if !written.contains(&cluster) && format.refcount_order > 2 => Step::Compressed {
                cluster,
                byte: random.within(1..255) as u8,
            },
            3 if format.extended_l2 && !by_qemu => {
                let allocated = random.draw() as u32;
                let zero = random.draw() as u32 & !allocated;
                Step::Subclusters {
                    cluster,
                    bitmap: u64::from(zero) << 32 | u64::from(allocated),
                    content,
                }
            }
            4 if taken < snapshots_max && number > 1 => {
                taken += 1;
                Step::Snapshot
            }
            _ => Step::Data { cluster, content },
        };
        written.insert(cluster);
        steps.push(step);
    }
    if taken < snapshots_max && random.one_in(2) {
        steps.push(Step::Snapshot);
    }
    steps
}
