//! Batches: everything is looked up first, then the storage gets all of it at once.

use std::io::IoSlice;
use std::mem;

use qcow2_io::{Op, Request, Storage as _};

use crate::Image;
use crate::mapping::Source;

impl Image {
    /// Runs a batch. Reads and writes that are one piece of data in place go to the storage as one batch; the others go one by
    /// one, but writes that continue each other go as one: the clusters that they fill together need no copy of what was there.
    pub(crate) fn run_batch(&self, ops: &mut [Op<'_>]) {
        {
            let _pass = self.gate.enter();
            let mut below = Below::new(ops);
            for index in 0..below.ops.len() {
                below.send(index, |op| self.simple(op));
            }
            let simple = below.ops.get_mut(..below.sent.len()).unwrap_or_default();
            if !simple.is_empty() {
                self.meta.data().submit(simple);
            }
        }
        let mut left = ops;
        while !left.is_empty() {
            let neighbours = self.write_neighbours(left);
            let (now, later) = left.split_at_mut(neighbours.max(1));
            for op in now.iter_mut().filter(|op| op.result().is_none()) {
                op.run(self);
            }
            left = later;
        }
    }

    /// Makes one write of all writes in front that continue each other, and tells how many they are. If it fails none of
    /// them gets a result: they are to be made one by one, for each may have another.
    fn write_neighbours(&self, ops: &mut [Op<'_>]) -> usize {
        let mut bufs: Vec<IoSlice<'_>> = Vec::new();
        let (mut start, mut end) = (None, 0_u64);
        let mut count = 0;
        for op in ops.iter().take_while(|op| op.result().is_none()) {
            let (offset, len) = match op.request() {
                Request::Write { buf, offset } => (*offset, buf.len() as u64),
                Request::WriteVectored { bufs, offset } => {
                    (*offset, bufs.iter().map(|buf| buf.len() as u64).sum())
                }
                _ => break,
            };
            let Some(next) = offset.checked_add(len) else {
                break;
            };
            if start.is_some() && offset != end {
                break;
            }
            match op.request() {
                Request::Write { buf, .. } => bufs.push(IoSlice::new(buf)),
                Request::WriteVectored { bufs: more, .. } => bufs.extend_from_slice(more),
                _ => break,
            }
            start.get_or_insert(offset);
            end = next;
            count += 1;
        }
        let start = start.unwrap_or(end);
        if count > 1 && self.write(&bufs, start, end - start).is_ok() {
            drop(bufs);
            for op in ops.iter_mut().take(count) {
                op.complete(Ok(()));
            }
        }
        count
    }

    /// Where the bytes of a transfer lie that is one piece of data, for a write: in place.
    fn simple(&self, op: &Op<'_>) -> Option<u64> {
        match op.request() {
            Request::Read { buf, offset } => self.simple_read(*offset, buf.len() as u64),
            Request::Write { buf, offset } => self.simple_write(*offset, buf.len() as u64),
            Request::ReadVectored { bufs, offset } => {
                let len = bufs.iter().map(|buf| buf.len() as u64).sum();
                self.simple_read(*offset, len)
            }
            Request::WriteVectored { bufs, offset } => {
                let len = bufs.iter().map(|buf| buf.len() as u64).sum();
                self.simple_write(*offset, len)
            }
            _ => None,
        }
    }

    /// Where a read goes that is one piece of data.
    fn simple_read(&self, offset: u64, len: u64) -> Option<u64> {
        if len == 0 || self.crypt.is_some() || !self.is_inside(offset, len) {
            return None;
        }
        if let Some((host, _)) = self.plain(offset, len) {
            return Some(host.get());
        }
        match self.source(offset, len).ok()? {
            (Source::Data(host), run) if run == len => Some(host.get()),
            _ => None,
        }
    }

    /// Where a write goes that is one piece of data in place.
    fn simple_write(&self, offset: u64, len: u64) -> Option<u64> {
        if len == 0 || self.crypt.is_some() || !self.is_inside(offset, len) {
            return None;
        }
        if !self.is_ready() || !self.meta.is_writable() {
            return None;
        }
        let host = if let Some((host, true)) = self.plain(offset, len) {
            host
        } else {
            let (host, run) = self.in_place(offset, len).ok()??;
            (run == len).then_some(host)?
        };
        self.check_data(host, len).ok()?;
        self.record(offset, len).ok()?;
        Some(host.get())
    }
}

/// A batch of the guest's, of which some operations are lent to the storage: they stand in front, and say where in the storage their
/// bytes lie. When this goes away, be it by a panic, all are again where and what they were, but for the results.
struct Below<'a, 'ops> {
    ops: &'a mut [Op<'ops>],
    /// For each operation in front: where it stood, and its offset in the guest.
    sent: Vec<(usize, u64)>,
}

impl<'a, 'ops> Below<'a, 'ops> {
    fn new(ops: &'a mut [Op<'ops>]) -> Self {
        Self {
            sent: Vec::with_capacity(ops.len()),
            ops,
        }
    }

    /// Puts the operation at `index` to those in front, if it has a place in the storage. To be called for one index after the other.
    fn send(&mut self, index: usize, place: impl Fn(&Op<'ops>) -> Option<u64>) {
        let Some(op) = self.ops.get_mut(index) else {
            return;
        };
        op.take_result();
        if let Some(host) = place(op)
            && let Some(offset) = offset_mut(op)
        {
            let guest = mem::replace(offset, host);
            self.ops.swap(self.sent.len(), index);
            self.sent.push((index, guest));
        }
    }
}

impl Drop for Below<'_, '_> {
    fn drop(&mut self) {
        while let Some((index, guest)) = self.sent.pop() {
            let front = self.sent.len();
            if let Some(offset) = self.ops.get_mut(front).and_then(offset_mut) {
                *offset = guest;
            }
            self.ops.swap(front, index);
        }
    }
}

/// The place of a transfer.
fn offset_mut<'a>(op: &'a mut Op<'_>) -> Option<&'a mut u64> {
    match op.request_mut() {
        Request::Read { offset, .. }
        | Request::Write { offset, .. }
        | Request::ReadVectored { offset, .. }
        | Request::WriteVectored { offset, .. } => Some(offset),
        _ => None,
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use std::io::{IoSlice, IoSliceMut};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use qcow2_io::{Memory, Result, ZeroFlags};

    use super::*;
    use crate::create::CreateOptions;

    /// A memory that counts the batches it gets, and their operations.
    #[derive(Debug, Default)]
    struct Counting {
        memory: Memory,
        batches: AtomicUsize,
        operations: AtomicUsize,
    }

    impl qcow2_io::Storage for Counting {
        fn len(&self) -> Result<u64> {
            self.memory.len()
        }
        fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
            self.memory.read_vectored_at(bufs, offset)
        }
        fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
            self.memory.write_vectored_at(bufs, offset)
        }
        fn write_zeroes(&self, range: std::ops::Range<u64>, flags: ZeroFlags) -> Result<()> {
            self.memory.write_zeroes(range, flags)
        }
        fn discard(&self, range: std::ops::Range<u64>) -> Result<()> {
            self.memory.discard(range)
        }
        fn flush(&self) -> Result<()> {
            self.memory.flush()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.memory.set_len(len)
        }
        fn submit(&self, ops: &mut [Op<'_>]) {
            self.batches.fetch_add(1, Ordering::Relaxed);
            self.operations.fetch_add(ops.len(), Ordering::Relaxed);
            self.memory.submit(ops);
        }
    }

    #[test]
    fn what_is_in_place_goes_down_as_one_batch_and_the_rest_is_done_all_the_same() {
        let storage = Arc::new(Counting::default());
        Image::create(&*storage, &CreateOptions::new(1 << 20)).unwrap();
        let image = Image::options()
            .open(Arc::<Counting>::clone(&storage))
            .unwrap();
        image.write_at(&[1; 8192], 0).unwrap();

        let (mut a, mut b, mut c, mut empty) = ([0; 512], [0; 100], [0; 50], [9; 512]);
        let (first, second) = (b.as_mut_slice(), c.as_mut_slice());
        let mut ops = [
            Op::read(&mut a, 512),
            Op::new(Request::ReadVectored {
                bufs: vec![IoSliceMut::new(first), IoSliceMut::new(second)],
                offset: 1024,
            }),
            Op::write(&[2; 512], 4096),
            Op::new(Request::WriteVectored {
                bufs: vec![IoSlice::new(&[3; 10]), IoSlice::new(&[4; 20])],
                offset: 5000,
            }),
            // These change the mapping, or have none.
            Op::write(&[5; 512], 1 << 19),
            Op::read(&mut empty, 1 << 18),
            Op::discard(1 << 17..1 << 18),
            // And this one is not on the disk.
            Op::write(&[6; 512], 1 << 20),
        ];
        image.submit(&mut ops);
        let results: Vec<bool> = ops
            .iter_mut()
            .map(|op| op.take_result().unwrap().is_ok())
            .collect();
        assert_eq!(results, [true, true, true, true, true, true, true, false]);
        assert_eq!(storage.batches.load(Ordering::Relaxed), 1);
        assert_eq!(storage.operations.load(Ordering::Relaxed), 4);
        assert_eq!((a, b, c, empty), ([1; 512], [1; 100], [1; 50], [0; 512]));
        let mut written = [0; 1000];
        image.read_at(&mut written, 4090).unwrap();
        assert_eq!(written[..6], [1; 6]);
        assert_eq!(written[6..518], [2; 512]);
        assert_eq!(written[910..940], [[3; 10].as_slice(), &[4; 20]].concat());
        let mut new = [0; 512];
        image.read_at(&mut new, 1 << 19).unwrap();
        assert_eq!(new, [5; 512]);
    }

    #[test]
    fn writes_that_continue_each_other_fill_clusters_without_a_look_at_what_was_there() {
        let storage = Arc::new(Memory::default());
        let backing = Arc::new(qcow2_io::Faulty::new(Arc::new(Memory::from(vec![
            9;
            1 << 20
        ]))));
        let options = CreateOptions::new(1 << 20).backing_file("below", "raw");
        Image::create(&*storage, &options).unwrap();
        let image = Image::options()
            .backing(Arc::<qcow2_io::Faulty<_>>::clone(&backing))
            .open(storage)
            .unwrap();
        // Whoever reads it fails.
        backing.add(qcow2_io::Fault::on(qcow2_io::Operation::Read).forever());
        let parts: Vec<[u8; 4096]> = (0..32).map(|number| [number; 4096]).collect();
        let (odd, even) = parts[5].split_at(100);
        let mut ops: Vec<_> = (0..)
            .zip(&parts)
            .map(|(number, part)| match number {
                5 => Op::new(Request::WriteVectored {
                    bufs: vec![IoSlice::new(odd), IoSlice::new(even)],
                    offset: 5 << 12,
                }),
                _ => Op::write(part, number << 12),
            })
            .collect();
        image.submit(&mut ops);
        for op in &mut ops {
            op.take_result().unwrap().unwrap();
        }
        let mut found = vec![0; 32 << 12];
        image.read_at(&mut found, 0).unwrap();
        assert_eq!(found, parts.concat());
    }

    #[test]
    fn of_neighbours_only_the_one_at_fault_fails() {
        let storage = Arc::new(Memory::default());
        Image::create(&*storage, &CreateOptions::new(1 << 16)).unwrap();
        let image = Image::options().open(storage).unwrap();
        let mut ops = [
            Op::write(&[1; 512], (1 << 16) - 1024),
            Op::write(&[2; 512], (1 << 16) - 512),
            Op::write(&[3; 512], 1 << 16),
            Op::write(&[4; 512], 512),
            Op::write(&[5; 512], 1024),
        ];
        image.submit(&mut ops);
        let results = ops.each_mut().map(|op| op.take_result().unwrap().is_ok());
        assert_eq!(results, [true, true, false, true, true]);
        let mut found = vec![0; 1 << 16];
        image.read_at(&mut found, 0).unwrap();
        let mut expected = vec![0; 1 << 16];
        expected[512..1024].fill(4);
        expected[1024..1536].fill(5);
        expected[(1 << 16) - 1024..(1 << 16) - 512].fill(1);
        expected[(1 << 16) - 512..].fill(2);
        assert!(found == expected);
    }

    /// Panics when it gets a batch.
    #[derive(Debug)]
    struct Panicking(Memory);

    impl qcow2_io::Storage for Panicking {
        fn len(&self) -> Result<u64> {
            self.0.len()
        }
        fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
            self.0.read_vectored_at(bufs, offset)
        }
        fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
            self.0.write_vectored_at(bufs, offset)
        }
        fn write_zeroes(&self, range: std::ops::Range<u64>, flags: ZeroFlags) -> Result<()> {
            self.0.write_zeroes(range, flags)
        }
        fn discard(&self, range: std::ops::Range<u64>) -> Result<()> {
            self.0.discard(range)
        }
        fn flush(&self) -> Result<()> {
            self.0.flush()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.0.set_len(len)
        }
        fn submit(&self, ops: &mut [Op<'_>]) {
            assert!(ops.is_empty(), "a batch");
        }
    }

    /// Reads of 512 bytes, each second of them of data, by the number that stands in it.
    fn mixed(bufs: &mut [[u8; 512]]) -> Vec<Op<'_>> {
        let guest = |index: u64| index / 2 * 512 + (index % 2) * (1 << 18);
        (0..)
            .zip(bufs)
            .map(|(index, buf)| Op::read(buf, guest(index)))
            .collect()
    }

    fn offsets(ops: &mut [Op<'_>]) -> Vec<u64> {
        ops.iter_mut().map(|op| *offset_mut(op).unwrap()).collect()
    }

    #[test]
    fn operations_come_back_in_their_order_with_their_offsets() {
        let storage = Arc::new(Counting::default());
        Image::create(&*storage, &CreateOptions::new(1 << 20)).unwrap();
        let image = Image::options()
            .open(Arc::<Counting>::clone(&storage))
            .unwrap();
        for sector in 0..8u8 {
            image
                .write_at(&[sector + 1; 512], u64::from(sector) * 512)
                .unwrap();
        }
        let mut bufs = [[9; 512]; 16];
        let mut ops = mixed(&mut bufs);
        let before = offsets(&mut ops);
        // One that was used before, and failed.
        ops[3].complete(image.write_at(&[1], 1 << 20));
        image.submit(&mut ops);
        assert_eq!(offsets(&mut ops), before);
        for op in &mut ops {
            op.take_result().unwrap().unwrap();
        }
        drop(ops);
        for (index, buf) in (0u8..).zip(bufs) {
            let expected = if index % 2 == 0 { index / 2 + 1 } else { 0 };
            assert_eq!(buf, [expected; 512], "operation {index}");
        }
        assert_eq!(storage.operations.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn a_panic_of_the_storage_leaves_the_operations_as_they_were() {
        let storage = Arc::new(Panicking(Memory::default()));
        Image::create(&*storage, &CreateOptions::new(1 << 20)).unwrap();
        let image = Image::options()
            .open(Arc::<Panicking>::clone(&storage))
            .unwrap();
        image.write_at(&[1; 8192], 0).unwrap();
        let mut bufs = [[9; 512]; 16];
        let mut ops = mixed(&mut bufs);
        let before = offsets(&mut ops);
        let submit = std::panic::AssertUnwindSafe(|| image.submit(&mut ops));
        std::panic::catch_unwind(submit).unwrap_err();
        assert_eq!(offsets(&mut ops), before);
    }
}
