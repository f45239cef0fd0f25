//! `qcow2 map`: which layer holds which part of a disk, and where.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::SnapshotKey;
use qcow2_image::map::{MapEntry, map};
use serde::Serialize;

use super::answer::{Answer, name, table};
use super::args::{OutputArgs, ReadArgs, bytes, snapshot};
use super::failure::Failure;
use super::open::{Disk, Want};
use crate::audit::{plural, shown};
use crate::words::size;

/// Tell which layer holds which part of a disk, and where
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 map disk.qcow2
  qcow2 map --start 1G --length 64M disk.qcow2
  qcow2 map --json disk.qcow2 | jq 'select(.data)'")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// Begin there
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "0")]
    start: u64,

    /// Tell of no more than so many bytes
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    length: Option<u64>,

    /// Of this snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<SnapshotKey>,

    #[command(flatten)]
    read: ReadArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

impl Row {
    fn of(entry: &MapEntry<'_>) -> Self {
        Self {
            start: entry.start,
            length: entry.len,
            depth: entry.depth,
            present: entry.present,
            zero: entry.zero,
            data: entry.data,
            compressed: entry.compressed,
            offset: entry.offset,
            path: entry.path.map(name),
        }
    }

    fn what(&self) -> &'static str {
        match (self.present, self.data, self.zero, self.compressed) {
            (false, ..) => "nothing",
            (.., true) => "compressed",
            (_, true, true, _) => "zeros, with a place",
            (_, true, ..) => "data",
            _ => "zeros",
        }
    }

    fn cells(&self) -> Vec<String> {
        vec![
            format!("{:#x}", self.start),
            format!("{:#x}", self.length),
            self.what().to_owned(),
            if self.present {
                self.depth.to_string()
            } else {
                String::new()
            },
            self.offset
                .map_or(String::new(), |offset| format!("{offset:#x}")),
        ]
    }
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let want = Want {
            snapshot: self.snapshot.clone(),
            ..Want::read(&self.read)
        };
        let disk = Disk::open(&self.image, &self.read.open, &want)?;
        let len = disk.len()?;
        if self.start > len {
            let text = format!("the disk ends at {len}, before {}", self.start);
            return Err(Failure::new(text).about(&self.image));
        }
        let end = self
            .length
            .map_or(len, |length| self.start.saturating_add(length).min(len));
        let mut rows = Vec::new();
        let mut stored = 0_u64;
        for entry in map(disk.chain(), self.start..end)? {
            let entry = entry.map_err(|error| Failure::from(error).about(&self.image))?;
            let row = Row::of(&entry);
            if row.data {
                stored = stored.saturating_add(row.length);
            }
            if answer.is_json() {
                answer.row(&row)?;
            } else {
                rows.push(row.cells());
            }
        }
        let heads = ["START ", "LENGTH ", "WHAT", "LAYER ", "OFFSET "];
        if !rows.is_empty() {
            answer.text(&table(&heads, &rows, answer.look));
        }
        answer.text(&format!(
            "{}: {}, {} of {} stored\n",
            shown(&self.image),
            plural(rows.len() as u64, "part"),
            size::human(stored),
            size::human(end - self.start)
        ));
        Ok(0)
    }
}
