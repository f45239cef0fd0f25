//! The driver `blkdebug`: faults, limits and pauses on command, for tests.
//!
//! Of its work on metadata the engine tells before each step, which is then an event of a name that scripts know. What is read, and all data,
//! tells itself by where it lies, once the image is open.

mod aligned;
mod events;
mod rules;

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};

use qcow2_image::{Image, Probe};
use qcow2_io::{
    Extent, Limits, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags,
};
use rustix::io::Errno;

use self::aligned::Blocks;
use self::rules::{IoType, Rules};
use super::{Content, Node, NodeOptions, OpenError};
use crate::Console;

/// Zeros are written as data in pieces of this many bytes.
const ZEROS: u64 = 1 << 20;

/// A storage with faults, limits and pauses.
#[derive(Debug)]
pub struct Blkdebug {
    below: Arc<dyn Storage>,
    rules: Mutex<Rules>,
    limits: Limits,
    /// What it takes whole blocks of, if that was asked for.
    align: Option<u64>,
    blocks: Blocks,
    /// How zeros are written without data.
    zeros: Pieces,
    /// What is below, if that is an image.
    below_image: Option<Arc<Image>>,
    /// The image that lies in here, once it is open.
    image: OnceLock<Weak<Image>>,
    pauses: Mutex<Pauses>,
    changed: Condvar,
}

/// The pieces that a kind of request is done in; bytes, 0 for any.
#[derive(Clone, Copy, Debug, Default)]
struct Pieces {
    /// Only multiples of this are done.
    unit: u64,
    /// None is longer.
    max: u64,
}

impl Pieces {
    fn take_from(options: &mut NodeOptions, kind: &str) -> std::result::Result<Self, OpenError> {
        let mut take = |key: String| options.take_size(&key).map(Option::unwrap_or_default);
        Ok(Self {
            unit: take(format!("opt-{kind}"))?,
            max: take(format!("max-{kind}"))?,
        })
    }

    /// The part of a range that consists of whole units; it is empty where there is none.
    fn inside(self, range: &Range<u64>) -> Range<u64> {
        let unit = self.unit.max(1);
        let start = range.start.next_multiple_of(unit);
        let end = range.end / unit * unit;
        if start < end {
            start..end
        } else {
            range.end..range.end
        }
    }
}

#[derive(Debug, Default)]
struct Pauses {
    /// Events that stop a request, with the tag it gets.
    wanted: Vec<(String, String)>,
    /// Tags of requests that stand still.
    stopped: Vec<String>,
}

/// Takes the node apart: rules and limits, and what is below.
pub(super) fn open(
    mut options: NodeOptions,
    described: NodeOptions,
    below: Node,
) -> std::result::Result<Node, OpenError> {
    let mut rules = Rules::take_from(&mut options)?;
    if let Some(path) = options.take("config").filter(|path| !path.is_empty()) {
        let text = fs::read_to_string(&path).map_err(|error| {
            OpenError::new(format!(
                "Could not read blkdebug config file: {}",
                crate::words::system::describe(&error)
            ))
        })?;
        rules.add_config(&text)?;
    }
    let storage = below.storage();
    let mut limits = storage.limits();
    let align = options.take_size("align")?;
    if let Some(align) = align {
        if !align.is_power_of_two() || align >= 1 << 31 {
            return Err(OpenError::new(format!(
                "Cannot meet constraints with align {align}"
            )));
        }
        limits.alignment = align;
    }
    if let Some(max) = options.take_size("max-transfer")?.filter(|max| *max > 0) {
        limits.max_transfer = max;
    }
    let zeros = Pieces::take_from(&mut options, "write-zero")?;
    // Discards that are too small are only hints that were not taken, and large ones are the same in pieces.
    Pieces::take_from(&mut options, "discard")?;
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block protocol 'blkdebug' doesn't support the option '{key}'"
        )));
    }
    let debug = Arc::new(Blkdebug {
        below: storage,
        below_image: below.image().cloned(),
        rules: Mutex::new(rules),
        limits,
        align: align.filter(|align| *align > 1),
        blocks: Blocks::default(),
        zeros,
        image: OnceLock::new(),
        pauses: Mutex::default(),
        changed: Condvar::new(),
    });
    Ok(Node {
        driver: "blkdebug",
        filename: below.filename.clone(),
        options: described,
        content: match below.image() {
            Some(image) => Content::Filtered(Arc::clone(image), Arc::clone(&debug) as _),
            None => Content::Plain(Arc::clone(&debug) as _),
        },
        writable: below.writable,
        children: vec![("image", below)],
        debug: Some(debug),
    })
}

impl Blkdebug {
    /// What lies in here is this image.
    pub(super) fn holds(&self, image: &Arc<Image>) {
        let _ = self.image.set(Arc::downgrade(image));
    }

    /// What writes fail with by now, one having failed that is not to be the only one.
    pub(crate) fn stuck(&self) -> Option<Errno> {
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.stuck()
    }

    /// Lets the next request that is this event stand still, under this tag.
    pub(crate) fn pause(&self, event: &str, tag: &str) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        pauses.wanted.push((event.to_owned(), tag.to_owned()));
    }

    /// Forgets the pauses of a tag, and lets its request go on; whether there was one.
    pub(crate) fn forget(&self, tag: &str) -> bool {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pauses.wanted.len() + pauses.stopped.len();
        pauses.wanted.retain(|(_, known)| known != tag);
        pauses.stopped.retain(|known| known != tag);
        self.changed.notify_all();
        before != pauses.wanted.len() + pauses.stopped.len()
    }

    /// Lets the request of a tag go on; whether one stood still.
    pub(crate) fn resume(&self, tag: &str, console: &Console) -> bool {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = pauses.stopped.iter().position(|known| known == tag) else {
            return false;
        };
        pauses.stopped.remove(at);
        console.out(format_args!("blkdebug: Resuming request '{tag}'\n"));
        console.flush();
        self.changed.notify_all();
        true
    }

    /// Waits until a request of this tag stands still.
    pub(crate) fn wait(&self, tag: &str) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        while !pauses.stopped.iter().any(|known| known == tag) {
            pauses = self
                .changed
                .wait(pauses)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stands still if that is wanted.
    fn stop_at(&self, event: &str) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = pauses.wanted.iter().position(|(known, _)| known == event) else {
            return;
        };
        let (_, tag) = pauses.wanted.remove(at);
        // Told at once, and by whom it happens to: the console of the commands is not at hand here.
        Console::tell(format_args!("blkdebug: Suspended request '{tag}'\n"));
        pauses.stopped.push(tag.clone());
        self.changed.notify_all();
        while pauses.stopped.contains(&tag) {
            pauses = self
                .changed
                .wait(pauses)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Events of the image that is about to lie in here.
    pub(super) fn probe(self: &Arc<Self>) -> Probe {
        let this = Arc::clone(self);
        Probe::new(move |step| this.step(step))
    }

    /// Lets a request happen, or fail.
    fn pass(&self, kind: IoType, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let event = match kind {
            IoType::Read => self.reading(offset),
            IoType::Flush => "flush_to_disk",
            IoType::BlockStatus => "none",
            _ => self.writing(offset),
        };
        self.stop_at(event);
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        match rules.happen(event, kind, offset, len) {
            Some(errno) => Err(StorageError::from_io(operation, errno).at(offset, len)),
            None => Ok(()),
        }
    }
}

impl Blkdebug {
    fn write_data_of_zeros(&self, range: Range<u64>) -> Result<()> {
        let zeros = vec![0; usize::try_from(ZEROS.min(range.end - range.start)).unwrap_or(0)];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS);
            let bytes = zeros.get(..usize::try_from(len).unwrap_or(0));
            self.below.write_at(bytes.unwrap_or_default(), at)?;
            at += len;
        }
        Ok(())
    }
}

fn len_of<T: std::ops::Deref<Target = [u8]>>(bufs: &[T]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

impl Storage for Blkdebug {
    fn len(&self) -> Result<u64> {
        self.below.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.pass(IoType::Read, Operation::Read, offset, len_of(bufs))?;
        self.below.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let _held = self.read_around(offset, len_of(bufs))?;
        self.event("pwritev")?;
        self.pass(IoType::Write, Operation::Write, offset, len_of(bufs))?;
        self.below.write_vectored_at(bufs, offset)?;
        self.event("pwritev_done")
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        self.pass(
            IoType::WriteZeroes,
            Operation::WriteZeroes,
            range.start,
            len,
        )?;
        let inside = self.zeros.inside(&range);
        let edges = [range.start..inside.start, inside.end..range.end];
        if flags.contains(ZeroFlags::NO_FALLBACK) && edges.iter().any(|edge| !edge.is_empty()) {
            return Err(StorageError::new(
                Operation::WriteZeroes,
                StorageErrorKind::Unsupported,
            ));
        }
        for edge in edges {
            self.write_data_of_zeros(edge)?;
        }
        let step = if self.zeros.max == 0 {
            u64::MAX
        } else {
            self.zeros.max
        };
        let mut at = inside.start;
        while at < inside.end {
            let end = at.saturating_add(step).min(inside.end);
            self.below.write_zeroes(at..end, flags)?;
            at = end;
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        self.pass(IoType::Discard, Operation::Discard, range.start, len)?;
        match &self.below_image {
            // Parts of clusters stay, as in the image itself.
            Some(image) => image
                .discard_whole(range)
                .map_err(|error| super::storage_error(Operation::Discard, &error)),
            None => self.below.discard(range),
        }
    }

    fn flush(&self) -> Result<()> {
        self.pass(IoType::Flush, Operation::Flush, 0, 0)?;
        self.below.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.below.set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        let len = range.end.saturating_sub(range.start);
        self.pass(IoType::BlockStatus, Operation::Extents, range.start, len)?;
        self.below.extents(range, max)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.below.allocated()
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}
