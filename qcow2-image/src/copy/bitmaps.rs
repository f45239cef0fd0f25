//! Bitmaps that are carried along.

use crate::{BitmapState, Image, ImageError};

/// Which bitmaps were carried along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapCopy {
    /// Names of those that the target has now.
    pub copied: Vec<Vec<u8>>,
    /// Names of those that can't be used, and were left out.
    pub skipped: Vec<Vec<u8>>,
}

/// Gives `target` the persistent bitmaps of `source`: names, granularities, bits, and whether they record. For after a copy, whose
/// writes they would else record; both disks must be of one size.
///
/// One that is inconsistent or broken is left out if `skip_broken` says so, and is else an error, before anything is changed.
///
/// # Errors
///
/// [`ImageError::BitmapUnusable`]; names that the target has already; what the storages report. Bitmaps that were complete by then
/// stay.
///
/// # Durability
///
/// Durable on return. After a crash the target has some of them, each as a whole.
pub fn copy_bitmaps(
    source: &Image,
    target: &Image,
    skip_broken: bool,
) -> Result<BitmapCopy, ImageError> {
    let mut done = BitmapCopy::default();
    let all = source.bitmaps()?;
    for bitmap in &all {
        let why = match &bitmap.state {
            BitmapState::Consistent => continue,
            BitmapState::Inconsistent => "it was not stored by who recorded in it last".to_owned(),
            BitmapState::Broken { why } => why.clone(),
        };
        if !skip_broken {
            return Err(ImageError::BitmapUnusable {
                name: String::from_utf8_lossy(&bitmap.name).into_owned(),
                why,
            });
        }
        done.skipped.push(bitmap.name.clone());
    }
    for bitmap in all {
        if bitmap.state != BitmapState::Consistent {
            continue;
        }
        target.adopt_bitmap(source, &bitmap.name, bitmap.auto)?;
        done.copied.push(bitmap.name);
    }
    Ok(done)
}
