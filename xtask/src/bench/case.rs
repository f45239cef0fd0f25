//! The images that are checked, and what is expected of each.

use qcow2_check::synth::{self, SynthError};
use qcow2_io::Storage;
use serde::Serialize;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// One kind of image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    kind: Kind,
    virtual_size: u64,
    cluster_bits: u32,
    pub(super) budget: Budget,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Contiguous,
    Extended,
    Snapshots(u32),
    Compressed,
    RandomOrder,
}

/// What is to be kept.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Budget {
    /// At least so many times as fast as `qemu-img check`.
    pub(super) faster_than_qemu: f64,
    /// At most so many times as long as just reading the metadata.
    pub(super) times_reading: Option<f64>,
}

/// All cases, in the order in which they run: those that keep QEMU busy for long come last.
pub(super) const CASES: [Case; 7] = [
    Case {
        name: "prealloc-1t",
        kind: Kind::Contiguous,
        virtual_size: TIB,
        cluster_bits: 16,
        budget: budget(20.0, Some(1.5)),
    },
    Case {
        name: "small-clusters-64g",
        kind: Kind::Contiguous,
        virtual_size: 64 * GIB,
        cluster_bits: 12,
        budget: budget(30.0, None),
    },
    Case {
        name: "extended-64g",
        kind: Kind::Extended,
        virtual_size: 64 * GIB,
        cluster_bits: 16,
        budget: budget(10.0, None),
    },
    Case {
        name: "snapshots-8-256g",
        kind: Kind::Snapshots(8),
        virtual_size: 256 * GIB,
        cluster_bits: 16,
        budget: budget(5.0, None),
    },
    Case {
        name: "compressed-256g",
        kind: Kind::Compressed,
        virtual_size: 256 * GIB,
        cluster_bits: 16,
        budget: budget(3.0, None),
    },
    Case {
        name: "random-16g",
        kind: Kind::RandomOrder,
        virtual_size: 16 * GIB,
        cluster_bits: 16,
        budget: budget(60.0, None),
    },
    Case {
        name: "random-1t",
        kind: Kind::RandomOrder,
        virtual_size: TIB,
        cluster_bits: 16,
        budget: budget(300.0, None),
    },
];

const fn budget(faster_than_qemu: f64, times_reading: Option<f64>) -> Budget {
    Budget {
        faster_than_qemu,
        times_reading,
    }
}

impl Case {
    /// Writes the image.
    pub(super) fn write(&self, storage: &dyn Storage) -> Result<(), SynthError> {
        let size = self.virtual_size;
        match self.kind {
            Kind::Contiguous => synth::contiguous(storage, size, self.cluster_bits, false),
            Kind::Extended => synth::contiguous(storage, size, self.cluster_bits, true),
            Kind::Snapshots(count) => synth::snapshots(storage, size, count),
            Kind::Compressed => synth::compressed(storage, size),
            Kind::RandomOrder => synth::random_order(storage, size, 1),
        }
    }

    /// Bytes that the image takes on disk, about.
    pub(super) fn disk_bytes(&self) -> u64 {
        let (trees, entry_size) = match self.kind {
            Kind::Extended => (1, 16),
            Kind::Snapshots(count) => (u64::from(count) + 1, 8),
            _ => (1, 8),
        };
        // L2 entries and refcounts, and something for all else.
        self.clusters() * (trees * entry_size + 2) + (16 << 20)
    }

    /// Clusters that several trees share, about.
    pub(super) fn shared_clusters(&self) -> u64 {
        match self.kind {
            Kind::Snapshots(_) => self.clusters(),
            _ => 0,
        }
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Clusters of the virtual disk.
    fn clusters(&self) -> u64 {
        self.virtual_size >> self.cluster_bits
    }
}
