//! Where data and holes are.

/// What a stretch of a storage holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExtentKind {
    /// Stored bytes, which may be anything.
    Data,
    /// Reads as zeros, and the storage remembers that: space may be reserved for it.
    Zero,
    /// Reads as zeros because nothing is stored there.
    Hole,
}

impl ExtentKind {
    /// Whether every byte is known to read as zero.
    pub fn reads_as_zeros(self) -> bool {
        !matches!(self, Self::Data)
    }
}

/// A stretch of a storage that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
    /// Which layer of a chain it comes from; 0 is the storage asked.
    pub depth: u32,
}

impl Extent {
    /// An extent of the storage asked itself.
    pub fn new(offset: u64, len: u64, kind: ExtentKind) -> Self {
        Self {
            offset,
            len,
            kind,
            depth: 0,
        }
    }

    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Collects extents in order, joining neighbours of one kind, until a limit of entries is reached.
#[derive(Debug)]
pub(crate) struct ExtentList {
    extents: Vec<Extent>,
    max: usize,
    full: bool,
}

impl ExtentList {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            extents: Vec::new(),
            max,
            full: max == 0,
        }
    }

    /// Appends a stretch that starts where the last ended; nothing once the list is full.
    pub(crate) fn push(&mut self, offset: u64, len: u64, kind: ExtentKind) {
        if self.full || len == 0 {
            return;
        }
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.len = last.len.saturating_add(len),
            _ if count == self.max => self.full = true,
            _ => self.extents.push(Extent::new(offset, len, kind)),
        }
    }

    /// Whether a stretch has been turned away, so that more are of no use.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    pub(crate) fn into_vec(self) -> Vec<Extent> {
        self.extents
    }
}
