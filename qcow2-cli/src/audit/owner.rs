//! Who owns a cluster of an image file?

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, anyhow};
use qcow2_check::{ClusterOwners, Options, Owner, owners};
use qcow2_format::HostOffset;
use qcow2_io::Storage;
use serde::Serialize;

use super::facts;
use super::text::{Look, clean, plural, quoted, shown, size};

/// An offset in bytes: decimal, or hexadecimal after `0x`, with k, M, G, T for the powers of 1024 behind it.
///
/// # Errors
///
/// What is no such number, or needs more than 64 bits.
pub fn parse_offset(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, suffix)) if !suffix.is_ascii_hexdigit() => {
            let shift = match suffix.to_ascii_lowercase() {
                'k' => 10,
                'm' => 20,
                'g' => 30,
                't' => 40,
                _ => return Err("a number, with k, M, G or T behind it if you like".into()),
            };
            (text.get(..at).unwrap_or_default(), shift)
        }
        _ => (text, 0),
    };
    let hex = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let number = match hex {
        _ if digits.contains(['+', '-']) => return Err("digits only".into()),
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let number = number.map_err(|error| error.to_string())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large for 64 bits".into())
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    #[serde(flatten)]
    cluster: &'a ClusterOwners,
    snapshot_names: Vec<SnapshotName>,
}

#[derive(Serialize)]
struct SnapshotName {
    index: u64,
    name: String,
}

/// Looks the owners up; the answer as text or, with `json`, as an object.
///
/// # Errors
///
/// The image can't be looked into, or the offset lies behind its end.
pub(crate) fn answer(
    name: &Path,
    storage: &dyn Storage,
    offset: u64,
    options: &Options<'_>,
    json: bool,
    look: Look,
) -> Result<String> {
    let len = storage.len()?;
    if offset >= len {
        return Err(anyhow!("the file ends at {len:#x}, before {offset:#x}"));
    }
    let cluster = owners(storage, HostOffset::new(offset), options)
        .map_err(|finding| anyhow!("{}", clean(&finding.to_string())))?;
    let names = if cluster.owners.iter().any(|owner| owner.snapshot.is_some()) {
        facts::snapshot_names(storage)
    } else {
        Vec::new()
    };
    let name_of = |index: u64| {
        let index = usize::try_from(index).ok()?;
        names.get(index).map(Vec::as_slice)
    };
    if json {
        let mut indices: Vec<u64> = cluster.owners.iter().filter_map(|o| o.snapshot).collect();
        indices.sort_unstable();
        indices.dedup();
        let snapshot_names = indices
            .into_iter()
            .filter_map(|index| {
                let name = String::from_utf8_lossy(name_of(index)?).into_owned();
                Some(SnapshotName { index, name })
            })
            .collect();
        let object = Json {
            filename: name.to_string_lossy().into_owned(),
            cluster: &cluster,
            snapshot_names,
        };
        return Ok(super::json::to_ascii(&object)? + "\n");
    }
    let start = cluster.host_offset;
    let end = start.saturating_add(cluster.cluster_size);
    let refcount = match cluster.refcount {
        Some(refcount) => format!("refcount {refcount}"),
        None => "its refcount can't be read".to_owned(),
    };
    let mut out = format!(
        "{}: cluster {} at {start:#x}..{end:#x} ({}), {refcount}, {}\n",
        look.bold(&shown(name)),
        start / cluster.cluster_size.max(1),
        size(cluster.cluster_size),
        match cluster.owners.len() {
            0 => "nobody's".to_owned(),
            n => plural(n as u64, "owner"),
        }
    );
    for owner in &cluster.owners {
        _ = writeln!(out, "  {}", clean(&words(owner, name_of)));
    }
    if cluster.owners.is_empty() && cluster.refcount.is_some_and(|refcount| refcount > 0) {
        out.push_str("  No reference leads here, so the cluster is leaked.\n");
    }
    Ok(out)
}

fn words<'a>(owner: &Owner, name_of: impl Fn(u64) -> Option<&'a [u8]>) -> String {
    let mut text = owner.to_string();
    if let Some(name) = owner.snapshot.and_then(name_of) {
        _ = write!(text, " {}", quoted(name));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_in_both_bases_and_with_suffixes() {
        for (text, offset) in [
            ("0", 0),
            ("65536", 65536),
            ("0x5_0000".replace('_', "").as_str(), 0x50000),
            ("64k", 65536),
            ("0x10M", 16 << 20),
            ("3g", 3 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_offset(text), Ok(offset), "{text}");
        }
        for text in [
            "",
            "k",
            "0x",
            "12q",
            "-1",
            "+1",
            "0x-1",
            "99999999999G",
            "1.5k",
            "é",
        ] {
            assert!(parse_offset(text).is_err(), "{text}");
        }
    }
}
