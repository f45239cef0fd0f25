//! What `reopen` may change.

use crate::node::{Node, NodeOptions};

/// What a disk is opened anew with.
#[derive(Debug, Default)]
pub(super) struct Reopening {
    pub(super) more: NodeOptions,
    pub(super) read_only: Option<bool>,
    pub(super) cache: Option<String>,
}

impl Reopening {
    /// What is said twice, by a switch and by an option, if anything is.
    pub(super) fn contradiction(&self) -> Option<&'static str> {
        let says = |key| self.more.contains(key);
        if self.read_only.is_some() && says("read-only") {
            Some("Cannot set both -r/-w and 'read-only'")
        } else if self.cache.is_some() && (says("cache.direct") || says("cache.no-flush")) {
            Some("Cannot set both -c and the cache options")
        } else {
            None
        }
    }
}

/// What each node may change while it is open.
const OF_ALL: &[&str] = &[
    "auto-read-only",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "read-only",
];

/// What a qcow2 image may change besides.
const OF_QCOW2: &[&str] = &[
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "encrypt.format",
    "encrypt.key-secret",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.bitmap-directory",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.main-header",
    "overlap-check.refcount-block",
    "overlap-check.refcount-table",
    "overlap-check.snapshot-table",
    "overlap-check.template",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];

/// What a raw disk may change besides.
const OF_RAW: &[&str] = &["offset", "size"];

/// Leaves what is to be changed.
///
/// # Errors
///
/// The first option that can't be changed, and would be.
pub(super) fn check(node: &Node, more: &mut NodeOptions) -> Result<(), String> {
    let wanted: Vec<String> = more.iter().map(|(key, _)| key.to_owned()).collect();
    for key in wanted {
        let (node, own) = find(node, &key);
        let changes = match node.driver {
            "qcow2" => OF_QCOW2,
            "raw" => OF_RAW,
            _ => &[],
        };
        if OF_ALL.contains(&own) || changes.contains(&own) {
            continue;
        }
        if more
            .text(&key)
            .is_none_or(|value| now(node, own) != Some(value))
        {
            return Err(own.to_owned());
        }
        more.take(&key);
    }
    Ok(())
}

/// The node that an option is for, and what it is called there.
fn find<'a, 'k>(mut node: &'a Node, key: &'k str) -> (&'a Node, &'k str) {
    let mut own = key;
    while let Some((role, rest)) = own.split_once('.')
        && let Some(below) = node.child(role)
    {
        (node, own) = (below, rest);
    }
    (node, own)
}

/// What an option is now.
fn now<'a>(node: &'a Node, own: &str) -> Option<&'a str> {
    match own {
        "driver" => Some(node.driver),
        "filename" if node.child("file").is_none() => Some(&node.filename),
        _ => node.options.text(own),
    }
}
