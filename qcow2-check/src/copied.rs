//! COPIED flags of the active tree against the refcounts on disk.
//!
//! Runs only where the walk or the comparison gives reason to: where every refcount equals the references met, the walk has
//! seen already whether each flag is right.

use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, HostOffset, RefcountBlock};

use crate::blocks::{BlockRef, Blocks};
use crate::compare::read_blocks;
use crate::image::Image;
use crate::refmap::RefMap;
use crate::report::Collector;
use crate::units::Ordered;
use crate::walk::{L1Scan, Plan, TableRef, Window};
use crate::{Code, Place, Run, Structure};

/// Refcounts behind the end of the file that are looked up; there are none in sound images.
const LOOKUPS_MAX: u64 = 1000;

/// Compares the flags of all active entries with the refcounts on disk. Gives the number of wrong ones.
pub(crate) fn check(
    image: &Image<'_>,
    map: &RefMap,
    scan: &L1Scan,
    blocks: &Blocks,
    run: &Run<'_>,
) -> u64 {
    let facts = Facts::load(image, map, blocks);
    let plan = Window::plan(image);
    let ordered = Ordered::new(run);
    let walks = run.share_out(
        units(scan),
        || {
            let findings = Findings {
                image,
                facts: &facts,
                wrong: 0,
                found: Collector::new(run.limit()),
            };
            Flags::new(image, findings)
        },
        |flags, unit| {
            flags.unit(&plan, scan, unit);
            ordered.deliver(unit, &mut flags.judge.found);
        },
    );
    let wrong = walks.into_iter().map(|flags| flags.judge.wrong);
    wrong.fold(0, u64::saturating_add)
}

/// How many units the active entries make, in the order of the disk; the last one are the tables that several places share.
pub(crate) fn units(scan: &L1Scan) -> u64 {
    scan.windows.len() as u64 + 1
}

/// An active entry that leads to a cluster, and whose COPIED flag is not as it should be.
pub(crate) struct WrongFlag<'a> {
    /// The L2 table it is in; `None` for the L1 table.
    pub(crate) table: Option<&'a TableRef>,
    pub(crate) index: u64,
    /// What the entry leads to.
    pub(crate) host: HostOffset,
    /// The flag as it is.
    pub(crate) copied: bool,
}

/// Knows what flags should be, and takes those that are not.
pub(crate) trait Judge {
    /// Whether a cluster's refcount is exactly 1, so that flags should be set; `None` where that is not known.
    fn is_one(&self, cluster: u64) -> Option<bool>;

    fn wrong(&mut self, flag: WrongFlag<'_>);
}

/// Makes findings of wrong flags, and counts them.
struct Findings<'a, 'i> {
    image: &'a Image<'i>,
    facts: &'a Facts<'a, 'i>,
    wrong: u64,
    found: Collector,
}

impl Judge for Findings<'_, '_> {
    fn is_one(&self, cluster: u64) -> Option<bool> {
        self.facts.is_one(cluster)
    }

    fn wrong(&mut self, flag: WrongFlag<'_>) {
        let image = self.image;
        let count = flag.table.map_or(1, |table| table.active_refs);
        self.wrong = self.wrong.saturating_add(count);
        self.found
            .add_with(Code::CopiedWrong, count, || match flag.table {
                Some(table) => (
                    image.l2_place(table, flag.index),
                    words("its cluster", flag.host, flag.copied),
                ),
                None => (
                    Place::of(Structure::ActiveL1)
                        .at(image.active_entry(flag.index), 8)
                        .entry(flag.index)
                        .guest(
                            image.guest_offset(flag.index, 0),
                            image.geometry.l2_coverage(),
                        ),
                    words("its L2 table", flag.host, flag.copied),
                ),
            });
    }
}

/// What the refcounts on disk say.
struct Facts<'a, 'i> {
    image: &'a Image<'i>,
    blocks: &'a Blocks,
    /// Clusters with references.
    referenced: &'a RefMap,
    /// Those of them whose refcount is exactly 1.
    ones: RefMap,
    /// Stretches of the refcount table whose block can't be read, ascending.
    unreadable: Vec<u64>,
    block_bits: u32,
    /// Refcounts of clusters without counted references looked up one by one.
    lookups: AtomicU64,
}

impl<'a, 'i> Facts<'a, 'i> {
    fn load(image: &'a Image<'i>, map: &'a RefMap, blocks: &'a Blocks) -> Self {
        let block_bits = image.geometry.refcount_block_bits();
        let mut ones = RefMap::new(image.file_clusters());
        let mut unreadable = Vec::new();
        let mut buffer = Vec::new();
        read_blocks(
            image,
            blocks,
            (0, blocks.len()),
            &mut buffer,
            |index, block, bytes| match (block, bytes) {
                (BlockRef::At(_), Some(bytes)) => {
                    let block = RefcountBlock::new(bytes, image.geometry);
                    let base = index << block_bits;
                    for start in (0..block.len()).step_by(64) {
                        let at = base + start as u64;
                        let seen = map.word(at);
                        if seen != 0 {
                            ones.insert_word(at, block.ones_and_others(start).0 & seen);
                        }
                    }
                }
                (BlockRef::At(_) | BlockRef::Unreadable, _) => unreadable.push(index),
                (BlockRef::Absent | BlockRef::Skipped, _) => {}
            },
        );
        Self {
            image,
            blocks,
            referenced: map,
            ones,
            unreadable,
            block_bits,
            lookups: AtomicU64::new(0),
        }
    }

    /// Whether a cluster's refcount is exactly 1; `None` where it can't be read.
    fn is_one(&self, cluster: u64) -> Option<bool> {
        let stretch = cluster >> self.block_bits;
        if !self.unreadable.is_empty() && self.unreadable.binary_search(&stretch).is_ok() {
            return None;
        }
        if self.referenced.is_seen(cluster) {
            return Some(self.ones.is_seen(cluster));
        }
        // An entry whose reference was not counted: it leads past the end.
        match self.blocks.get(stretch) {
            BlockRef::At(offset) if self.lookups.fetch_add(1, Ordering::Relaxed) < LOOKUPS_MAX => {
                let mut bytes = vec![0; self.image.geometry.cluster_len()];
                self.image.reader.read(&mut bytes, offset).ok()?;
                let within = usize::try_from(cluster & ((1 << self.block_bits) - 1)).ok()?;
                Some(RefcountBlock::new(&bytes, self.image.geometry).get(within) == Some(1))
            }
            _ => Some(false),
        }
    }
}

/// A walk along the flags of active entries.
pub(crate) struct Flags<'a, 'i, J> {
    image: &'a Image<'i>,
    pub(crate) judge: J,
    window: Window,
    buffer: Vec<u8>,
}

impl<'a, 'i, J: Judge> Flags<'a, 'i, J> {
    pub(crate) fn new(image: &'a Image<'i>, judge: J) -> Self {
        Self {
            image,
            judge,
            window: Window::default(),
            buffer: Vec::new(),
        }
    }

    /// Looks at the entries of a unit.
    pub(crate) fn unit(&mut self, plan: &Plan, scan: &L1Scan, unit: u64) {
        if let Some(number) = scan.window(unit) {
            let mut window = std::mem::take(&mut self.window);
            window.load(self.image, plan, number, |_, _, _| {});
            self.window(&window, scan);
            self.window = window;
        } else {
            for table in scan.duplicates.iter().filter(|table| table.active_refs > 0) {
                self.table(table);
            }
        }
    }

    /// The active L1 entries of a window, and the tables they lead to.
    fn window(&mut self, window: &Window, scan: &L1Scan) {
        let Some(row) = window.active_row(self.image) else {
            return;
        };
        for index in window.indices() {
            let entry = window.entry(row, index);
            let host = entry.l2_table();
            if host.get() == 0 {
                continue;
            }
            let Some(one) = self.judge.is_one(host.get() >> self.image.cluster_bits()) else {
                continue;
            };
            let copied = entry.is_copied();
            if one != copied {
                self.judge.wrong(WrongFlag {
                    table: None,
                    index,
                    host,
                    copied,
                });
            }
            if !scan.is_duplicate(host.get()) {
                self.table(&TableRef {
                    offset: host.get(),
                    weight: 1,
                    active_refs: 1,
                    active: true,
                    snapshot: None,
                    l1_index: index,
                    copied,
                });
            }
        }
    }

    /// The entries of a table, each as often as the active tree has it.
    fn table(&mut self, at: &TableRef) {
        let image = self.image;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(image.geometry.cluster_len(), 0);
        let cluster = at.offset >> image.cluster_bits();
        if !image.reader.is_known_zero(at.offset, buffer.len() as u64)
            && self.judge.is_one(cluster).is_some()
            && image.reader.read(&mut buffer, at.offset).is_ok()
        {
            let table = L2Table::new(&buffer, image.geometry);
            for (index, entry) in (0_u64..).zip(table.iter()) {
                if entry.is_empty() {
                    continue;
                }
                let (ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host)) =
                    entry.kind(image.rules)
                else {
                    continue;
                };
                let one = if image.rules.external_data {
                    Some(true)
                } else {
                    self.judge.is_one(host.get() >> image.cluster_bits())
                };
                let copied = entry.is_copied();
                if one.is_some_and(|one| one != copied) {
                    self.judge.wrong(WrongFlag {
                        table: Some(at),
                        index,
                        host,
                        copied,
                    });
                }
            }
        }
        self.buffer = buffer;
    }
}

fn words(what: &str, host: HostOffset, copied: bool) -> String {
    if copied {
        format!("COPIED is set, but the refcount of {what} at {host} is not 1")
    } else {
        format!("COPIED is clear, but the refcount of {what} at {host} is 1")
    }
}
