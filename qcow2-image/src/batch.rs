//! Batches: everything is looked up first, then the storage gets all of it at once.

use qcow2_io::{Op, Request, Storage as _};

use crate::Image;
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
