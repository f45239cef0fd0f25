//! `convert`: a disk into another file or format.

mod plan;
mod weight;

use std::process::ExitCode;

use qcow2_format::header::Version;
use qcow2_image::copy::{CopyError, CopyOptions, CopyReport, Lost, Target, copy, copy_bitmaps};
use qcow2_image::{ImageError, Monitor};
use qcow2_io::Storage;

use self::plan::Plan;
use self::weight::Weight;
use super::args::{self, Failure};
use super::choices::Format;
use super::create;
use super::creation::Creation;
use super::progress::Progress;
use crate::node::{self, Access, Concat, Node, NodeOptions, Opener};
use crate::words::{outside, system};
use crate::{Console, complain};

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let Some(plan) = Plan::from_words(words, console)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let sources = open_sources(&plan)?;
    plan.check_sources(&sources)?;
    let storages: Vec<_> = sources.iter().map(Node::storage).collect();
    let joined;
    let source: &dyn Storage = if let [one] = storages.as_slice() {
        &**one
    } else {
        joined = Concat::new(storages.clone())
            .map_err(|error| Failure::new(system::describe(&error)))?;
        &joined
    };
    let len = source
        .len()
        .map_err(|error| Failure::new(system::describe(&error)))?;
    let creation = plan.creation(len)?;
    if !plan.keeps_target {
        let size = creation
            .get("size")
            .and_then(|size| size.parse().ok())
            .unwrap_or(len);
        create::make(&plan.target, &creation, size, &plan.common.objects).map_err(|text| {
            Failure::new(format_args!(
                "{}: error while converting {}: {text}",
                plan.target,
                creation.format.name()
            ))
        })?;
    }
    let target = open_target(&plan, creation.get("encrypt.key-secret"))?;
    check_bitmaps(&plan, &target)?;
    let target_len = target.storage().len().unwrap_or(0);
    if plan.keeps_target && target_len < len {
        return Err(Failure::new("output file is smaller than input file"));
    }
    if plan.compress.is_some() && target.image().is_none() {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    copy_data(
        &plan,
        source,
        len,
        &target,
        is_new_and_zero(&plan, &creation),
        console,
    )?;
    if plan.bitmaps {
        carry_bitmaps(&plan, &sources, &target, console)?;
    }
    drop(sources);
    args::close(target)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the target was made just now, reads as zeros, and is to keep the space that it has got: all of it, or the first block
/// of a raw file.
fn is_new_and_zero(plan: &Plan, creation: &Creation) -> bool {
    let is_file =
        || std::fs::metadata(outside::path(&plan.target)).is_ok_and(|found| found.is_file());
    let set = |key: &str| creation.get(key).is_some_and(|value| !value.is_empty());
    let has_space = matches!(creation.get("preallocation"), Some("falloc" | "full"));
    (has_space || creation.format == Format::Raw)
        && !plan.keeps_target
        && !set("encrypt.format")
        && !set("encryption")
        && !set("backing_file")
        && !set("data_file")
        && is_file()
}

fn open_sources(plan: &Plan) -> Result<Vec<Node>, Failure> {
    let access = Access {
        force_share: plan.force_share,
        direct: plan.source_cache.direct,
        snapshot: plan.snapshot.clone(),
        ..Access::read()
    };
    let open = |name: &String| {
        plan.common
            .open(name, plan.source_format.as_deref(), &access)
    };
    plan.sources.iter().map(open).collect()
}

fn open_target(plan: &Plan, secret: Option<&str>) -> Result<Node, Failure> {
    let opener = Opener {
        objects: &plan.common.objects,
    };
    let access = Access {
        unmap: true,
        direct: plan.cache.direct,
        ..Access::write()
    };
    let opened = if plan.target_image_opts {
        opener.options(NodeOptions::from_list(&plan.target), &access)
    } else {
        let format = plan.target_format.as_deref();
        opener
            .describe(&plan.target, format)
            .and_then(|mut options| {
                if let Some(secret) = secret {
                    options.set("encrypt.key-secret", secret);
                }
                opener.options(options, &access)
            })
    };
    opened.map_err(|error| args::cannot_open(&plan.target, error))
}

fn copy_data(
    plan: &Plan,
    source: &dyn Storage,
    len: u64,
    target: &Node,
    is_new_and_zero: bool,
    console: &Console,
) -> Result<(), Failure> {
    let shown = plan.progress && !plan.quiet;
    let weight = if shown {
        weight::data(source, 0, len)
    } else {
        len
    };
    let progress = Progress::new(console, shown, weight);
    let weighted = Weight::new(source, &progress);
    let monitor: &dyn Monitor = if shown { &weighted } else { &progress };
    let mut options = CopyOptions::new()
        .sparse(plan.sparse)
        .salvage(plan.salvage)
        .target_is_zero(plan.target_is_zero || is_new_and_zero)
        .zero_rest(!plan.keeps_target)
        .write_zeros(plan.keeps_target)
        .ordered(!plan.any_order && target.image().is_some())
        .rate(plan.rate)
        .monitor(monitor);
    if let Some(level) = plan.compress {
        options = options.compress(level);
    }
    if plan.has_backing() {
        options = options.layers(1);
    }
    let storage = target.storage();
    let place = match target.image() {
        Some(image) => Target::Image(image),
        None => Target::Storage(&*storage),
    };
    let report = copy(source, place, &options).map_err(|error| failed(&error))?;
    if !plan.quiet {
        warn_of_losses(&report, console);
    }
    progress.end();
    Ok(())
}

/// Says which sectors failed: when the disk was looked through, and then as it was copied.
fn warn_of_losses(report: &CopyReport, console: &Console) {
    const STATUS: &str = "block status at offset ";
    const DATA: &str = "offset ";
    let sectors = |lost: &Lost| -> Vec<u64> {
        let ranges = lost.ranges().iter().cloned();
        ranges.flat_map(|range| range.step_by(512)).collect()
    };
    let warn = |what: &str, offset: u64| {
        complain!(
            console,
            "qemu-img: warning: error while reading {what}{offset}: Input/output error"
        );
    };
    let unmapped = sectors(&report.unmapped);
    for offset in &unmapped {
        warn(STATUS, *offset);
    }
    let unmapped = unmapped.into_iter().map(|offset| (offset, 0, STATUS));
    let lost = sectors(&report.lost).into_iter();
    let mut both: Vec<_> = unmapped
        .chain(lost.map(|offset| (offset, 1, DATA)))
        .collect();
    both.sort_unstable();
    for (offset, _, what) in both {
        warn(what, offset);
    }
}

/// A copy that failed, with the place.
fn failed(error: &CopyError) -> Failure {
    match error {
        CopyError::Source { offset, source, .. } => Failure::new(format_args!(
            "error while reading at byte {offset}: {}",
            system::describe(source)
        )),
        CopyError::Target { offset, source, .. } => Failure::new(format_args!(
            "error while writing at byte {offset}: {}",
            system::describe(source)
        )),
        error => Failure::new(system::sentence(error)),
    }
}

/// Refuses a target that can't have bitmaps, before anything is copied.
fn check_bitmaps(plan: &Plan, target: &Node) -> Result<(), Failure> {
    let version = target.image().map(|image| image.header().version);
    if plan.bitmaps && version != Some(Version::V3) {
        return Err(Failure::new(format_args!(
            "Format driver '{}' does not support bitmaps",
            target.driver
        )));
    }
    Ok(())
}

fn carry_bitmaps(
    plan: &Plan,
    sources: &[Node],
    target: &Node,
    console: &Console,
) -> Result<(), Failure> {
    let source = sources.first().and_then(Node::image);
    let name = target.unfiltered().name();
    let (Some(source), Some(target)) = (source, target.image()) else {
        return Ok(());
    };
    for name in plan::inconsistent(source) {
        complain!(
            console,
            "qemu-img: warning: Skipping inconsistent bitmap '{name}'"
        );
    }
    copy_bitmaps(source, target, plan.skip_broken)
        .map(drop)
        .map_err(|error| match error {
            ImageError::BitmapUnusable { name, .. } => {
                Failure::new(format_args!("Failed to populate bitmap {name}: Bitmap '{name}' is inconsistent and cannot be used"))
            }
            error => match node::lost_bitmaps(&error, name) {
                Some(text) => Failure::new(text),
                None => Failure::new(system::sentence(&error)),
            },
        })
}
