//! Why a node can't be opened, in the words of the reference programs.

use std::error::Error;

use qcow2_format::header::HeaderTable;
use qcow2_format::{HeaderError, SnapshotError};
use qcow2_image::luks::LuksError;
use qcow2_image::{ImageError, SnapshotL1Problem};
use qcow2_io::{StorageError, StorageErrorKind};
use thiserror::Error;

use crate::objects::ObjectError;
use crate::words::system;

/// A node that can't be opened. The text does not name the outermost file: who asked for it does.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{text}")]
pub struct OpenError {
    /// What is wrong.
    pub text: String,
    /// Lines to print below it, without prefix.
    pub hints: Vec<String>,
}

impl OpenError {
    /// An error without hints.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            hints: Vec::new(),
        }
    }

    /// A protocol's own failure to open a file.
    pub(super) fn of_file(name: &str, error: &StorageError) -> Self {
        if error.kind() == StorageErrorKind::Locked {
            return Self::locked(name, error);
        }
        Self::new(format!(
            "Could not open '{name}': {}",
            system::describe(error)
        ))
    }

    fn locked(name: &str, error: &StorageError) -> Self {
        let cause = error.to_string();
        let permission = cause.split('"').nth(1).unwrap_or("write");
        // Somebody else uses what this opener does not share, or does not share what it uses.
        let shared = if cause.contains("holds") {
            "shared "
        } else {
            ""
        };
        let mut found = Self::new(format!("Failed to get {shared}\"{permission}\" lock"));
        found
            .hints
            .push(format!("Is another process using the image [{name}]?"));
        found
    }

    /// An image that is refused.
    pub(crate) fn of_image(error: &ImageError) -> Self {
        if let ImageError::SnapshotEntry {
            entry,
            count,
            source,
        } = error
        {
            return Self::of_snapshot_table(*entry, *count, source);
        }
        let text = match error {
            ImageError::Header(header) => header_text(header),
            ImageError::MarkedCorrupt => {
                "qcow2: Image is corrupt; cannot be opened read/write".to_owned()
            }
            ImageError::Luks(LuksError::WrongPassphrase | LuksError::NoActiveSlot) => {
                "Invalid password, cannot unlock any keyslot".to_owned()
            }
            ImageError::Storage(storage) => system::describe(storage),
            ImageError::SnapshotL1 { problem, .. } => {
                format!("Failed to load snapshot: {}", snapshot_l1_text(*problem))
            }
            ImageError::NoSnapshot { .. } => {
                "Failed to load snapshot: Can't find snapshot".to_owned()
            }
            other => {
                let mut text = other.to_string();
                let mut cause = other.source();
                while let Some(error) = cause {
                    text = format!("{text}: {error}");
                    cause = error.source();
                }
                text
            }
        };
        Self::new(text)
    }

    /// A snapshot table that can't be read on from an entry.
    fn of_snapshot_table(entry: u64, count: u64, error: &SnapshotError) -> Self {
        let (text, what) = match error {
            SnapshotError::ExtraDataTooLong { .. } => (
                format!("Too much extra metadata in snapshot table entry {entry}"),
                "this extra metadata".to_owned(),
            ),
            SnapshotError::TableTooLarge { .. } => (
                "Snapshot table is too big".to_owned(),
                format!("all {} overhanging snapshots", count - entry.min(count)),
            ),
            other => return Self::new(format!("Snapshot table entry {entry}: {other}")),
        };
        let mut found = Self::new(text);
        let hint = format!("You can force-remove {what} with qemu-img check -r all");
        found.hints.push(hint);
        found
    }
}

/// What is wrong with the L1 table of a snapshot.
pub(crate) fn snapshot_l1_text(problem: SnapshotL1Problem) -> &'static str {
    match problem {
        SnapshotL1Problem::TooLarge => "Snapshot L1 table too large",
        _ => "Snapshot L1 table offset invalid",
    }
}

/// What is wrong with a header.
fn header_text(error: &HeaderError) -> String {
    match error {
        HeaderError::UnknownIncompatible { bits, names } => {
            // First those that the image names, then the rest as bits.
            let mut rest = *bits;
            let mut texts = Vec::new();
            for name in names {
                rest &= !(1_u64.checked_shl(name.bit.into()).unwrap_or(0));
                texts.push(String::from_utf8_lossy(name.name()).into_owned());
            }
            if rest != 0 {
                texts.push(format!("Unknown incompatible feature: {rest:x}"));
            }
            format!("Unsupported qcow2 feature(s): {}", texts.join(", "))
        }
        HeaderError::VirtualSize { .. } => "Image is too big".to_owned(),
        HeaderError::HeaderLength { found, min, .. } if found < min => {
            "qcow2 header too short".to_owned()
        }
        HeaderError::HeaderLength { .. } => "qcow2 header exceeds cluster size".to_owned(),
        HeaderError::BackingNameOffset { .. } => "Invalid backing file offset".to_owned(),
        HeaderError::BackingNameTooLong { .. } => "Backing file name too long".to_owned(),
        HeaderError::ExtensionCut { .. } | HeaderError::ExtensionTooLong { .. } => {
            "Header extension too large".to_owned()
        }
        HeaderError::TableTooLarge { table, .. } => format!("{} too large", table_name(*table)),
        HeaderError::TableUnaligned { table, .. } | HeaderError::TableEnd { table, .. } => {
            format!("{} offset invalid", table_name(*table))
        }
        HeaderError::L1TooSmall { .. } => "L1 table is too small".to_owned(),
        HeaderError::CryptoMissing => "Missing CRYPTO header for crypt method 2".to_owned(),
        other => other.to_string(),
    }
}

fn table_name(table: HeaderTable) -> &'static str {
    match table {
        HeaderTable::Refcount => "Reference count table",
        HeaderTable::Snapshots => "Snapshot table",
        HeaderTable::L1 => "Active L1 table",
    }
}

impl From<ObjectError> for OpenError {
    fn from(error: ObjectError) -> Self {
        Self::new(error.0)
    }
}
