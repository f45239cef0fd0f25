//! Carrying parts of one disk over to another: what a rebase, a commit and an export of differences have in common.
//!
//! Something names [`Candidate`]s: stretches that the target may lack. A [`Plan`] cuts them into pieces of work in units of the
//! target. Threads take these, read, compare where that is asked for, and store what differs.

mod plan;
mod run;
mod sink;

use std::ops::Range;

use qcow2_io::Storage;

use crate::chain::ChainError;
use crate::{Monitor, threads};

use self::plan::Plan;
use self::run::Run;
pub(crate) use self::sink::Sink;

/// A stretch of the disk that may have to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) range: Range<u64>,
    /// The source is known to read as zeros.
    pub(crate) is_zero: bool,
    pub(crate) rival: Rival,
}

/// What the source is compared with: only what differs is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rival {
    /// Zeros.
    Zeros,
    /// The other disk, which must be read.
    Data,
    /// Nothing: it is stored anyway.
    None,
}

/// Names the candidates, from the front of the disk to the back.
pub(crate) trait Candidates: Send {
    fn next(&mut self) -> Result<Option<Candidate>, ChainError>;
}

/// What was carried over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// Bytes that were read, to be stored or compared.
    pub read_bytes: u64,
    /// Bytes of the disk that were stored as data, compressed or not.
    pub stored_bytes: u64,
    /// Bytes of the disk that were stored as zeros.
    pub zeroed_bytes: u64,
    /// Clusters that were stored compressed.
    pub compressed_clusters: u64,
}

/// How the work is done.
#[derive(Clone, Copy, Default)]
pub(crate) struct Work<'a> {
    pub(crate) threads: usize,
    pub(crate) monitor: Option<&'a dyn Monitor>,
    /// Bytes that are read or stored a second, at most; 0 for no limit.
    pub(crate) rate: u64,
}

impl Work<'_> {
    fn thread_count(&self) -> usize {
        match self.threads {
            0 => threads::available(),
            count => count.min(threads::MAX),
        }
    }
}

/// The disks of a transfer, and what they are called if they fail.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disks<'a> {
    /// What is to be stored; zeros behind its end.
    pub(crate) source: &'a dyn Storage,
    pub(crate) source_name: &'static str,
    /// What it is compared with.
    pub(crate) other: &'a dyn Storage,
    pub(crate) other_name: &'static str,
    pub(crate) target: Sink<'a>,
    pub(crate) target_name: &'static str,
    /// Nothing is stored behind this; bytes.
    pub(crate) size: u64,
    /// Zeros below this are stored as data; bytes.
    pub(crate) dense_below: u64,
}

/// Stores the candidates that differ.
///
/// Not durable before the target is flushed.
pub(crate) fn transfer(
    disks: Disks<'_>,
    candidates: &mut dyn Candidates,
    work: Work<'_>,
) -> Result<Transferred, ChainError> {
    let plan = Plan::new(candidates, disks.target.unit(), disks.size);
    let run = Run::new(disks, plan, work);
    threads::on_threads(work.thread_count(), &|| run.work());
    run.finish()
}
