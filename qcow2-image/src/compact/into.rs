//! Into a new file: as it is, and then in place there.

use std::sync::Arc;

use qcow2_io::Storage;

use super::{CompactOptions, CompactReport, index};
use crate::buffer::Pages;
use crate::{Image, ImageError, ImageOptions};

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

impl Image {
    /// Makes a compacted copy of the image file in `target`, whose content is lost: with all snapshots and bitmaps, what they share shared,
    /// compressed clusters as they are. What is free is not copied. The copy is opened with `options`, which have the secret
    /// of an encrypted image, and compacted there.
    ///
    /// What [`copy`](crate::copy::copy) makes of a disk is smaller still where clusters hold nothing but zeros, but has no
    /// snapshots.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] for an image with an external data file, which would belong to two images then, and for one that was not
    /// closed and is open for reading only; what both storages report, and all of [`compact`](Self::compact).
    ///
    /// # Locking
    ///
    /// Requests to this image wait while the file is copied.
    ///
    /// # Durability
    ///
    /// On return the copy is durable. Before, it is no image, or one that is not compact yet.
    pub fn compact_into(
        &self,
        target: Arc<dyn Storage>,
        open: ImageOptions,
        options: &CompactOptions<'_>,
    ) -> Result<CompactReport, ImageError> {
        if self.rules.external_data {
            return Err(ImageError::Unsupported {
                what: "the external data file would belong to two images",
            });
        }
        let before = self.copy_file(&*target, options)?;
        let Some(before) = before else {
            return Ok(CompactReport::default());
        };
        let copy = open.no_backing().open(target)?;
        let mut report = copy.compact(options)?;
        report.bytes_before = before;
        copy.close()?;
        Ok(report)
    }

    /// Copies all clusters that are in use, the header last; gives the length of the file, or `None` if the monitor has ended it.
    fn copy_file(
        &self,
        target: &dyn Storage,
        options: &CompactOptions<'_>,
    ) -> Result<Option<u64>, ImageError> {
        let _closed = self.gate.close();
        let mut _resting = None;
        if !self.is_read_only() {
            _resting = Some(self.rest_bitmaps()?);
            self.close_books()?;
        }
        if self.header().incompatible.dirty() {
            return Err(ImageError::Unsupported {
                what: "the image was not closed; it has to be opened for writing first",
            });
        }
        let bits = self.geometry.cluster_bits();
        let map = self.occupancy()?;
        let source = self.meta.storage();
        target.set_len(0)?;
        target.set_len(map.end << bits)?;
        let mut bytes = Pages::default();
        let mut at = 1;
        while let Some(next) = map.next_used(at) {
            at = next;
            if options
                .monitor
                .is_some_and(crate::copy::Monitor::is_cancelled)
            {
                return Ok(None);
            }
            let most = (PIECE >> bits).max(1);
            let run = (at..map.end.min(at + most))
                .take_while(|cluster| map.is_used(*cluster))
                .count() as u64;
            bytes.resize(index(run << bits));
            source.read_at(&mut bytes, at << bits)?;
            target.write_at(&bytes, at << bits)?;
            at += run;
        }
        target.flush()?;
        bytes.resize(self.geometry.cluster_len());
        source.read_at(&mut bytes, 0)?;
        target.write_at(&bytes, 0)?;
        target.flush()?;
        Ok(Some(source.len()?))
    }
}
