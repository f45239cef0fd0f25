//! What the image names as its backing file.

use crate::rebase::name_backing;
use crate::{Image, ImageError};

impl Image {
    /// Changes which backing file the header names, and its format; nothing else. The image goes on reading from the file
    /// that it was opened with. It is up to the caller that the new file has the same content where it shows.
    ///
    /// Everything else in the header stays, extensions and fields that this library does not know among it.
    ///
    /// # Errors
    ///
    /// [`ImageError::Header`] when the names are too long or don't fit in the first cluster, [`ImageError::Unsupported`] for an
    /// image whose data file is to be raw, and what the storage reports. The header is then as before.
    ///
    /// # Durability
    ///
    /// Durable on return; a crash leaves the old or the new name.
    pub fn set_backing_name(&self, backing: Option<(&[u8], &[u8])>) -> Result<(), ImageError> {
        if self.raw_data && backing.is_some() {
            return Err(ImageError::Unsupported {
                what: "an image whose data file is raw can't have a backing file",
            });
        }
        self.get_ready()?;
        self.flush_all()?;
        Ok(self
            .meta
            .rewrite_header(|header| name_backing(header, backing))?)
    }
}
