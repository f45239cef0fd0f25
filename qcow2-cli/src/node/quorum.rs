//! The driver `quorum`: the same disk several times; what most copies say counts.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use qcow2_io::{Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags};

use super::open::Opener;
use super::{Access, Content, Node, NodeOptions, OpenError};

/// Copies of one disk.
#[derive(Debug)]
struct Quorum {
    copies: Vec<Arc<dyn Storage>>,
    /// So many have to agree.
    threshold: usize,
    /// A copy that says otherwise is written over.
    rewrites: bool,
}

/// Takes the node apart and opens the copies.
pub(super) fn open(
    opener: Opener<'_>,
    mut options: NodeOptions,
    described: NodeOptions,
    access: &Access,
    layer: usize,
) -> std::result::Result<Node, OpenError> {
    let (mut list, _) = options.take_child("children");
    let mut copies = Vec::new();
    loop {
        let (one, _) = list.take_child(&copies.len().to_string());
        if one.is_empty() {
            break;
        }
        copies.push(opener.node(one, access, layer)?);
    }
    if copies.is_empty() {
        return Err(OpenError::new(
            "Number of provided children must be 1 or more",
        ));
    }
    let wanted = options.take_size("vote-threshold")?;
    let threshold = wanted.and_then(|count| usize::try_from(count).ok());
    let threshold = match threshold {
        None if wanted.is_none() => {
            return Err(OpenError::new("Parameter 'vote-threshold' is missing"));
        }
        Some(count) if (1..=copies.len()).contains(&count) => count,
        _ => {
            return Err(OpenError::new(
                "threshold may not exceed children count, and is at least 1",
            ));
        }
    };
    let rewrites = options.take_switch("rewrite-corrupted")?.unwrap_or(false);
    // Reading all copies and comparing them is right for any pattern.
    options.take("read-pattern");
    if options.take_switch("blkverify")? == Some(true) && (copies.len(), threshold) != (2, 2) {
        return Err(OpenError::new(
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
        ));
    }
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block protocol 'quorum' doesn't support the option '{key}'"
        )));
    }
    let storage = Quorum {
        copies: copies.iter().map(Node::storage).collect(),
        threshold,
        rewrites: rewrites && access.write,
    };
    Ok(Node {
        driver: "quorum",
        filename: described.to_name(),
        options: described,
        content: Content::Plain(Arc::new(storage)),
        writable: copies.iter().all(|node| node.writable),
        children: copies.into_iter().map(|node| ("children", node)).collect(),
        debug: None,
    })
}

impl Quorum {
    /// Asks all copies to do something; it is done if enough could.
    fn all(&self, operation: Operation, act: impl Fn(&dyn Storage) -> Result<()>) -> Result<()> {
        let mut failure = None;
        let mut done = 0;
        for copy in &self.copies {
            match act(&**copy) {
                Ok(()) => done += 1,
                Err(error) => failure = Some(error),
            }
        }
        if done >= self.threshold {
            return Ok(());
        }
        Err(failure.unwrap_or_else(|| StorageError::new(operation, StorageErrorKind::Io)))
    }

    /// What most copies say of a range.
    fn vote(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut answers: Vec<(Vec<u8>, usize)> = Vec::new();
        let mut failure = None;
        for copy in &self.copies {
            let mut bytes = vec![0; len];
            match copy.read_at(&mut bytes, offset) {
                Err(error) => failure = Some(error),
                Ok(()) => match answers.iter_mut().find(|(known, _)| *known == bytes) {
                    Some((_, votes)) => *votes += 1,
                    None => answers.push((bytes, 1)),
                },
            }
        }
        // Of those with as many votes, what an earlier copy says.
        let best = answers.into_iter().rev().max_by_key(|(_, votes)| *votes);
        match best {
            Some((bytes, votes)) if votes >= self.threshold => Ok(bytes),
            _ => Err(failure.unwrap_or_else(|| {
                StorageError::new(Operation::Read, StorageErrorKind::Io)
                    .at(offset, len as u64)
                    .with_detail("too few copies agree")
            })),
        }
    }
}

impl Storage for Quorum {
    fn len(&self) -> Result<u64> {
        let mut len = None;
        for copy in &self.copies {
            let found = copy.len()?;
            if *len.get_or_insert(found) != found {
                return Err(StorageError::new(Operation::Len, StorageErrorKind::Invalid)
                    .with_detail("the copies differ in length"));
            }
        }
        Ok(len.unwrap_or(0))
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let bytes = self.vote(offset, len)?;
        if self.rewrites {
            for copy in &self.copies {
                let mut found = vec![0; len];
                if copy.read_at(&mut found, offset).is_err() || found != bytes {
                    copy.write_at(&bytes, offset)?;
                }
            }
        }
        let mut rest = bytes.as_slice();
        for buf in bufs {
            let Some((part, behind)) = rest.split_at_checked(buf.len()) else {
                break;
            };
            buf.copy_from_slice(part);
            rest = behind;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.all(Operation::Write, |copy| {
            copy.write_vectored_at(bufs, offset)
        })
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.all(Operation::WriteZeroes, |copy| {
            copy.write_zeroes(range.clone(), flags)
        })
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.all(Operation::Discard, |copy| copy.discard(range.clone()))
    }

    fn flush(&self) -> Result<()> {
        self.all(Operation::Flush, |copy| copy.flush())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.all(Operation::SetLen, |copy| copy.set_len(len))
    }
}

#[cfg(test)]
mod tests {
    use qcow2_io::Memory;

    use super::*;

    fn quorum(copies: [u8; 3], threshold: usize) -> Quorum {
        let copies = copies.map(|byte| Arc::new(Memory::from(vec![byte; 512])) as Arc<dyn Storage>);
        Quorum {
            copies: copies.to_vec(),
            threshold,
            rewrites: true,
        }
    }

    #[test]
    fn what_most_copies_say_counts_and_is_written_to_the_others() {
        let disk = quorum([1, 2, 2], 2);
        let mut bytes = [0; 512];
        disk.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [2; 512]);
        disk.copies[0].read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [2; 512]);
    }

    #[test]
    fn copies_that_do_not_agree_are_an_error() {
        let mut bytes = [0; 512];
        let failed = quorum([1, 2, 3], 2).read_at(&mut bytes, 0);
        assert_eq!(failed.unwrap_err().kind(), StorageErrorKind::Io);
    }
}
