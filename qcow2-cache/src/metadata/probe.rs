//! Who may let steps of the work fail.

use std::fmt;
use std::sync::Arc;

use qcow2_io::StorageError;

use super::Metadata;
use crate::MetadataError;

/// A step of the work on metadata, or on the copying that goes with it, that is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Clusters are looked for.
    Allocate,
    /// Clusters for compressed data are looked for.
    AllocateCompressed,
    /// A refcount is raised or lowered, in memory.
    ChangeRefcount,
    /// Clusters lose a reference.
    Free,
    /// The refcount block of clusters that are handed out is looked for, and made where there is none.
    FindBlock,
    /// It is written.
    WriteBlock,
    /// The refcount table gets its entry.
    LinkBlock,
    /// The blocks of a refcount table in a new place are written.
    WriteTableBlocks,
    /// That table is written.
    WriteTable,
    /// The header gets its place.
    SwitchTable,
    /// An L2 table is written that is new, or was shared.
    WriteL2,
    /// Entries of an L2 table change, in memory.
    ChangeL2,
    /// An entry of the L1 table changes, in memory.
    ChangeL1,
    /// A place for a longer L1 table is looked for.
    AllocateL1,
    /// That table is written.
    WriteL1,
    /// The header gets its place.
    SwitchL1,
    /// What a new cluster is to hold beside a write is read.
    ReadCow,
    /// It is written, with the guest's data.
    WriteCow,
}

/// Is asked before each [`Step`]; an error lets the step fail as if the storage had. For those who want to see what happens then.
#[derive(Clone)]
pub struct Probe(Arc<dyn Fn(Step) -> Result<(), StorageError> + Send + Sync>);

impl Probe {
    /// Asks `asked`. It must not use the image, which is in the middle of a request.
    pub fn new(asked: impl Fn(Step) -> Result<(), StorageError> + Send + Sync + 'static) -> Self {
        Self(Arc::new(asked))
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Probe")
    }
}

impl Metadata {
    /// With someone who is asked before steps.
    #[must_use]
    pub fn probed(mut self, probe: Option<Probe>) -> Self {
        self.probe = probe;
        self
    }

    /// Asks whether a step may be done.
    ///
    /// # Errors
    ///
    /// What the [`Probe`] says, if there is one.
    #[inline]
    pub fn before(&self, step: Step) -> Result<(), MetadataError> {
        match &self.probe {
            None => Ok(()),
            Some(probe) => Ok((probe.0)(step)?),
        }
    }
}
