//! What is measured, and what is expected of it.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::samples::Samples;
use super::work::{Kind, Order, Work};
use super::{Setting, batch, cold, first, in_place, open, scale};

const MIB: u64 = 1 << 20;

/// One kind of request against one rival.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) rival: Option<&'static str>,
    pub(super) goal: Goal,
    /// Room that is needed in memory; bytes.
    pub(super) dir_bytes: u64,
    /// And on the disk.
    pub(super) disk_bytes: u64,
    pub(super) measure: fn(&Setting) -> Result<Samples>,
}

impl Row {
    pub(super) fn needs_qemu(&self) -> bool {
        self.rival == Some(QEMU)
    }
}

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// We make at least so many requests while the rival makes one.
    AtLeast(f64),
    /// It takes us fewer milliseconds.
    Below(f64),
    /// Only shown.
    None,
}

impl Goal {
    pub(super) fn is_kept(self, ratio: Option<f64>, ours: f64) -> Option<bool> {
        match self {
            Self::AtLeast(least) => ratio.map(|ratio| ratio >= least),
            Self::Below(most) => Some(ours < most),
            Self::None => None,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, ">={least}"),
            Self::Below(most) => write!(f, "<{most} ms"),
            Self::None => Ok(()),
        }
    }
}

const QEMU: &str = "qemu-img";
const PLAIN: &str = "plain file";
const CALLS: &str = "plain calls";

/// A third of the rate of a sparse file, as it is shown.
const THIRD: f64 = 0.333;

/// All rows, in the order in which they run.
pub(super) const ROWS: [Row; 30] = [
    Row {
        name: "read-4k",
        what: "random reads of 4 KiB",
        measure: |setting| in_place::beside_plain_calls(setting, READ),
        ..in_place(0.95)
    },
    Row {
        name: "read-4k-4-threads",
        what: "the same by four threads",
        measure: |setting| in_place::beside_plain_calls(setting, by_four(READ)),
        ..in_place(0.95)
    },
    Row {
        name: "write-4k",
        what: "random writes of 4 KiB in place",
        measure: |setting| in_place::beside_plain_calls(setting, WRITE),
        ..in_place(0.95)
    },
    Row {
        name: "write-4k-4-threads",
        what: "the same by four threads",
        measure: |setting| in_place::beside_plain_calls(setting, by_four(WRITE)),
        ..in_place(0.95)
    },
    Row {
        name: "read-64k",
        what: "sequential reads of 64 KiB",
        measure: |setting| in_place::beside_plain_calls(setting, sequential(Kind::Read)),
        ..in_place(0.97)
    },
    Row {
        name: "write-64k",
        what: "sequential writes of 64 KiB in place",
        measure: |setting| in_place::beside_plain_calls(setting, sequential(Kind::Write)),
        ..in_place(0.97)
    },
    Row {
        name: "depth-32",
        what: "batches of 32 random reads of 4 KiB, shared with one helper thread, beside single ones by one thread",
        measure: |setting| batch::beside_single_reads(setting, &setting.dir, 1),
        ..in_place(1.0)
    },
    Row {
        name: "depth-32-alone",
        what: "the same without a helper",
        goal: Goal::None,
        measure: |setting| batch::beside_single_reads(setting, &setting.dir, 0),
        ..in_place(1.0)
    },
    Row {
        name: "depth-32-disk",
        what: "as depth-32 on a disk, all of it in the page cache, shared with one helper thread",
        measure: |setting| batch::beside_single_reads(setting, &setting.disk_dir, 1),
        ..on_disk(1.0)
    },
    Row {
        name: "depth-32-disk-alone",
        what: "the same without a helper",
        goal: Goal::None,
        measure: |setting| batch::beside_single_reads(setting, &setting.disk_dir, 0),
        ..on_disk(1.0)
    },
    Row {
        name: "overlap-checks",
        what: "random writes of 4 KiB in place, with all overlap checks beside none",
        rival: Some("no checks"),
        measure: in_place::overlap_checks,
        ..in_place(0.98)
    },
    Row {
        name: "cold-read-4k",
        what: "reads of 4 KiB all over 1 TiB that miss the L2 cache",
        measure: cold::beside_qemu,
        ..beside_qemu(8.0, 256 * MIB)
    },
    Row {
        name: "first-4k",
        what: "first writes of 4 KiB, each to a cluster of its own",
        measure: |setting| first::beside_qemu(setting, first::SMALL),
        ..beside_qemu(6.0, 1280 * MIB)
    },
    Row {
        name: "first-4k-plain",
        what: "the same beside a sparse plain file",
        rival: Some(PLAIN),
        measure: |setting| first::beside_plain_file(setting, first::SMALL),
        ..beside_qemu(THIRD, 256 * MIB)
    },
    Row {
        name: "first-64k",
        what: "first writes of whole clusters",
        goal: Goal::None,
        measure: |setting| first::beside_qemu(setting, first::WHOLE),
        ..beside_qemu(6.0, 1280 * MIB)
    },
    Row {
        name: "first-64k-plain",
        what: "the same beside a sparse plain file",
        rival: Some(PLAIN),
        measure: |setting| first::beside_plain_file(setting, first::WHOLE),
        ..beside_qemu(THIRD, 1280 * MIB)
    },
    Row {
        name: "cow-4k",
        what: "first writes of 4 KiB over a full backing file, each to a cluster of its own",
        goal: Goal::None,
        measure: |setting| first::beside_qemu(setting, first::OVER_BACKING),
        ..beside_qemu(3.0, 2304 * MIB)
    },
    Row {
        name: "cow-4k-in-order",
        what: "writes of 4 KiB one after the other over a full backing file",
        goal: Goal::None,
        measure: |setting| first::beside_qemu(setting, first::OVER_BACKING.in_order()),
        ..beside_qemu(3.0, 2304 * MIB)
    },
    Row {
        name: "cow-4k-batches",
        what: "the same in batches of 64, as many as QEMU has in flight",
        measure: |setting| {
            let batches = first::OVER_BACKING.in_order().in_batches();
            first::beside_qemu(setting, batches)
        },
        ..beside_qemu(3.0, 2304 * MIB)
    },
    Row {
        name: "cow-4k-4-threads",
        what: "writes to clusters of their own by four threads of ours",
        goal: Goal::None,
        measure: |setting| first::beside_qemu(setting, first::OVER_BACKING.by_four()),
        ..beside_qemu(3.0, 2304 * MIB)
    },
    Row {
        name: "cow-4k-depth-1",
        what: "the same, one request after the other on both sides",
        goal: Goal::None,
        measure: |setting| first::beside_qemu(setting, first::OVER_BACKING.one_at_a_time()),
        ..beside_qemu(3.0, 2304 * MIB)
    },
    Row {
        name: "cow-4k-plain",
        what: "the same beside reading and writing whole clusters of plain files",
        rival: Some(PLAIN),
        goal: Goal::None,
        measure: |setting| first::beside_plain_file(setting, first::OVER_BACKING),
        ..beside_qemu(0.0, 2304 * MIB)
    },
    Row {
        name: "open-16t",
        what: "open a 16 TiB image, all its tables allocated, for writing",
        measure: open::open,
        ..alone(Goal::Below(5.0))
    },
    Row {
        name: "open-write-16t",
        what: "the same, and a first write",
        measure: open::open_and_write,
        ..alone(Goal::None)
    },
    Row {
        name: "2-threads-4k",
        what: "random reads of 4 KiB in memory by two threads, beside one",
        measure: |setting| scale::beside_one_thread(setting, 4096),
        ..in_memory(1.6)
    },
    Row {
        name: "2-threads-512",
        what: "random reads of 512 bytes in memory by two threads, beside one",
        measure: |setting| scale::beside_one_thread(setting, 512),
        ..in_memory(1.8)
    },
    Row {
        name: "2-threads-memory",
        what: "the same of the memory itself, without an image: what could be reached",
        goal: Goal::None,
        measure: scale::memory_alone,
        ..in_memory(1.8)
    },
    Row {
        name: "2-threads-plain",
        what: "random reads of 4 KiB of a plain file by two threads, beside one",
        goal: Goal::None,
        dir_bytes: 2 * scale::LEN,
        measure: scale::plain_file,
        ..in_memory(1.6)
    },
    Row {
        name: "2-threads-copies",
        what: "copies of 512 bytes of plain memory by two threads, beside one: what memory gives at the time",
        goal: Goal::None,
        measure: scale::copies,
        ..in_memory(1.8)
    },
    Row {
        name: "2-threads-loops",
        what: "arithmetic without memory by two threads, beside one: what the processors give at the time",
        goal: Goal::None,
        measure: scale::loops,
        ..in_memory(1.8)
    },
];

const READ: Work = Work {
    kind: Kind::Read,
    order: Order::Random,
    size: 4096,
    count: 1 << 14,
    threads: 1,
};

const WRITE: Work = Work {
    kind: Kind::Write,
    ..READ
};

const fn by_four(work: Work) -> Work {
    Work { threads: 4, ..work }
}

const fn sequential(kind: Kind) -> Work {
    Work {
        kind,
        order: Order::Sequential,
        size: 64 << 10,
        count: 1 << 11,
        threads: 1,
    }
}

/// The parts that rows on a full image beside its own file have in common.
const fn in_place(least: f64) -> Row {
    Row {
        name: "",
        what: "",
        rival: Some(CALLS),
        goal: Goal::AtLeast(least),
        dir_bytes: in_place::LEN + 64 * MIB,
        disk_bytes: 0,
        measure: |_| Ok(Samples::default()),
    }
}

const fn on_disk(least: f64) -> Row {
    Row {
        dir_bytes: MIB,
        disk_bytes: in_place::LEN + 64 * MIB,
        ..in_place(least)
    }
}

const fn beside_qemu(least: f64, dir_bytes: u64) -> Row {
    Row {
        rival: Some(QEMU),
        dir_bytes,
        ..in_place(least)
    }
}

const fn alone(goal: Goal) -> Row {
    Row {
        rival: None,
        goal,
        dir_bytes: 3 << 30,
        ..in_place(0.0)
    }
}

const fn in_memory(least: f64) -> Row {
    Row {
        rival: Some("one thread"),
        dir_bytes: MIB,
        ..in_place(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_judged() {
        assert_eq!(Goal::AtLeast(0.95).is_kept(Some(0.95), 0.0), Some(true));
        assert_eq!(Goal::AtLeast(0.95).is_kept(Some(0.94), 0.0), Some(false));
        assert_eq!(Goal::Below(5.0).is_kept(None, 4.9), Some(true));
        assert_eq!(Goal::Below(5.0).is_kept(None, 5.0), Some(false));
        assert_eq!(Goal::None.is_kept(Some(1.0), 0.0), None);
    }

    #[test]
    fn every_row_has_a_name_and_a_description() {
        let named = |row: &Row| !row.name.is_empty() && !row.what.is_empty();
        assert!(ROWS.iter().all(named));
    }
}
