//! The drivers `null-co` and `null-aio`: a disk of any size that keeps nothing.

use std::sync::Arc;

use qcow2_io::{Memory, Null, Slice, Storage};

use super::{Access, Content, Node, NodeOptions, OpenError};

/// What such a disk has if nothing is said; bytes.
const SIZE: u64 = 1 << 30;

pub(super) fn open(
    driver: &'static str,
    mut options: NodeOptions,
    described: NodeOptions,
    access: &Access,
) -> Result<Node, OpenError> {
    let size = options.take_size("size")?.unwrap_or(SIZE);
    options.take_size("latency-ns")?;
    // Reads give zeros in either case; what differs is only whether that is promised.
    let zeros = options.take_switch("read-zeroes")?.unwrap_or(false);
    options.take("filename");
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block protocol '{driver}' doesn't support the option '{key}'"
        )));
    }
    let empty: Arc<dyn Storage> = if zeros {
        Arc::new(Memory::new())
    } else {
        Arc::new(Null::new())
    };
    let storage = if zeros {
        let memory = empty;
        memory
            .set_len(size)
            .map_err(|error| OpenError::new(error.to_string()))?;
        memory
    } else {
        Arc::new(Slice::new(empty, 0, size).map_err(|error| OpenError::new(error.to_string()))?)
    };
    Ok(Node {
        driver,
        filename: format!("{driver}://"),
        options: described,
        content: Content::Plain(storage),
        children: Vec::new(),
        writable: access.write,
        debug: None,
    })
}
