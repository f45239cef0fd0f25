//! A storage that is to be filled anew.

use qcow2_io::{Storage, StorageErrorKind, ZeroFlags};

use super::CreateError;

/// The most that is written at once, in bytes; what is in memory follows from it.
pub(super) const CHUNK: usize = 1 << 20;

/// A storage whose old content is gone, or out of reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) storage: &'a dyn Storage,
    /// Whether what isn't written may still hold old bytes: the storage keeps its length.
    pub(super) stale: bool,
}

impl<'a> Target<'a> {
    /// Empties a storage and makes it `needed` bytes long, which then read as zeros.
    ///
    /// One that can't be made shorter stays as it is, except that its first `invalidate` bytes are zeroed.
    ///
    /// # Durability
    ///
    /// On return, the old content can't come back.
    pub(super) fn clear(
        storage: &'a dyn Storage,
        what: &'static str,
        needed: u64,
        invalidate: u64,
    ) -> Result<Self, CreateError> {
        let len = storage
            .len()
            .map_err(CreateError::while_trying("ask for the length"))?;
        if len > 0 {
            match storage.set_len(0) {
                Ok(()) => storage
                    .flush()
                    .map_err(CreateError::while_trying("flush the emptied file"))?,
                Err(error) if error.kind() == StorageErrorKind::Unsupported => {
                    return Self::overwrite(storage, what, len, needed, invalidate);
                }
                Err(source) => {
                    let action = "empty the file";
                    return Err(CreateError::Storage { action, source });
                }
            }
        }
        storage
            .set_len(needed)
            .map_err(CreateError::while_trying("set the length"))?;
        Ok(Self {
            storage,
            stale: false,
        })
    }

    fn overwrite(
        storage: &'a dyn Storage,
        what: &'static str,
        len: u64,
        needed: u64,
        invalidate: u64,
    ) -> Result<Self, CreateError> {
        if len < needed {
            return Err(CreateError::StorageTooSmall { what, needed, len });
        }
        storage
            .write_zeroes(0..invalidate.min(len), ZeroFlags::NONE)
            .and_then(|()| storage.flush())
            .map_err(CreateError::while_trying("wipe the old header"))?;
        Ok(Self {
            storage,
            stale: true,
        })
    }

    /// Writes zeros, as bytes, so that the space is really there.
    pub(super) fn write_zero_bytes(
        &self,
        range: std::ops::Range<u64>,
        zeros: &[u8],
    ) -> qcow2_io::Result<()> {
        let mut position = range.start;
        while position < range.end {
            let rest = usize::try_from(range.end - position).unwrap_or(usize::MAX);
            let part = zeros.get(..rest.min(zeros.len())).unwrap_or(zeros);
            self.storage.write_at(part, position)?;
            position += part.len() as u64;
        }
        Ok(())
    }
}
