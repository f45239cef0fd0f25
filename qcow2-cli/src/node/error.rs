//! Why a node can't be opened, in the words of the reference programs.

use std::error::Error;

use qcow2_image::ImageError;
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
    pub(super) fn of_image(error: &ImageError) -> Self {
        let text = match error {
            ImageError::Header(header) => header.to_string(),
            ImageError::Storage(storage) => system::describe(storage),
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
}

impl From<ObjectError> for OpenError {
    fn from(error: ObjectError) -> Self {
        Self::new(error.0)
    }
}
