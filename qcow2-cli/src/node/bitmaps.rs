//! What is said of bitmaps that could not be stored at the end.

use qcow2_image::ImageError;

use super::Node;
use crate::words::system;

impl Node {
    /// What it is called in messages about itself: the name that it was given, or one such as the reference programs make up.
    pub fn name(&self) -> &str {
        self.options.text("node-name").unwrap_or("#block000")
    }
}

/// The usual words, without the program's name, for bitmaps that found no place when the node of this name was closed; `None` if the
/// error is another one.
pub(crate) fn lost(error: &ImageError, node: &str) -> Option<String> {
    let ImageError::BitmapsLost { name, source } = error else {
        return None;
    };
    let what = match name {
        Some(name) => format!("write bitmap '{name}' to file"),
        None => "update bitmap extension".to_owned(),
    };
    let cause = system::describe(&**source);
    Some(format!(
        "Lost persistent bitmaps during inactivation of node '{node}': Failed to {what}: {cause}"
    ))
}
