//! Why an image can't be amended.

use thiserror::Error;

use crate::ImageError;
use crate::create::CreateError;

/// Why options of an image were not changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AmendError {
    /// There is no option of this name.
    #[error("there is no option '{option}' for qcow2 images")]
    UnknownOption {
        /// The name.
        option: String,
    },
    /// The option is decided when an image is created, once and for all.
    #[error("{option} can't be changed: {why}")]
    Fixed {
        /// The option.
        option: String,
        /// Why, or what to do instead.
        why: &'static str,
    },
    /// A value that the option doesn't know.
    #[error(transparent)]
    Value(#[from] CreateError),
    /// The options contradict each other, or what the image is. Nothing was changed.
    #[error("{option} is refused: {why}")]
    Refused {
        /// The option.
        option: &'static str,
        /// Why.
        why: String,
    },
    /// The [monitor](crate::Monitor) has ended it.
    #[error("amending was cancelled")]
    Cancelled,
    /// Key slots can't be changed.
    #[cfg(feature = "encryption")]
    #[error(transparent)]
    Luks(#[from] crate::luks::LuksError),
    /// The image or its storage failed.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl AmendError {
    pub(super) fn refused(option: &'static str, why: impl Into<String>) -> Self {
        Self::Refused {
            option,
            why: why.into(),
        }
    }
}

macro_rules! by_image {
    ($($error:ty),+) => {
        $(impl From<$error> for AmendError {
            fn from(error: $error) -> Self {
                Self::Image(error.into())
            }
        })+
    };
}

by_image!(
    qcow2_io::StorageError,
    qcow2_cache::MetadataError,
    qcow2_alloc::AllocError,
    qcow2_format::HeaderError,
    qcow2_format::SnapshotError
);
