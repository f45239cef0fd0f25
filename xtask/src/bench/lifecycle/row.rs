//! What is measured, and what is expected of it.

use clap::ValueEnum;

use super::scene::{Sizes, Stage};

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Step {
    Create,
    SnapshotCreate,
    SnapshotApply,
    SnapshotDelete,
    Shrink,
    Map,
    Measure,
    Compare,
    CompareSparse,
    ToImage,
    ToRaw,
    Commit,
    Rebase,
}

/// Who does it beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rival {
    QemuImg,
    /// A plain copy that leaves holes out.
    Cp,
}

impl Rival {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::QemuImg => "qemu-img",
            Self::Cp => "cp",
        }
    }
}

/// One row.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) step: Step,
    pub(super) stage: Stage,
    pub(super) rival: Rival,
    /// At least so many times as fast as the rival.
    pub(super) goal: f64,
}

const fn beside_qemu(
    name: &'static str,
    what: &'static str,
    step: Step,
    stage: Stage,
    goal: f64,
) -> Row {
    Row {
        name,
        what,
        step,
        stage,
        rival: Rival::QemuImg,
        goal,
    }
}

const fn beside_cp(name: &'static str, what: &'static str, step: Step, stage: Stage) -> Row {
    Row {
        name,
        what,
        step,
        stage,
        rival: Rival::Cp,
        goal: 0.9,
    }
}

/// All rows, in the order in which they run.
pub(super) const ROWS: [Row; 16] = [
    beside_qemu(
        "create-metadata",
        "a new image with all tables",
        Step::Create,
        Stage::Nothing,
        5.0,
    ),
    beside_qemu(
        "snapshot-create",
        "a snapshot of an image with all tables",
        Step::SnapshotCreate,
        Stage::Tables,
        40.0,
    ),
    beside_qemu(
        "snapshot-apply",
        "going back to it",
        Step::SnapshotApply,
        Stage::Snapshot,
        40.0,
    ),
    beside_qemu(
        "snapshot-delete",
        "giving it up",
        Step::SnapshotDelete,
        Stage::Snapshot,
        40.0,
    ),
    beside_qemu(
        "shrink",
        "a smaller image with all tables, to a quarter",
        Step::Shrink,
        Stage::SmallTables,
        50.0,
    ),
    beside_qemu(
        "map",
        "the map of an image with all tables",
        Step::Map,
        Stage::Tables,
        10.0,
    ),
    beside_qemu(
        "measure",
        "how long its copy will be",
        Step::Measure,
        Stage::Tables,
        10.0,
    ),
    beside_qemu(
        "compare",
        "an image and a raw file, half of it data",
        Step::Compare,
        Stage::Both,
        1.4,
    ),
    beside_qemu(
        "compare-sparse",
        "two large images with little in them",
        Step::CompareSparse,
        Stage::Sparse,
        10.0,
    ),
    beside_cp(
        "to-image",
        "a raw file, half of it holes, to an image",
        Step::ToImage,
        Stage::Both,
    ),
    beside_cp(
        "to-raw",
        "such an image to a raw file",
        Step::ToRaw,
        Stage::Both,
    ),
    beside_qemu(
        "to-image-qemu",
        "a raw file, half of it holes, to an image",
        Step::ToImage,
        Stage::Both,
        1.0,
    ),
    beside_qemu(
        "to-raw-qemu",
        "such an image to a raw file",
        Step::ToRaw,
        Stage::Both,
        1.0,
    ),
    beside_qemu(
        "commit",
        "an overlay with a quarter of the disk, to its backing file",
        Step::Commit,
        Stage::Chain,
        1.0,
    ),
    beside_qemu(
        "rebase",
        "such an overlay, to a backing file that differs in places",
        Step::Rebase,
        Stage::Chain,
        1.0,
    ),
    beside_qemu(
        "rebase-sparse",
        "the same where the chain holds next to nothing",
        Step::Rebase,
        Stage::SparseChain,
        1.0,
    ),
];

impl Row {
    /// Room that is needed; bytes.
    pub(super) fn needed(&self, sizes: Sizes) -> u64 {
        match self.stage {
            // Tables take an 8192nd part, refcounts a 32768th.
            Stage::Nothing | Stage::Tables | Stage::Snapshot => sizes.metadata / 1024,
            Stage::SmallTables => sizes.shrink / 1024,
            Stage::Sparse | Stage::SparseChain => 256 << 20,
            Stage::Both | Stage::Chain => sizes.data.saturating_mul(4),
        }
    }
}
