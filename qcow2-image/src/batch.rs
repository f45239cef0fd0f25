//! Batches: everything is looked up first, then the storage gets all of it at once.

use qcow2_io::{Op, Request, Storage as _};

use crate::Image;
use crate::cuts::{cut, cut_mut};
use crate::mapping::Source;

impl Image {
    /// Runs a batch. Reads and writes that are one piece of data in place go to the storage as one batch; the others go one by
    /// one.
    pub(crate) fn run_batch(&self, ops: &mut [Op<'_>]) {
        let mut simple: Vec<bool> = Vec::with_capacity(ops.len());
        {
            let _pass = self.gate.enter();
            let mut below: Vec<Op<'_>> = Vec::with_capacity(ops.len());
            for op in &mut *ops {
                let before = below.len();
                match op.request_mut() {
                    Request::Read { buf, offset } => {
                        if let Some(host) = self.simple_read(*offset, buf.len() as u64) {
                            below.push(Op::read(buf, host));
                        }
                    }
                    Request::Write { buf, offset } => {
                        if let Some(host) = self.simple_write(*offset, buf.len() as u64) {
                            below.push(Op::write(buf, host));
                        }
                    }
                    Request::ReadVectored { bufs, offset } => {
                        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
                        if let Some(host) = self.simple_read(*offset, len) {
                            let bufs = cut_mut(bufs, 0, len);
                            let offset = host;
                            below.push(Op::new(Request::ReadVectored { bufs, offset }));
                        }
                    }
                    Request::WriteVectored { bufs, offset } => {
                        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
                        if let Some(host) = self.simple_write(*offset, len) {
                            let bufs = cut(bufs, 0, len);
                            let offset = host;
                            below.push(Op::new(Request::WriteVectored { bufs, offset }));
                        }
                    }
                    _ => {}
                }
                simple.push(below.len() > before);
            }
            if !below.is_empty() {
                self.meta.data().submit(&mut below);
            }
            let mut results: Vec<_> = below.iter_mut().map(Op::take_result).collect();
            drop(below);
            let mut results = results.drain(..);
            for (op, simple) in ops.iter_mut().zip(&simple) {
                if *simple && let Some(Some(result)) = results.next() {
                    op.complete(result);
                }
            }
        }
        for (op, simple) in ops.iter_mut().zip(simple) {
            if !simple {
                op.run(self);
            }
        }
    }

    /// Where a read goes that is one piece of data.
    fn simple_read(&self, offset: u64, len: u64) -> Option<u64> {
        if len == 0 {
            return None;
        }
        if !self.is_inside(offset, len) {
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
        if len == 0 || !self.is_ready() || !self.meta.is_writable() || !self.is_inside(offset, len)
        {
            return None;
        }
        if let Some((host, true)) = self.plain(offset, len) {
            return self.check_data(host, len).is_ok().then_some(host.get());
        }
        let (host, run) = self.in_place(offset, len).ok()??;
        if run != len || self.check_data(host, len).is_err() {
            return None;
        }
        Some(host.get())
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
}
