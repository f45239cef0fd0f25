//! Requests that complete later: for a monitor whose event loop must not wait for a disk.
//!
//! A [`Queue`] has worker threads that run requests on a storage, an [`Image`](crate::Image) mostly, and a file descriptor
//! that becomes readable when some are complete. Requests own their buffers and give them back.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use qcow2_io::{Op, Result as StorageResult, Storage, ZeroFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

/// Most requests that a worker takes at once, to hand them down as one batch.
const BATCH_MAX: usize = 32;

/// What is to be done.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request {
    /// Fill the buffer with the bytes from `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// As long as the read shall be.
        buf: Vec<u8>,
    },
    /// Store the buffer from `offset` on.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        buf: Vec<u8>,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// The bytes meant.
        range: Range<u64>,
        /// How it may be done.
        flags: ZeroFlags,
    },
    /// Give a range back.
    Discard {
        /// The bytes meant.
        range: Range<u64>,
    },
    /// Make all that was complete when this was submitted durable.
    Flush,
}

/// A request that is through.
#[derive(Debug)]
pub struct Completion {
    /// What it was submitted as.
    pub id: u64,
    /// Whether it worked.
    pub result: StorageResult<()>,
    /// The buffer of a read or write.
    pub buf: Option<Vec<u8>>,
}

/// The queue has as many requests under way as it takes; the request comes back.
#[derive(Debug)]
pub struct Full(pub Request);

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the queue is full")
    }
}

impl std::error::Error for Full {}

/// Runs requests on a storage, in any order and several at once.
///
/// Each guest queue may have its own, over the same image. Dropping it waits for the requests under way.
pub struct Queue {
    /// `None` once the workers are to end.
    requests: Option<Sender<(u64, Request)>>,
    completions: Receiver<Completion>,
    event: Arc<OwnedFd>,
    in_flight: Arc<AtomicUsize>,
    depth: usize,
    workers: Vec<JoinHandle<()>>,
}

impl Queue {
    /// A queue with `workers` threads (at least one) that takes up to `depth` requests at a time; a request counts until its
    /// completion is [polled](Self::poll).
    ///
    /// # Errors
    ///
    /// When the system gives no thread or descriptor.
    pub fn new(storage: &Arc<dyn Storage>, workers: usize, depth: usize) -> io::Result<Self> {
        let depth = depth.max(1);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = Arc::new(eventfd(0, flags)?);
        let (requests, incoming) = bounded(depth);
        let (outgoing, completions) = bounded(depth);
        let mut queue = Self {
            requests: Some(requests),
            completions,
            event,
            in_flight: Arc::default(),
            depth,
            workers: Vec::new(),
        };
        let workers = workers.max(1);
        for number in 0..workers {
            let worker = Worker {
                storage: Arc::clone(storage),
                incoming: incoming.clone(),
                outgoing: outgoing.clone(),
                event: Arc::clone(&queue.event),
                workers,
            };
            let thread = thread::Builder::new()
                .name(format!("disk queue {number}"))
                .spawn(move || worker.run())?;
            queue.workers.push(thread);
        }
        Ok(queue)
    }

    /// Hands a request to the workers. `id` comes back with its completion; it means nothing to the queue.
    ///
    /// # Errors
    ///
    /// [`Full`], with the request.
    pub fn submit(&self, id: u64, request: Request) -> Result<(), Full> {
        let Some(requests) = &self.requests else {
            return Err(Full(request));
        };
        let room = |count: usize| (count < self.depth).then_some(count + 1);
        if self
            .in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, room)
            .is_err()
        {
            return Err(Full(request));
        }
        // There is room in the channel for as many as may be in flight.
        requests.send((id, request)).map_err(|error| {
            self.in_flight.fetch_sub(1, Ordering::AcqRel);
            Full(error.into_inner().1)
        })
    }

    /// A completion, if there is one.
    pub fn poll(&self) -> Option<Completion> {
        let completion = self.completions.try_recv().ok()?;
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(completion)
    }

    /// The next completion; waits for it. `None` if nothing is in flight.
    pub fn wait(&self) -> Option<Completion> {
        if self.in_flight() == 0 {
            return None;
        }
        let completion = self.completions.recv().ok()?;
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(completion)
    }

    /// Requests whose completion was not polled yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Makes the descriptor unreadable until something completes. Call it when the descriptor has become readable, before
    /// [polling](Self::poll) until nothing is left.
    pub fn acknowledge(&self) {
        let mut count = [0; 8];
        while read(&*self.event, &mut count) == Err(Errno::INTR) {}
    }
}

/// The descriptor to wait for: an eventfd, readable when requests are complete.
impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.requests = None;
        for worker in self.workers.drain(..) {
            // A worker that panicked has lost its request; there is no one left to tell.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("workers", &self.workers.len())
            .field("depth", &self.depth)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

struct Worker {
    storage: Arc<dyn Storage>,
    incoming: Receiver<(u64, Request)>,
    outgoing: Sender<Completion>,
    event: Arc<OwnedFd>,
    workers: usize,
}

impl Worker {
    fn run(&self) {
        while let Ok(first) = self.incoming.recv() {
            let mut batch = vec![first];
            // A fair share of what is waiting, so that the others have something to do, too.
            let share = self
                .incoming
                .len()
                .div_ceil(self.workers)
                .min(BATCH_MAX - 1);
            for _ in 0..share {
                match self.incoming.try_recv() {
                    Ok(request) => batch.push(request),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            self.run_batch(batch);
        }
    }

    fn run_batch(&self, mut batch: Vec<(u64, Request)>) {
        let mut results: Vec<Option<StorageResult<()>>> = Vec::with_capacity(batch.len());
        let mut places = Vec::new();
        let mut ops = Vec::new();
        for (place, (_, request)) in batch.iter_mut().enumerate() {
            results.push(None);
            match request {
                Request::Read { offset, buf } => ops.push(Op::read(buf, *offset)),
                Request::Write { offset, buf } => ops.push(Op::write(buf, *offset)),
                Request::WriteZeroes { range, flags } => {
                    ops.push(Op::write_zeroes(range.clone(), *flags));
                }
                Request::Discard { range } => ops.push(Op::discard(range.clone())),
                Request::Flush => continue,
            }
            places.push(place);
        }
        match ops.as_mut_slice() {
            [] => {}
            [one] => one.run(&*self.storage),
            many => self.storage.submit(many),
        }
        for (op, place) in ops.iter_mut().zip(places) {
            if let Some(result) = results.get_mut(place) {
                *result = op.take_result();
            }
        }
        drop(ops);
        for ((id, request), result) in batch.into_iter().zip(results) {
            let (result, buf) = match (request, result) {
                (Request::Flush, _) => (self.storage.flush(), None),
                (Request::Read { buf, .. } | Request::Write { buf, .. }, Some(result)) => {
                    (result, Some(buf))
                }
                (_, Some(result)) => (result, None),
                // A storage that leaves an operation without a result breaks its contract; running it again does not hurt.
                (request, None) => self.again(request),
            };
            let completion = Completion { id, result, buf };
            if self.outgoing.send(completion).is_err() {
                return;
            }
            self.ring();
        }
    }

    fn again(&self, request: Request) -> (StorageResult<()>, Option<Vec<u8>>) {
        let storage = &self.storage;
        match request {
            Request::Read { offset, mut buf } => (storage.read_at(&mut buf, offset), Some(buf)),
            Request::Write { offset, buf } => (storage.write_at(&buf, offset), Some(buf)),
            Request::WriteZeroes { range, flags } => (storage.write_zeroes(range, flags), None),
            Request::Discard { range } => (storage.discard(range), None),
            Request::Flush => (storage.flush(), None),
        }
    }

    #[expect(
        clippy::host_endian_bytes,
        reason = "the kernel reads the number as the machine has it"
    )]
    fn ring(&self) {
        // Only a counter at its limit refuses, and then the descriptor is readable anyway.
        while write(&*self.event, &1_u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use std::collections::HashMap;

    use qcow2_io::{Fault, Faulty, Memory, Operation};

    use super::*;

    fn shared<S: Storage + 'static>(storage: Arc<S>) -> Arc<dyn Storage> {
        storage
    }

    fn readable(queue: &Queue) -> bool {
        let mut count = [0; 8];
        read(queue.as_fd(), &mut count).is_ok()
    }

    #[test]
    fn requests_complete_with_their_ids_and_buffers() {
        let memory = Arc::new(Memory::with_len(1 << 20).unwrap());
        let queue = Queue::new(&shared(memory), 2, 64).unwrap();
        for id in 0..32_u64 {
            let buf = vec![u8::try_from(id).unwrap() + 1; 512];
            let request = Request::Write {
                offset: id * 512,
                buf,
            };
            queue.submit(id, request).unwrap();
        }
        for _ in 0..32 {
            let done = queue.wait().unwrap();
            done.result.unwrap();
            assert_eq!(done.buf.unwrap().len(), 512);
        }
        assert!(queue.wait().is_none());
        queue.submit(99, Request::Flush).unwrap();
        assert_eq!(queue.wait().unwrap().id, 99);
        for id in 0..32 {
            let buf = vec![0; 512];
            queue
                .submit(
                    id,
                    Request::Read {
                        offset: id * 512,
                        buf,
                    },
                )
                .unwrap();
        }
        let mut seen = HashMap::new();
        while let Some(done) = queue.wait() {
            done.result.unwrap();
            seen.insert(done.id, done.buf.unwrap()[7]);
        }
        assert_eq!(seen.len(), 32);
        assert!(seen.iter().all(|(id, byte)| u64::from(*byte) == id + 1));
    }

    #[test]
    fn the_descriptor_tells_of_completions() {
        let queue = Queue::new(&shared(Arc::new(Memory::with_len(4096).unwrap())), 1, 4).unwrap();
        assert!(!readable(&queue));
        queue
            .submit(1, Request::Discard { range: 0..4096 })
            .unwrap();
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(
                &queue,
                rustix::event::PollFlags::IN,
            )],
            None,
        )
        .unwrap();
        queue.acknowledge();
        assert!(!readable(&queue));
        assert_eq!(queue.poll().unwrap().id, 1);
        assert!(queue.poll().is_none());
    }

    #[test]
    fn a_full_queue_gives_the_request_back() {
        let queue = Queue::new(&shared(Arc::new(Memory::new())), 1, 1).unwrap();
        queue.submit(1, Request::Flush).unwrap();
        // Until it is polled it counts, complete or not.
        let Full(request) = queue.submit(2, Request::Flush).unwrap_err();
        assert!(matches!(request, Request::Flush));
        assert_eq!(queue.wait().unwrap().id, 1);
        queue.submit(3, request).unwrap();
        assert_eq!(queue.wait().unwrap().id, 3);
    }

    #[test]
    fn an_error_reaches_the_request_that_failed() {
        let faulty = Faulty::new(Memory::with_len(4096).unwrap());
        faulty.add(Fault::on(Operation::Write).nth(2));
        let queue = Queue::new(&shared(Arc::new(faulty)), 1, 8).unwrap();
        for id in 0..3 {
            let buf = vec![1; 16];
            queue.submit(id, Request::Write { offset: 0, buf }).unwrap();
        }
        let mut failed = Vec::new();
        while let Some(done) = queue.wait() {
            if done.result.is_err() {
                failed.push(done.id);
            }
        }
        assert_eq!(failed, [1]);
    }

    #[test]
    fn dropping_waits_for_what_is_under_way() {
        let memory = Arc::new(Memory::with_len(1 << 20).unwrap());
        let queue = Queue::new(&shared(Arc::clone(&memory)), 3, 256).unwrap();
        for id in 0..256_u64 {
            let buf = vec![7; 4096];
            queue
                .submit(
                    id,
                    Request::Write {
                        offset: id * 4096,
                        buf,
                    },
                )
                .unwrap();
        }
        drop(queue);
        assert!(memory.to_vec().unwrap().iter().all(|byte| *byte == 7));
    }
}
