//! File names: plain ones, those with a protocol before them, and descriptions.

use std::borrow::Cow;
use std::path::Path;

use super::{NodeOptions, OpenError};

/// What a name stands for. Names without a description of a driver get `file.filename`; which format lies in there is asked later.
///
/// # Errors
///
/// When a description can't be read, or the protocol is unknown.
pub(super) fn parse(name: &str) -> Result<NodeOptions, OpenError> {
    if let Some(json) = name.strip_prefix("json:") {
        return NodeOptions::from_json(json);
    }
    let mut options = NodeOptions::default();
    match protocol(name) {
        None => options.set("file.filename", name),
        Some("file") => options.set("file.filename", without_protocol(name)),
        Some("blkdebug") => {
            // `blkdebug:CONFIG:FILE`; the rules may be empty, the file may have colons.
            let rest = name.strip_prefix("blkdebug:").unwrap_or(name);
            let (config, file) = rest.split_once(':').ok_or_else(|| {
                OpenError::new("blkdebug requires both config file and image path")
            })?;
            options.set("file.driver", "blkdebug");
            if !config.is_empty() {
                options.set("file.config", config);
            }
            options.set("file.image.driver", "file");
            options.set("file.image.filename", file);
        }
        Some(other) => return Err(OpenError::new(format!("Unknown protocol '{other}'"))),
    }
    options.set_default("file.driver", "file");
    Ok(options)
}

/// The name of a file, without the protocol that says that it is one.
pub(crate) fn without_protocol(name: &str) -> Cow<'_, str> {
    match name.strip_prefix("file:") {
        // So that it is not taken for one when it is seen again.
        Some(path) if protocol(path).is_some() => Cow::Owned(format!("./{path}")),
        Some(path) => Cow::Borrowed(path),
        None => Cow::Borrowed(name),
    }
}

/// What stands before the first colon, unless a slash comes before that.
pub(super) fn protocol(name: &str) -> Option<&str> {
    let colon = name.find(':')?;
    let before = name.get(..colon)?;
    (!before.contains('/')).then_some(before)
}

/// The name of a file that an image in `parent` names: relative ones are meant from its directory.
pub(crate) fn resolve(parent: &str, name: &str) -> String {
    if name.starts_with('/') || protocol(name).is_some() {
        return name.to_owned();
    }
    match Path::new(parent).parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.join(name).to_string_lossy().into_owned(),
        _ => name.to_owned(),
    }
}
