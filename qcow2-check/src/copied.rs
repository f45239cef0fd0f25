//! COPIED flags of the active tree against the refcounts on disk.
//!
//! Runs only where the walk or the comparison gives reason to: where every refcount equals the references met, the walk has
//! seen already whether each flag is right.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, HostOffset, RefcountBlock};

use crate::blocks::{BlockRef, Blocks};
use crate::compare::read_blocks;
use crate::image::Image;
use crate::refmap::RefMap;
use crate::report::Collector;
use crate::walk::{L1Scan, Ordered, TableRef, Window};
use crate::{Code, Place, Run, Structure};

/// Refcounts behind the end of the file that are looked up; there are none in sound images.
const LOOKUPS_MAX: u64 = 1000;

/// Compares the flags of all active entries. Gives the number of wrong ones.
pub(crate) fn check(
    image: &Image<'_>,
    map: &RefMap,
    scan: &L1Scan,
    blocks: &Blocks,
    run: &Run<'_>,
) -> u64 {
    let facts = Facts::load(image, map, blocks);
    let plan = Window::plan(image);
    let units = scan.windows.len() as u64 + 1;
    let next = AtomicU64::new(0);
    let pending = Mutex::new(Ordered::default());
    let parts = run.on_each_thread(|| {
        let mut worker = Worker {
            image,
            facts: &facts,
            wrong: 0,
            found: Collector::new(run.limit()),
            buffer: Vec::new(),
        };
        let mut window = Window::default();
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            if unit >= units || run.is_cancelled() {
                break;
            }
            if let Some(number) = scan.window(unit) {
                window.load(image, &plan, number, |_, _, _| {});
                worker.window(&window, scan);
            } else {
                for table in scan.duplicates.iter().filter(|table| table.active_refs > 0) {
                    worker.table(table);
                }
            }
            let found = std::mem::replace(&mut worker.found, Collector::new(run.limit()));
            if let Ok(mut pending) = pending.lock() {
                pending.deliver(unit, found, run);
            }
        }
        worker.wrong
    });
    parts.into_iter().fold(0, u64::saturating_add)
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

struct Worker<'a, 'i> {
    image: &'a Image<'i>,
    facts: &'a Facts<'a, 'i>,
    wrong: u64,
    found: Collector,
    buffer: Vec<u8>,
}

impl Worker<'_, '_> {
    /// The active L1 entries of a window, and the tables they lead to.
    fn window(&mut self, window: &Window, scan: &L1Scan) {
        let Some((row, tree)) = window.active_row(self.image) else {
            return;
        };
        for index in window.indices() {
            let entry = window.entry(row, index);
            let offset = entry.l2_table();
            if offset.get() == 0 {
                continue;
            }
            let Some(one) = self.facts.is_one(offset.get() >> self.image.cluster_bits()) else {
                continue;
            };
            if one != entry.is_copied() {
                let image = self.image;
                self.wrong(1, || {
                    let place = Place::of(Structure::ActiveL1)
                        .at(tree.saturating_add(index * 8), 8)
                        .entry(index)
                        .guest(image.guest_offset(index, 0), image.geometry.l2_coverage());
                    (place, words("its L2 table", offset, entry.is_copied()))
                });
            }
            if !scan.is_duplicate(offset.get()) {
                self.table(&TableRef {
                    offset: offset.get(),
                    weight: 1,
                    active_refs: 1,
                    active: true,
                    snapshot: None,
                    l1_index: index,
                    copied: entry.is_copied(),
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
            && self.facts.is_one(cluster).is_some()
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
                    self.facts.is_one(host.get() >> image.cluster_bits())
                };
                if one.is_some_and(|one| one != entry.is_copied()) {
                    self.wrong(at.active_refs, || {
                        let place = image.l2_place(at, index);
                        (place, words("its cluster", host, entry.is_copied()))
                    });
                }
            }
        }
        self.buffer = buffer;
    }

    fn wrong(&mut self, count: u64, tell: impl FnOnce() -> (Place, String)) {
        self.wrong = self.wrong.saturating_add(count);
        self.found.add_with(Code::CopiedWrong, count, tell);
    }
}

fn words(what: &str, host: HostOffset, copied: bool) -> String {
    if copied {
        format!("COPIED is set, but the refcount of {what} at {host} is not 1")
    } else {
        format!("COPIED is clear, but the refcount of {what} at {host} is 1")
    }
}
