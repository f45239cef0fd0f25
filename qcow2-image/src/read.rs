//! Reading.

use std::io::IoSliceMut;

use qcow2_format::CompressedExtent;
use qcow2_io::Storage as _;

use crate::buffer::Buffer;
use crate::cuts::{cut_mut, fill_from, zero};
use crate::mapping::Source;
use crate::{Image, ImageError};

impl Image {
    /// Fills the buffers, `len` bytes in all, from `offset` on; zeros behind the end of the disk.
    pub(crate) fn read(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let _pass = self.gate.enter();
        let inside = self.virtual_size().saturating_sub(offset).min(len);
        if inside < len {
            if offset
                .checked_add(len)
                .is_none_or(|end| end > qcow2_io::MAX_LEN)
            {
                self.check_range(offset, len)?;
            }
            zero(bufs, inside, len - inside);
        }
        self.read_guest(bufs, offset, inside)
    }

    /// As [`read`](Self::read), for one buffer: nearly all reads are one piece of one cluster.
    #[inline]
    pub(crate) fn read_one(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let len = buf.len() as u64;
        if len > 0 && self.is_inside(offset, len) {
            let _pass = self.gate.enter();
            if let Some((host, _)) = self.plain(offset, len) {
                return Ok(self.meta.storage().read_at(buf, host.get())?);
            }
            if self.crypt.is_none()
                && let (Source::Data(host), run) = self.source(offset, len)?
                && run == len
            {
                return Ok(self.meta.data().read_at(buf, host.get())?);
            }
        }
        self.read(&mut [IoSliceMut::new(buf)], offset, len)
    }

    /// Reads the guest's view. The caller has a pass or has closed the gate.
    pub(crate) fn read_guest(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let mut done = 0;
        while done < len {
            let guest = offset + done;
            let (source, run) = self.source(guest, len - done)?;
            match source {
                Source::Zero(_) => zero(bufs, done, run),
                Source::Data(host) => self.load_data(bufs, done, run, guest, host)?,
                // What a backing file has there is no state of this machine.
                Source::Below if guest >= self.virtual_size() => zero(bufs, done, run),
                Source::Below => {
                    if let Some(backing) = &self.backing {
                        backing.read_vectored_at(&mut cut_mut(bufs, done, run), guest)?;
                    }
                }
                Source::Compressed(extent)
                    if run == self.cluster_size()
                        && self.unpack_here(bufs, done, guest, extent)? => {}
                Source::Compressed(extent) => {
                    let cluster = self.unpack(guest, extent)?;
                    let start = usize::try_from(self.in_cluster(guest)).unwrap_or(usize::MAX);
                    let end = start.saturating_add(usize::try_from(run).unwrap_or(usize::MAX));
                    fill_from(bufs, done, cluster.get(start..end).unwrap_or_default());
                }
            }
            done += run;
        }
        Ok(())
    }

    /// Unpacks a whole cluster to where it belongs, if that is one buffer.
    fn unpack_here(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        skip: u64,
        guest: u64,
        extent: CompressedExtent,
    ) -> Result<bool, ImageError> {
        match cut_mut(bufs, skip, self.cluster_size()).as_mut_slice() {
            [one] if one.len() as u64 == self.cluster_size() => {
                self.unpack_to(one, guest, extent)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The guest's view of `len` bytes at `offset`.
    pub(crate) fn view(&self, offset: u64, len: u64) -> Result<Buffer, ImageError> {
        if len == 0 {
            return Ok(Buffer::EMPTY);
        }
        let mut bytes = Buffer::unfilled(len);
        // Behind the end of the disk is nothing, though a longer backing file has bytes there; but then comes the machine's state.
        let inside = if offset >= self.vm_state_start() {
            len
        } else {
            self.virtual_size().saturating_sub(offset).min(len)
        };
        let mut bufs = [IoSliceMut::new(&mut bytes)];
        zero(&mut bufs, inside, len - inside);
        self.read_guest(&mut bufs, offset, inside)?;
        Ok(bytes)
    }
}
