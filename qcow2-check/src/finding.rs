//! What the checker says: a finding is a value, with a stable code, a place and plain words.

use std::borrow::Cow;
use std::fmt;

use crate::Code;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Severity {
    /// Worth knowing, nothing is wrong.
    Note,
    /// The image is consistent, but opening or using it may harm who does.
    Hazard,
    /// Space that nothing uses; harmless.
    Leak,
    /// Data is lost, unreachable or in danger.
    Corruption,
    /// Something could not be checked.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Hazard => "hazard",
            Self::Leak => "leak",
            Self::Corruption => "corruption",
            Self::Error => "error",
        })
    }
}

/// A structure of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Structure {
    /// The header with its extensions and the backing file name: cluster 0.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// An L2 table.
    L2Table,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of one bitmap.
    BitmapTable,
    /// A cluster of one bitmap's bits.
    BitmapData,
    /// The LUKS header and its key material.
    CryptoHeader,
    /// A cluster of guest data.
    Data,
    /// A cluster of compressed guest data.
    CompressedData,
    /// A cluster of the image file, whoever owns it.
    Cluster,
    /// The image file as a whole.
    File,
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Header => "header",
            Self::ActiveL1 => "active L1 table",
            Self::SnapshotL1 => "snapshot L1 table",
            Self::L2Table => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
            Self::CryptoHeader => "encryption header",
            Self::Data => "guest data",
            Self::CompressedData => "compressed guest data",
            Self::Cluster => "cluster",
            Self::File => "file",
        })
    }
}

/// Bytes from `start` up to but not including `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// The byte behind the last one.
    pub end: u64,
}

impl ByteRange {
    /// `len` bytes from `start` on, ending at the largest offset there is.
    pub const fn new(start: u64, len: u64) -> Self {
        Self {
            start,
            end: start.saturating_add(len),
        }
    }
}

/// Where a finding is. Whatever is known of the place is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct Place {
    /// The structure.
    pub structure: Structure,
    /// Host bytes concerned.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub host: Option<ByteRange>,
    /// Which of the structure's entries, counted from 0.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub index: Option<u64>,
    /// Guest bytes concerned.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub guest: Option<ByteRange>,
    /// The snapshot whose tree it is, by its place in the snapshot table; `None` for the active tree and for what no tree owns.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub snapshot: Option<u64>,
}

impl Place {
    /// A place of which only the structure is known.
    pub const fn of(structure: Structure) -> Self {
        Self {
            structure,
            host: None,
            index: None,
            guest: None,
            snapshot: None,
        }
    }

    /// The place with `len` host bytes from `start` on.
    #[must_use]
    pub const fn at(mut self, start: u64, len: u64) -> Self {
        self.host = Some(ByteRange::new(start, len));
        self
    }

    /// The place with an entry's index.
    #[must_use]
    pub const fn entry(mut self, index: u64) -> Self {
        self.index = Some(index);
        self
    }

    /// The place with `len` guest bytes from `start` on.
    #[must_use]
    pub const fn guest(mut self, start: u64, len: u64) -> Self {
        self.guest = Some(ByteRange::new(start, len));
        self
    }

    /// The place in a snapshot's tree, or in the active one.
    #[must_use]
    pub const fn snapshot(mut self, snapshot: Option<u64>) -> Self {
        self.snapshot = snapshot;
        self
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.structure)?;
        if let Some(snapshot) = self.snapshot {
            write!(f, " of snapshot {snapshot}")?;
        }
        if let Some(index) = self.index {
            write!(f, " entry {index}")?;
        }
        if let Some(host) = &self.host {
            write!(f, " at {:#x}", host.start)?;
            if host.end > host.start {
                write!(f, "..{:#x}", host.end)?;
            }
        }
        if let Some(guest) = &self.guest {
            write!(f, ", guest {:#x}..{:#x}", guest.start, guest.end)?;
        }
        Ok(())
    }
}

/// One thing the checker found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is, in the catalogue.
    pub code: Code,
    /// Where it is.
    pub place: Place,
    /// How many clusters, entries or visits of the same kind this finding stands for; at least 1.
    pub count: u64,
    /// What was found there, with values.
    pub detail: Cow<'static, str>,
}

impl Finding {
    /// A finding that stands for itself alone.
    pub fn new(code: Code, place: Place, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            place,
            count: 1,
            detail: detail.into(),
        }
    }

    /// The finding, standing for `count` of its kind.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.count = count;
        self
    }

    /// How bad it is.
    pub const fn severity(&self) -> Severity {
        self.code.severity()
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.code, self.place, self.detail)?;
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut out = serializer.serialize_struct("Finding", 6)?;
        out.serialize_field("code", self.code.id())?;
        out.serialize_field("severity", &self.severity())?;
        out.serialize_field("place", &self.place)?;
        out.serialize_field("count", &self.count)?;
        out.serialize_field("detail", &self.detail)?;
        out.serialize_field("repair", self.code.repair())?;
        out.end()
    }
}
