//! The driver `raw`: the disk is what lies below, or a window of it.

use std::sync::Arc;

use qcow2_io::{Slice, Storage};

use super::{Content, Node, NodeOptions, OpenError};

pub(super) fn open(
    mut options: NodeOptions,
    described: NodeOptions,
    file: Node,
) -> Result<Node, OpenError> {
    let offset = options.take_size("offset")?.unwrap_or(0);
    let size = options.take_size("size")?;
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block format 'raw' does not support the option '{key}'"
        )));
    }
    let mut storage = file.storage();
    if offset > 0 || size.is_some() {
        let len = storage
            .len()
            .map_err(|error| OpenError::of_file(&file.filename, &error))?;
        let rest = len.checked_sub(offset).ok_or_else(|| {
            OpenError::new("Offset cannot be greater than the size of the containing file")
        })?;
        let size = size.unwrap_or(rest);
        if size > rest {
            return Err(OpenError::new(
                "The sum of offset and size has to be smaller or equal to the actual size of the containing file",
            ));
        }
        let window = Slice::new(storage, offset, size);
        let window = window.map_err(|error| OpenError::of_file(&file.filename, &error))?;
        storage = Arc::new(window) as Arc<dyn Storage>;
    }
    Ok(Node {
        driver: "raw",
        filename: file.filename.clone(),
        options: described,
        content: Content::Plain(storage),
        writable: file.writable,
        debug: None,
        children: vec![("file", file)],
    })
}
