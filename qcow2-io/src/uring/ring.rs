//! One ring, and transfers through it.
//!
//! The kernel reads and writes the buffers of a batch while it is under way. So nothing here returns, not even by a panic or
//! after a failed wait, before every transfer that the kernel has taken is complete.
#![expect(
    unsafe_code,
    reason = "the kernel is handed pointers to buffers; the only unsafe code for io_uring"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use crate::{Op, Request};

/// The most transfers under way at once. The completion queue holds twice as many, so it can't overflow.
pub(super) const DEPTH: usize = 64;

/// The file, under the number it is registered by.
const FILE: types::Fixed = types::Fixed(0);

/// A ring for transfers of one file.
pub(super) struct Ring {
    uring: IoUring,
    /// Lets the next wait fail when the transfers are under way.
    #[cfg(test)]
    pub(super) break_wait: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Asks the kernel for a ring; refused by old kernels, and where an administrator or a sandbox says no.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let entries = u32::try_from(DEPTH).unwrap_or(1);
        // A newer kernel need not interrupt a thread that waits anyway, nor look entries up in a second table.
        let uring = IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .setup_no_sqarray()
            .build(entries)
            .or_else(|_| IoUring::builder().dontfork().build(entries))?;
        // Came with the plain reads and writes.
        if !uring.params().is_feature_rw_cur_pos() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        uring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            uring,
            #[cfg(test)]
            break_wait: false,
        })
    }

    /// Carries out the transfers of a batch that `fits` picks. Those that moved all their bytes are completed; what is
    /// left without a result, for whatever reason, is for plain calls.
    ///
    /// # Errors
    ///
    /// When the ring can't be used any more. Nothing is under way then, either.
    pub(super) fn run(
        &mut self,
        ops: &mut [Op<'_>],
        fits: impl Fn(&Op<'_>) -> bool,
    ) -> io::Result<()> {
        ops.chunks_mut(DEPTH)
            .try_for_each(|chunk| self.run_chunk(chunk, &fits))
    }

    fn run_chunk(&mut self, ops: &mut [Op<'_>], fits: &impl Fn(&Op<'_>) -> bool) -> io::Result<()> {
        #[cfg(test)]
        let break_wait = self.break_wait;
        let mut flight = Flight {
            uring: &mut self.uring,
            aloft: 0,
            moved: [-1; DEPTH],
            #[cfg(test)]
            break_wait,
        };
        let mut queue = flight.uring.submission();
        for (tag, op) in (0..).zip(ops.iter_mut()) {
            if !fits(op) {
                continue;
            }
            let Some(entry) = entry(op.request_mut(), tag) else {
                continue;
            };
            // SAFETY: the entry points to buffers, or to a list of them, that `op` borrows: writable ones for a read. `ops` is
            // borrowed exclusively until this function ends, and nobody touches the operation before `land` has returned.
            // Only `fly` hands entries to the kernel, and `flight` can't go away, be it by a panic, without `land`, which
            // returns when the kernel is done with all that it took. What it never took stays in a ring that is not
            // used again: the error that leads there makes the caller drop it, a panic poisons its lock.
            if unsafe { queue.push(&entry) }.is_err() {
                break;
            }
            flight.aloft = flight.aloft.saturating_add(1);
        }
        drop(queue);
        let result = flight.fly();
        flight.land();
        for (op, moved) in ops.iter_mut().zip(flight.moved) {
            if moved > 0 && u64::try_from(moved).ok() == len(op.request()) {
                op.complete(Ok(()));
            }
        }
        result
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes its time to clear a closed ring away, and would keep the file and its locks meanwhile. If this
        // fails, that is how it is.
        let _ = self.uring.submitter().unregister_files();
    }
}

/// Transfers on their way.
struct Flight<'a> {
    uring: &'a mut IoUring,
    /// Entries that were queued and are not complete.
    aloft: usize,
    /// By the operation's place in the chunk: how many bytes were moved; negative if none were.
    moved: [i32; DEPTH],
    #[cfg(test)]
    break_wait: bool,
}

impl Flight<'_> {
    /// Submits all entries and waits for them.
    fn fly(&mut self) -> io::Result<()> {
        while self.aloft > 0 {
            #[cfg(test)]
            if self.break_wait {
                self.uring.submit()?;
                return Err(io::ErrorKind::Other.into());
            }
            match self.uring.submit_and_wait(self.aloft) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.collect();
        }
        Ok(())
    }

    /// Takes note of what is complete.
    fn collect(&mut self) {
        for completion in self.uring.completion() {
            self.aloft = self.aloft.saturating_sub(1);
            let place = usize::try_from(completion.user_data()).ok();
            if let Some(moved) = place.and_then(|place| self.moved.get_mut(place)) {
                *moved = completion.result();
            }
        }
    }

    /// Returns when nothing is under way. Needs no system call to succeed: completions show up in memory.
    fn land(&mut self) {
        loop {
            self.collect();
            let never_taken = self.uring.submission().len();
            if self.aloft <= never_taken {
                return;
            }
            // Entering the kernel is where a task's completions are delivered.
            std::thread::yield_now();
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.land();
    }
}

/// The entry for a transfer, which carries a tag.
#[inline]
fn entry(request: &mut Request<'_>, tag: u64) -> Option<Entry> {
    Some(match request {
        Request::Read { buf, offset } => {
            let len = u32::try_from(buf.len()).ok()?;
            opcode::Read::new(FILE, buf.as_mut_ptr(), len)
                .offset(*offset)
                .build()
                .user_data(tag)
        }
        Request::Write { buf, offset } => {
            let len = u32::try_from(buf.len()).ok()?;
            opcode::Write::new(FILE, buf.as_ptr(), len)
                .offset(*offset)
                .build()
                .user_data(tag)
        }
        // The standard library promises that its slices for vectored transfers are the system's structure.
        Request::ReadVectored { bufs, offset } => {
            let count = u32::try_from(bufs.len()).ok()?;
            opcode::Readv::new(FILE, bufs.as_mut_ptr().cast_const().cast(), count)
                .offset(*offset)
                .build()
                .user_data(tag)
        }
        Request::WriteVectored { bufs, offset } => {
            let count = u32::try_from(bufs.len()).ok()?;
            opcode::Writev::new(FILE, bufs.as_ptr().cast(), count)
                .offset(*offset)
                .build()
                .user_data(tag)
        }
        Request::WriteZeroes { .. } | Request::Discard { .. } => return None,
    })
}

/// How many bytes a transfer is to move.
fn len(request: &Request<'_>) -> Option<u64> {
    Some(match request {
        Request::Read { buf, .. } => buf.len() as u64,
        Request::Write { buf, .. } => buf.len() as u64,
        Request::ReadVectored { bufs, .. } => crate::storage::total_len(bufs),
        Request::WriteVectored { bufs, .. } => crate::storage::total_len(bufs),
        Request::WriteZeroes { .. } | Request::Discard { .. } => return None,
    })
}
