//! Comparing two disks: any two [`Storage`]s, or two [`Chain`]s, of which more is known.
//!
//! [`compare`] asks both where they have data. Where both know that they have zeros, nothing is read, nor where both have the same
//! bytes of the same file; where one knows it, the other is looked at for zeros; the rest is read from both, by several threads. What is found is the first difference, whichever thread
//! came by a later one before.
//!
//! ```
//! use qcow2_image::compare::{CompareOptions, Difference, compare};
//! use qcow2_io::{Memory, Storage};
//!
//! let first = Memory::with_len(1 << 40)?;
//! let second = Memory::with_len(1 << 40)?;
//! second.write_at(&[1], 12345)?;
//! let found = compare(&first, &second, &CompareOptions::new())?;
//! assert_eq!(found.difference, Some(Difference::Content { offset: 12345 }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod options;
mod plan;
mod run;
mod view;

use std::fmt;

use qcow2_io::{Null, Storage, StorageError};
use thiserror::Error;

use self::run::Run;
use crate::chain::Chain;
use crate::threads::on_threads;

pub use options::CompareOptions;

/// One of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The one that was named first.
    First,
    /// The other.
    Second,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::First => "first",
            Self::Second => "second",
        })
    }
}

/// Where two disks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Difference {
    /// This byte is the first that is not the same; it may lie behind the end of the shorter disk, which counts as zeros there.
    Content {
        /// Its offset.
        offset: u64,
    },
    /// From here on they are stored in different ways: only when [asked for](CompareOptions::strict).
    Allocation {
        /// Bytes from the start.
        offset: u64,
    },
    /// The lengths are not the same: only when [asked for](CompareOptions::strict). Nothing else was looked at.
    Size,
}

/// What came of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Comparison {
    /// The first difference; `None` if there is none.
    pub difference: Option<Difference>,
    /// Length of the first disk in bytes.
    pub first_len: u64,
    /// Length of the second disk in bytes.
    pub second_len: u64,
    /// Bytes that were read from both together.
    pub read_bytes: u64,
}

/// Why two disks could not be compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A disk can't be read, or does not tell its length or where its data is.
    #[error("the {side} disk fails at offset {offset:#x} ({len} bytes)")]
    Storage {
        /// Which one.
        side: Side,
        /// First byte of the piece that was asked for.
        offset: u64,
        /// Its length in bytes; 0 if the request had no place.
        len: u64,
        /// Why.
        source: StorageError,
    },
    /// A size in the options is none that can be worked with.
    #[error("the chunk size can't be {value}: it goes from 512 bytes to 64 MiB")]
    Chunk {
        /// What was asked for.
        value: u64,
    },
    /// The [monitor](crate::Monitor) has ended it.
    #[error("the comparison was cancelled")]
    Cancelled,
}

/// Compares what two disks show. A disk that is longer must have zeros behind the end of the other.
///
/// A difference is told even if something behind it can't be read, and only if all before it was.
///
/// An image counts as one layer here, of which only data, noted zeros and holes are told apart; [`compare_chains`] looks deeper.
///
/// # Errors
///
/// [`CompareError`] says which side failed, and where. All threads stop at the first error or difference, when all
/// before it is known.
///
/// # Panics
///
/// When a storage panics: all threads stop, then the caller's panics.
pub fn compare(
    first: &dyn Storage,
    second: &dyn Storage,
    options: &CompareOptions<'_>,
) -> Result<Comparison, CompareError> {
    // Which bytes a storage shows, only reading tells.
    look_at(&Chain::raw(first), &Chain::raw(second), false, options)
}

/// As [`compare`], for disks whose layers are known: where both take their bytes from the same place, such as a backing file that is
/// the same for both, nothing is read.
///
/// # Errors
///
/// As for [`compare`].
///
/// # Panics
///
/// As for [`compare`].
pub fn compare_chains(
    first: &Chain<'_>,
    second: &Chain<'_>,
    options: &CompareOptions<'_>,
) -> Result<Comparison, CompareError> {
    look_at(first, second, true, options)
}

/// Compares two disks; `shares` tells whether layers may be the same.
fn look_at(
    first: &Chain<'_>,
    second: &Chain<'_>,
    shares: bool,
    options: &CompareOptions<'_>,
) -> Result<Comparison, CompareError> {
    let len = |side, chain: &Chain<'_>| {
        let len = chain.storage().map_or(Ok(0), Storage::len);
        len.map_err(|source| CompareError::Storage {
            side,
            offset: 0,
            len: 0,
            source,
        })
    };
    let (first_len, second_len) = (len(Side::First, first)?, len(Side::Second, second)?);
    let mut result = Comparison {
        difference: None,
        first_len,
        second_len,
        read_bytes: 0,
    };
    if options.strict && first_len != second_len {
        result.difference = Some(Difference::Size);
        return Ok(result);
    }
    let none = Null::new();
    let chains = [first, second];
    let disks = chains.map(|chain| chain.storage().unwrap_or(&none));
    let run = Run::new(chains, disks, shares, first_len.max(second_len), options)?;
    on_threads(options.thread_count(), &|| run.work());
    let (difference, read_bytes) = run.finish()?;
    Ok(Comparison {
        difference,
        read_bytes,
        ..result
    })
}
