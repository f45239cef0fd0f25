//! Refcounts on disk against the references that the walk has met.
//!
//! Refcount blocks are streamed against the reference map, 64 clusters at a time, and whole pages at once where all is as
//! it mostly is: every cluster referenced once.

mod findings;

use qcow2_format::RefcountBlock;

use crate::Run;
use crate::blocks::{BlockRef, Blocks};
use crate::image::Image;
use crate::reader::is_zero;
use crate::refmap::{PAGE_CLUSTERS, Page, RefMap, mask};
use crate::units::Ordered;

pub(crate) use findings::Findings;

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
    let plan = Plan::new(image, blocks);
    let ordered = Ordered::new(run);
    let workers = run.share_out(
        plan.units,
        || {
            let findings = Findings::new(image, run.limit());
            (Comparison::new(image, map, end, findings), Vec::new())
        },
        |(comparison, buffer), unit| {
            comparison.unit(&plan, unit, buffer);
            let findings = &mut comparison.judge;
            findings.flush();
            ordered.deliver(unit, &mut findings.found);
            run.progress(image.reader.bytes_read());
        },
    );
    let mut all = Compared::default();
    for (comparison, _) in workers {
        let sum = comparison.judge.sum;
        all.end = all.end.max(comparison.used_end);
        all.leaks = all.leaks.saturating_add(sum.leaks);
        all.corruptions = all.corruptions.saturating_add(sum.corruptions);
        all.errors = all.errors.saturating_add(sum.errors);
    }
    all
}

/// How the comparison is divided into units, in the order of the clusters.
pub(crate) struct Plan<'a> {
    blocks: &'a Blocks,
    per_unit: u64,
    pub(crate) units: u64,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(image: &Image<'_>, blocks: &'a Blocks) -> Self {
        let per_unit = (UNIT_BYTES / image.cluster_size()).max(1);
        Self {
            blocks,
            per_unit,
            // The last one is for clusters that the refcount table does not reach.
            units: blocks.len().div_ceil(per_unit).saturating_add(1),
        }
    }
}

/// What becomes of the differences that a comparison meets, cluster by cluster in ascending order within a unit.
pub(crate) trait Judge {
    /// `count` clusters from `first` on have the refcount `on_disk`, but should have `expected`.
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64);

    /// Those of the 64 clusters from `base` on whose bits are set lie behind the end and have refcounts: `value` tells them.
    fn behind(&mut self, base: u64, bits: u64, value: impl Fn(u64) -> u64);

    /// A cluster has `weight` references, and refcounts only go up to `max`.
    fn overflow(&mut self, cluster: u64, weight: u64, max: u64);

    /// Refcounts of the clusters `start..stop` can't be read: those of block number `index`.
    fn unreadable(&mut self, index: u64, block: BlockRef, start: u64, stop: u64);
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

/// Refcounts against references.
pub(crate) struct Comparison<'a, 'i, J> {
    image: &'a Image<'i>,
    map: &'a RefMap,
    /// The cluster behind the last one that may have references.
    end: u64,
    max: u64,
    /// The cluster behind the last one met below `end` that has a refcount or a reference.
    used_end: u64,
    pub(crate) judge: J,
}

impl<'a, 'i, J: Judge> Comparison<'a, 'i, J> {
    pub(crate) fn new(image: &'a Image<'i>, map: &'a RefMap, end: u64, judge: J) -> Self {
        Self {
            image,
            map,
            end,
            max: image.geometry.refcount_max(),
            used_end: 0,
            judge,
        }
    }

    /// Compares the clusters of a unit.
    pub(crate) fn unit(&mut self, plan: &Plan<'_>, unit: u64, buffer: &mut Vec<u8>) {
        let len = plan.blocks.len();
        if unit + 1 < plan.units {
            let first = unit * plan.per_unit;
            self.stretches(plan.blocks, first, (first + plan.per_unit).min(len), buffer);
        } else {
            let per_block = self.image.geometry.refcounts_per_block();
            self.absent(len.saturating_mul(per_block), u64::MAX);
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
        if start < stop {
            self.overflows(start, stop);
            self.judge.unreadable(index, block, start, stop);
        }
    }

    /// Looks for references beyond what refcounts can express, without refcounts to compare with.
    pub(crate) fn overflows(&mut self, from: u64, to: u64) {
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
        if weight > self.max {
            self.judge.overflow(cluster, weight, self.max);
        }
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
                    self.used_end = self.used_end.max(far);
                    cluster = far;
                    continue;
                }
            }
            let count = usize::try_from(stop - cluster).unwrap_or(0);
            if stop <= self.end && uniform.is_some_and(|value| block.all_equal(at, count, value)) {
                if uniform == Some(1) {
                    self.used_end = self.used_end.max(stop);
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
                self.used_end = self
                    .used_end
                    .max(base + 64 - u64::from(any.leading_zeros()));
            }
            let once = seen & !multi;
            let wrong = ((ones ^ once) | others) & !multi & valid;
            if wrong == u64::MAX && others == 0 && (ones == u64::MAX || once == u64::MAX) {
                let on_disk = u64::from(ones == u64::MAX);
                self.judge.differ(base, 64, on_disk, 1 - on_disk);
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
                self.judge.behind(base, behind, &value);
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
            self.judge.differ(cluster, 1, on_disk, expected);
        }
    }
}
