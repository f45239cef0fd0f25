//! The driver `file`: a file or block device of the host.

use std::sync::Arc;

use qcow2_io::{FileOptions, LockMode, Storage};

use super::{Access, Content, Node, NodeOptions, OpenError};

pub(super) fn open(mut options: NodeOptions, access: &Access) -> Result<Node, OpenError> {
    let described = options.clone();
    let name = options
        .take("filename")
        .ok_or_else(|| OpenError::new("A block device must be specified for \"file\""))?;
    let mut file = FileOptions::new().write(access.write).direct(access.direct);
    if options.take("locking").as_deref() == Some("off") {
        file = file.lock(LockMode::None);
    }
    if access.force_share && !access.write {
        file = file.force_share(true);
    }
    // What the kernel does on its own is the kernel's business.
    options.take("aio");
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block protocol 'file' doesn't support the option '{key}'"
        )));
    }
    let storage = file
        .open(&name)
        .map_err(|error| OpenError::of_file(&name, &error))?;
    Ok(Node {
        driver: "file",
        filename: name,
        options: described,
        content: Content::Plain(Arc::new(storage) as Arc<dyn Storage>),
        children: Vec::new(),
        writable: access.write,
        debug: None,
    })
}
