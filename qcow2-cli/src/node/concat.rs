//! Several disks one behind the other, as one.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use qcow2_io::{Extent, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags};

/// Disks one behind the other, for reading.
#[derive(Debug)]
pub(crate) struct Concat {
    /// Each with the place where it begins.
    parts: Vec<(u64, Arc<dyn Storage>)>,
    len: u64,
}

impl Concat {
    pub(crate) fn new(storages: Vec<Arc<dyn Storage>>) -> Result<Self> {
        let mut parts = Vec::with_capacity(storages.len());
        let mut len = 0_u64;
        for storage in storages {
            let own = storage.len()?;
            parts.push((len, storage));
            len = len.saturating_add(own);
        }
        Ok(Self { parts, len })
    }

    /// The part that holds a place, where it begins, and where the next one does.
    fn part(&self, offset: u64) -> Option<(&dyn Storage, u64, u64)> {
        let after = self.parts.partition_point(|(start, _)| *start <= offset);
        let (start, storage) = self.parts.get(after.checked_sub(1)?)?;
        let end = self.parts.get(after).map_or(u64::MAX, |(next, _)| *next);
        Some((&**storage, *start, end))
    }
}

fn refused(operation: Operation) -> StorageError {
    StorageError::new(operation, StorageErrorKind::ReadOnly)
}

impl Storage for Concat {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let mut at = offset;
        for buf in bufs {
            let mut rest: &mut [u8] = buf;
            while !rest.is_empty() {
                let Some((storage, start, end)) = self.part(at) else {
                    rest.fill(0);
                    break;
                };
                let len = usize::try_from(end - at)
                    .unwrap_or(usize::MAX)
                    .min(rest.len());
                let (piece, behind) = rest.split_at_mut(len);
                storage.read_at(piece, at - start)?;
                at += len as u64;
                rest = behind;
            }
        }
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> Result<()> {
        Err(refused(Operation::Write))
    }

    fn write_zeroes(&self, _range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        Err(refused(Operation::WriteZeroes))
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Err(refused(Operation::Discard))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(refused(Operation::SetLen))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        let Some((storage, start, end)) = self.part(range.start) else {
            return Ok(Vec::new());
        };
        let inside = range.start - start..range.end.min(end).max(range.start) - start;
        let mut found = storage.extents(inside, max)?;
        for extent in &mut found {
            extent.offset += start;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use qcow2_io::Memory;

    use super::*;

    #[test]
    fn disks_are_read_one_behind_the_other() {
        let one = Memory::new();
        one.write_at(&[1; 1000], 0).unwrap();
        let two = Memory::new();
        two.write_at(&[2; 500], 0).unwrap();
        let both = Concat::new(vec![Arc::new(one), Arc::new(two)]).unwrap();
        assert_eq!(both.len().unwrap(), 1500);
        let mut found = vec![9; 1600];
        both.read_at(&mut found, 0).unwrap();
        assert!(found[..1000].iter().all(|&byte| byte == 1));
        assert!(found[1000..1500].iter().all(|&byte| byte == 2));
        assert!(found[1500..].iter().all(|&byte| byte == 0));
        let extents = both.extents(1200..1500, 4).unwrap();
        assert_eq!(extents[0].offset, 1200);
        assert!(both.write_at(&[0], 0).is_err());
    }
}
