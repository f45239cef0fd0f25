//! New images over others.

use qcow2_io::Storage;

use super::BackingFile;
use crate::Image;
use crate::create::{CreateError, CreateOptions};

impl Image {
    /// Writes a new image over a backing file into a storage; what was there is lost. The image names the backing file as that
    /// says. If the options have no size it is that of the backing file, rounded up to sectors.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create), and a backing file that can't tell its size, before anything is written.
    pub fn create_overlay(
        storage: &dyn Storage,
        backing: &BackingFile,
        options: &CreateOptions,
    ) -> Result<(), CreateError> {
        let mut options = options
            .clone()
            .backing_file(backing.name(), backing.format());
        if options.chosen_size().is_none() {
            let size = backing.storage().len();
            let size = size.map_err(CreateError::while_trying(
                "read the size of the backing file",
            ))?;
            options = options.size(size);
        }
        Self::create(storage, &options)
    }
}
