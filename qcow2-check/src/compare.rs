//! Refcounts on disk against the references that the walk has met.
//!
//! Refcount blocks are streamed against the reference map, 64 clusters at a time, and whole pages at once where all is as
//! it mostly is: every cluster referenced once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_format::RefcountBlock;

use crate::blocks::{BlockRef, Blocks};
use crate::image::Image;
use crate::reader::is_zero;
use crate::refmap::{PAGE_CLUSTERS, Page, RefMap, mask};
use crate::report::Collector;
use crate::walk::Ordered;
use crate::{Code, Place, Run, Structure};

/// Bytes of refcount blocks that make a unit of work.
const UNIT_BYTES: u64 = 1 << 20;
/// Bytes read at once where blocks lie one behind the other.
const READ_BYTES: usize = 256 << 10;

/// What the comparison gives besides its findings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Compared {
    /// Number of the last cluster with a refcount or a reference, plus 1.
    pub(crate) end: u64,
    pub(crate) leaks: u64,
    pub(crate) corruptions: u64,
    pub(crate) errors: u64,
}

impl Compared {
    /// Whether every refcount is as expected.
    pub(crate) fn is_equal(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0 && self.errors == 0
    }
}

/// Compares all refcounts of clusters below `end` (the file's, and what is referenced behind).
pub(crate) fn compare(image: &Image<'_>, map: &RefMap, blocks: &Blocks, run: &Run<'_>) -> Compared {
    let end = map.end().max(image.file_clusters());
    let per_block = image.geometry.refcounts_per_block();
    let per_unit = (UNIT_BYTES / image.cluster_size()).max(1);
    // Blocks for clusters behind the end are looked at, too: refcounts there are leaks.
    let units = blocks.len().div_ceil(per_unit).saturating_add(1);
    let next = AtomicU64::new(0);
    let pending = Mutex::new(Ordered::default());
    let parts = run.on_each_thread(|| {
        let mut worker = Worker::new(image, map, end, run);
        let mut buffer = Vec::new();
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            if unit >= units || run.is_cancelled() {
                break;
            }
            if unit + 1 == units {
                worker.absent(blocks.len().saturating_mul(per_block), u64::MAX);
            } else {
                let first = unit * per_unit;
                worker.stretches(
                    blocks,
                    first,
                    (first + per_unit).min(blocks.len()),
                    &mut buffer,
                );
            }
            worker.flush();
            let found = std::mem::replace(&mut worker.found, Collector::new(run.limit()));
            if let Ok(mut pending) = pending.lock() {
                pending.deliver(unit, found, run);
            }
            run.progress(image.reader.bytes_read());
        }
        worker.sum
    });
    let mut all = Compared::default();
    for part in parts {
        all.end = all.end.max(part.end);
        all.leaks = all.leaks.saturating_add(part.leaks);
        all.corruptions = all.corruptions.saturating_add(part.corruptions);
        all.errors = all.errors.saturating_add(part.errors);
    }
    all
}

/// Reads the blocks of a stretch of the refcount table; neighbours in the file together. Calls `each` with the index and
/// the block's bytes, or `None` where there is nothing to read or the storage refuses.
pub(crate) fn read_blocks(
    image: &Image<'_>,
    blocks: &Blocks,
    (first, last): (u64, u64),
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(u64, BlockRef, Option<&[u8]>),
) {
    let size = image.geometry.cluster_len();
    let mut index = first;
    while index < last {
        let BlockRef::At(offset) = blocks.get(index) else {
            each(index, blocks.get(index), None);
            index += 1;
            continue;
        };
        let mut count = 1;
        while (count + 1) * size <= READ_BYTES
            && index + (count as u64) < last
            && blocks.get(index + count as u64)
                == BlockRef::At(offset.saturating_add((count * size) as u64))
        {
            count += 1;
        }
        if buffer.len() < count * size {
            buffer.resize(count * size, 0);
        }
        let bytes = buffer.get_mut(..count * size).unwrap_or_default();
        if image.reader.is_known_zero(offset, bytes.len() as u64) {
            bytes.fill(0);
        } else if image.reader.read(bytes, offset).is_err() {
            // One by one, to know which can be read.
            for step in 0..count {
                let bytes = bytes.get_mut(..size).unwrap_or_default();
                let at = offset.saturating_add((step * size) as u64);
                let read = image.reader.read(bytes, at).ok().map(|()| &*bytes);
                each(index + step as u64, BlockRef::At(at), read);
            }
            index += count as u64;
            continue;
        } else if is_zero(bytes) {
            image.reader.met_zero_table(offset);
        }
        for (step, block) in (0_u64..).zip(bytes.chunks_exact(size)) {
            let at = offset.saturating_add(step << image.cluster_bits());
            each(index + step, BlockRef::At(at), Some(block));
        }
        index += count as u64;
    }
}

/// Clusters in a row with the same difference.
#[derive(Clone, Copy, Debug)]
struct Difference {
    first: u64,
    count: u64,
    on_disk: u64,
    expected: u64,
}

struct Worker<'a, 'i> {
    image: &'a Image<'i>,
    map: &'a RefMap,
    end: u64,
    max: u64,
    sum: Compared,
    found: Collector,
    open: Option<Difference>,
    /// Refcounts behind the end, not told yet: first cluster, count.
    behind: Option<(u64, u64)>,
}

impl<'a, 'i> Worker<'a, 'i> {
    fn new(image: &'a Image<'i>, map: &'a RefMap, end: u64, run: &Run<'_>) -> Self {
        Self {
            image,
            map,
            end,
            max: image.geometry.refcount_max(),
            sum: Compared::default(),
            found: Collector::new(run.limit()),
            open: None,
            behind: None,
        }
    }

    /// Compares the stretches `first..last` of the refcount table.
    fn stretches(&mut self, blocks: &Blocks, first: u64, last: u64, buffer: &mut Vec<u8>) {
        let per_block = self.image.geometry.refcounts_per_block();
        let image = self.image;
        let mut absent_from = None;
        read_blocks(
            image,
            blocks,
            (first, last),
            buffer,
            |index, block, bytes| {
                let start = index.saturating_mul(per_block);
                let stop = start.saturating_add(per_block);
                if let (Some(from), true) = (absent_from, block != BlockRef::Absent) {
                    self.absent(from, start);
                    absent_from = None;
                }
                match (block, bytes) {
                    (BlockRef::Absent, _) => absent_from = absent_from.or(Some(start)),
                    (BlockRef::Skipped, _) => self.overflows(start, stop),
                    (BlockRef::At(_), Some(bytes)) => self.block(start, bytes),
                    (BlockRef::At(_) | BlockRef::Unreadable, _) => {
                        self.unreadable(index, block, start, stop);
                    }
                }
            },
        );
        if let Some(from) = absent_from {
            self.absent(from, last.saturating_mul(per_block));
        }
    }

    fn unreadable(&mut self, index: u64, block: BlockRef, start: u64, stop: u64) {
        let stop = stop.min(self.end);
        let lost = stop.saturating_sub(start);
        if lost == 0 {
            return;
        }
        self.overflows(start, stop);
        self.sum.errors = self.sum.errors.saturating_add(lost);
        let bits = self.image.cluster_bits();
        self.found.add_with(Code::RefcountUnreadable, lost, || {
            let mut place = Place::of(Structure::RefcountBlock).entry(index);
            if let BlockRef::At(offset) = block {
                place = place.at(offset, self.image.cluster_size());
            }
            let detail = format!(
                "refcounts of the clusters at {:#x}..{:#x} can't be read",
                start << bits,
                stop << bits
            );
            (place, detail)
        });
    }

    /// Looks for references beyond what refcounts can express, where there are no refcounts to compare with.
    fn overflows(&mut self, from: u64, to: u64) {
        let mut cluster = from;
        let end = to.div_ceil(PAGE_CLUSTERS);
        while let Some(number) = self.map.next_page(cluster / PAGE_CLUSTERS, end) {
            let first = (number * PAGE_CLUSTERS).max(cluster);
            if first >= to {
                return;
            }
            cluster = (number + 1).saturating_mul(PAGE_CLUSTERS);
            if let Some(page) = self.map.page(number).filter(Page::is_shared) {
                for cluster in first..cluster.min(to) {
                    let at = usize::try_from(cluster % PAGE_CLUSTERS).unwrap_or(0);
                    self.overflow(cluster, page.weight(at));
                }
            }
        }
    }

    /// Counts references beyond what refcounts can express.
    fn overflow(&mut self, cluster: u64, weight: u64) {
        if weight <= self.max {
            return;
        }
        let excess = weight - self.max;
        self.sum.corruptions = self.sum.corruptions.saturating_add(excess);
        let image = self.image;
        let max = self.max;
        self.found.add_with(Code::RefcountOverflow, excess, || {
            let place = Place::of(Structure::Cluster)
                .at(cluster << image.cluster_bits(), image.cluster_size());
            (
                place,
                format!("{weight} references, refcounts go up to {max}"),
            )
        });
    }

    /// Compares clusters whose refcounts are 0 since there is no block for them.
    fn absent(&mut self, from: u64, to: u64) {
        let to = to.min(self.end);
        let mut cluster = from;
        while cluster < to {
            let end = to.div_ceil(PAGE_CLUSTERS);
            let Some(number) = self.map.next_page(cluster / PAGE_CLUSTERS, end) else {
                return;
            };
            let first = (number * PAGE_CLUSTERS).max(cluster);
            let last = (number + 1).saturating_mul(PAGE_CLUSTERS).min(to);
            if first >= to {
                return;
            }
            if let Some(page) = self.map.page(number) {
                self.words(first, last, Some(page), |_| (0, 0), |_| 0);
            }
            cluster = (number + 1).saturating_mul(PAGE_CLUSTERS);
        }
    }

    /// Compares the refcounts of a block, whose first one is for cluster `start`.
    fn block(&mut self, start: u64, bytes: &[u8]) {
        let block = RefcountBlock::new(bytes, self.image.geometry);
        let len = block.len() as u64;
        let mut cluster = start;
        while cluster < start + len {
            let stop = (start + len).min((cluster / PAGE_CLUSTERS + 1) * PAGE_CLUSTERS);
            let page = self.map.page(cluster / PAGE_CLUSTERS);
            let uniform = match page.map(|page| page.uniform()) {
                None => Some(0),
                Some(Some(1)) if stop - cluster < PAGE_CLUSTERS => None,
                Some(uniform) => uniform,
            };
            let at = usize::try_from(cluster - start).unwrap_or(usize::MAX);
            if uniform == Some(1) {
                let far = self.ones_end(stop, (start + len).min(self.end));
                let count = usize::try_from(far - cluster).unwrap_or(0);
                if far > stop && block.all_equal(at, count, 1) {
                    self.sum.end = self.sum.end.max(far);
                    cluster = far;
                    continue;
                }
            }
            let count = usize::try_from(stop - cluster).unwrap_or(0);
            if stop <= self.end && uniform.is_some_and(|value| block.all_equal(at, count, value)) {
                if uniform == Some(1) {
                    self.sum.end = self.sum.end.max(stop);
                }
            } else if cluster >= self.end && block.all_equal(at, count, 0) {
                // Nothing here, and nothing expected.
            } else {
                let offset = |cluster: u64| usize::try_from(cluster - start).unwrap_or(usize::MAX);
                self.words(
                    cluster,
                    stop,
                    page,
                    |cluster| block.ones_and_others(offset(cluster)),
                    |cluster| block.get(offset(cluster)).unwrap_or(0),
                );
            }
            cluster = stop;
        }
    }

    /// How far pages go on, from `cluster` on and up to `end`, in which every cluster is referenced once; not very far, as
    /// the comparison that follows may have to be repeated page by page.
    fn ones_end(&self, cluster: u64, end: u64) -> u64 {
        let end = end.min(cluster + 7 * PAGE_CLUSTERS);
        let mut stop = cluster;
        while stop + PAGE_CLUSTERS <= end
            && let Some(page) = self.map.page(stop / PAGE_CLUSTERS)
            && page.uniform() == Some(1)
        {
            stop += PAGE_CLUSTERS;
        }
        stop
    }

    /// Compares clusters within one page, 64 at a time. `masks` tells which of 64 refcounts are 1 and which are more.
    fn words(
        &mut self,
        from: u64,
        to: u64,
        page: Option<Page<'_>>,
        masks: impl Fn(u64) -> (u64, u64),
        value: impl Fn(u64) -> u64,
    ) {
        let mut cluster = from;
        while cluster < to {
            let base = cluster & !63;
            let stop = to.min(base + 64);
            let (ones, others) = masks(base);
            let word = usize::try_from(base % PAGE_CLUSTERS / 64).unwrap_or(0);
            let (seen, multi) = page.map_or((0, 0), |page| page.word(word));
            #[expect(clippy::cast_possible_truncation, reason = "up to 64")]
            let within = |c: u64| c.clamp(base, base + 64).wrapping_sub(base) as u32;
            let valid = mask(within(cluster), within(stop.min(self.end.max(cluster))));
            let any = (ones | others | seen) & valid;
            if any != 0 {
                self.sum.end = self.sum.end.max(base + 64 - u64::from(any.leading_zeros()));
            }
            let once = seen & !multi;
            let wrong = ((ones ^ once) | others) & !multi & valid;
            if wrong == u64::MAX && others == 0 && (ones == u64::MAX || once == u64::MAX) {
                let on_disk = u64::from(ones == u64::MAX);
                self.differ(base, 64, on_disk, 1 - on_disk);
            } else {
                let mut left = wrong | multi & valid;
                while left != 0 {
                    let bit = u64::from(left.trailing_zeros());
                    left &= left - 1;
                    self.one(base + bit, page, value(base + bit));
                }
            }
            let behind = mask(within(self.end.max(cluster)), within(to)) & (ones | others);
            if behind != 0 {
                self.behind(base, behind);
            }
            cluster = stop;
        }
    }

    /// Compares one cluster.
    fn one(&mut self, cluster: u64, page: Option<Page<'_>>, on_disk: u64) {
        let at = usize::try_from(cluster % PAGE_CLUSTERS).unwrap_or(0);
        let weight = page.map_or(0, |page| page.weight(at));
        self.overflow(cluster, weight);
        let expected = weight.min(self.max);
        if on_disk != expected {
            self.differ(cluster, 1, on_disk, expected);
        }
    }

    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        if on_disk > expected {
            self.sum.leaks = self.sum.leaks.saturating_add(count);
        } else {
            self.sum.corruptions = self.sum.corruptions.saturating_add(count);
        }
        match &mut self.open {
            Some(open)
                if open.first + open.count == first
                    && open.on_disk == on_disk
                    && open.expected == expected =>
            {
                open.count += count;
            }
            _ => {
                self.flush_difference();
                self.open = Some(Difference {
                    first,
                    count,
                    on_disk,
                    expected,
                });
            }
        }
    }

    fn behind(&mut self, base: u64, bits: u64) {
        let count = u64::from(bits.count_ones());
        let first = base + u64::from(bits.trailing_zeros());
        match &mut self.behind {
            Some((_, sum)) => *sum = sum.saturating_add(count),
            None => self.behind = Some((first, count)),
        }
    }

    fn flush_difference(&mut self) {
        let Some(Difference {
            first,
            count,
            on_disk,
            expected,
        }) = self.open.take()
        else {
            return;
        };
        let code = if on_disk == 0 {
            Code::RefcountMissing
        } else if on_disk < expected {
            Code::RefcountLow
        } else {
            Code::Leak
        };
        let image = self.image;
        self.found.add_with(code, count, || {
            let bits = image.cluster_bits();
            let place = Place::of(Structure::Cluster).at(first << bits, count << bits);
            let detail = if count == 1 {
                format!("refcount {on_disk}, references {expected}")
            } else {
                format!("{count} clusters: refcount {on_disk}, references {expected}")
            };
            (place, detail)
        });
    }

    fn flush(&mut self) {
        self.flush_difference();
        if let Some((first, count)) = self.behind.take() {
            let image = self.image;
            self.found.add_with(Code::RefcountPastEnd, count, || {
                let place = Place::of(Structure::File).at(first << image.cluster_bits(), 0);
                (
                    place,
                    format!("{count} clusters from here on have refcounts"),
                )
            });
        }
    }
}
