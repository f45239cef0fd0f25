//! A virtual machine monitor in small: one image, several guest queues, one event loop.
//!
//! ```text
//! multi_queue IMAGE [REQUESTS]     makes IMAGE, and runs so many requests on each queue (1000)
//! ```
//!
//! Each guest queue has a [`Queue`] of its own over the same image, whose eventfd the loop polls. So the loop
//! never waits for a disk. The guests here are made up: each has a part of the disk for itself, writes, reads, discards
//! and flushes at random, remembers what must be there, and checks every read; at last, all is read once more.
#![expect(
    clippy::print_stderr,
    reason = "a program tells its user what went wrong"
)]

use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Arc;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_image::queue::{Completion, Full, Queue, Request};
use qcow2_io::{FileOptions, Storage};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Guest queues.
const GUESTS: u64 = 4;
/// Blocks of each guest.
const BLOCKS: usize = 512;
/// Bytes in a block.
const BLOCK: u64 = 4096;
/// Requests that a guest has under way at most.
const DEPTH: usize = 32;
/// Threads of each queue.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Err(error) = run(&args, &mut io::stdout().lock()) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("multi_queue: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    ExitCode::FAILURE
}

/// The program. What it prints goes to `out`.
pub(crate) fn run(args: &[OsString], out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let (path, requests) = match args {
        [path] => (path, 1000),
        [path, requests] => {
            let number = requests.to_str().and_then(|text| text.parse().ok());
            let number = number.ok_or_else(|| format!("{} is no number", requests.display()))?;
            (path, number)
        }
        _ => return Err("usage: multi_queue IMAGE [REQUESTS]".into()),
    };
    let file = FileOptions::new().write(true).create_new(true).open(path)?;
    Image::create(&file, &CreateOptions::new(GUESTS * BLOCKS as u64 * BLOCK))?;
    let image = Arc::new(Image::options().open_file(file)?);

    let mut guests = (0..GUESTS)
        .map(|number| Guest::new(&image, number, requests))
        .collect::<io::Result<Vec<_>>>()?;
    monitor(&mut guests)?;
    for guest in &guests {
        guest.check_all(&*image)?;
    }
    // The queues hold the image, too. When they are gone it can be closed, which says whether that worked.
    drop(guests);
    let image = Arc::into_inner(image).ok_or("a queue still holds the image")?;
    image.close()?;
    writeln!(
        out,
        "{} requests on {GUESTS} queues, all data as written",
        requests * GUESTS
    )?;
    Ok(())
}

/// The event loop: until every guest is through, waits for completions of any, and lets the guests go on.
fn monitor(guests: &mut [Guest]) -> Result<(), Box<dyn Error>> {
    for guest in guests.iter_mut() {
        guest.submit();
    }
    while guests.iter().any(|guest| !guest.is_done()) {
        let mut descriptors: Vec<PollFd<'_>> = guests
            .iter()
            .map(|guest| PollFd::new(&guest.queue, PollFlags::IN))
            .collect();
        // A monitor waits here for its guests' doorbells, timers and sockets as well.
        match poll(&mut descriptors, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let ready: Vec<bool> = descriptors
            .iter()
            .map(|descriptor| !descriptor.revents().is_empty())
            .collect();
        for (guest, _) in guests.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            // First, so that what completes from here on makes the descriptor readable again.
            guest.queue.acknowledge();
            while let Some(completion) = guest.queue.poll() {
                guest.complete(completion)?;
            }
            guest.submit();
        }
    }
    Ok(())
}

/// What a guest asked for.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Read(usize),
    Write(usize, u64),
    Discard(usize),
    Flush,
}

/// A guest with a part of the disk for itself.
struct Guest {
    queue: Queue,
    number: u64,
    /// Requests not yet made.
    left: u64,
    next_id: u64,
    under_way: HashMap<u64, Asked>,
    /// What each block holds: zeros, or a stamp again and again.
    stamps: Vec<u64>,
    /// Blocks with a request under way. What two requests to one block at the same time do is nobody's promise.
    busy: Vec<bool>,
    random: u64,
}

impl Guest {
    fn new(image: &Arc<Image>, number: u64, requests: u64) -> io::Result<Self> {
        let disk: Arc<dyn Storage> = image.clone();
        Ok(Self {
            queue: Queue::new(&disk, WORKERS, DEPTH)?,
            number,
            left: requests,
            next_id: 0,
            under_way: HashMap::new(),
            stamps: vec![0; BLOCKS],
            busy: vec![false; BLOCKS],
            random: number.wrapping_add(0x9e37_79b9_7f4a_7c15),
        })
    }

    fn is_done(&self) -> bool {
        self.left == 0 && self.under_way.is_empty()
    }

    /// Where a block is on the disk; the guests take turns, so that their blocks share clusters.
    fn place(&self, block: usize) -> Range<u64> {
        let start = (block as u64 * GUESTS + self.number) * BLOCK;
        start..start + BLOCK
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Makes requests until the queue is full or none is left.
    fn submit(&mut self) {
        while self.left > 0 {
            let (asked, request) = self.choose();
            match self.queue.submit(self.next_id, request) {
                Ok(()) => {
                    self.mark(asked, true);
                    self.under_way.insert(self.next_id, asked);
                    self.next_id += 1;
                    self.left -= 1;
                }
                // It is made anew when something has completed. A real guest's request would be kept.
                Err(Full(_)) => return,
            }
        }
    }

    fn choose(&mut self) -> (Asked, Request) {
        let (what, which) = (self.random() % 100, self.random());
        // There are more blocks than requests under way, so one is free.
        let first = usize::try_from(which % BLOCKS as u64).unwrap_or(0);
        let block = (first..BLOCKS)
            .chain(0..first)
            .find(|block| self.busy.get(*block) == Some(&false));
        let Some(block) = block.filter(|_| what < 97) else {
            return (Asked::Flush, Request::Flush);
        };
        let range = self.place(block);
        match what {
            0..45 => {
                let stamp = self.random();
                let request = Request::Write {
                    offset: range.start,
                    buf: stamped(stamp),
                };
                (Asked::Write(block, stamp), request)
            }
            45..90 => {
                let request = Request::Read {
                    offset: range.start,
                    buf: stamped(u64::MAX),
                };
                (Asked::Read(block), request)
            }
            _ => (Asked::Discard(block), Request::Discard { range }),
        }
    }

    fn mark(&mut self, asked: Asked, is_busy: bool) {
        let (Asked::Read(block) | Asked::Write(block, _) | Asked::Discard(block)) = asked else {
            return;
        };
        if let Some(busy) = self.busy.get_mut(block) {
            *busy = is_busy;
        }
    }

    fn complete(&mut self, completion: Completion) -> Result<(), Box<dyn Error>> {
        let asked = self
            .under_way
            .remove(&completion.id)
            .ok_or("a completion of no request")?;
        // A monitor hands the error to its guest instead.
        completion.result?;
        self.mark(asked, false);
        match asked {
            Asked::Read(block) => self.check(block, &completion.buf.unwrap_or_default())?,
            Asked::Write(block, stamp) => self.remember(block, stamp),
            Asked::Discard(block) => self.remember(block, 0),
            Asked::Flush => {}
        }
        Ok(())
    }

    fn remember(&mut self, block: usize, stamp: u64) {
        if let Some(place) = self.stamps.get_mut(block) {
            *place = stamp;
        }
    }

    fn check(&self, block: usize, found: &[u8]) -> Result<(), Box<dyn Error>> {
        let expected = self.stamps.get(block).map(|stamp| stamped(*stamp));
        if expected.as_deref() == Some(found) {
            return Ok(());
        }
        let (guest, place) = (self.number, self.place(block));
        Err(format!("guest {guest} finds other bytes at {place:?} than it wrote").into())
    }

    /// Reads all blocks, past the queue.
    fn check_all(&self, disk: &dyn Storage) -> Result<(), Box<dyn Error>> {
        let mut buf = stamped(u64::MAX);
        for block in 0..BLOCKS {
            disk.read_at(&mut buf, self.place(block).start)?;
            self.check(block, &buf)?;
        }
        Ok(())
    }
}

/// A block full of one number.
fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_be_bytes().repeat(512)
}
