//! Our side: a process that does one thing.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use clap::ValueEnum as _;
use qcow2_image::chain::{BackingFile, Chain};
use qcow2_image::commit::CommitOptions;
use qcow2_image::compare::{CompareOptions, compare_chains};
use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::map::map;
use qcow2_image::measure::{MeasureOptions, measure};
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::{Image, References, ResizeOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::{File, FileOptions, Storage as _};

use super::row::Step;
use super::scene::Scene;

/// Do one operation
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    step: Step,

    /// The size where one is needed, in bytes
    #[arg(long, default_value_t = 0)]
    size: u64,

    /// What it works on
    files: Vec<PathBuf>,
}

/// The process that does it.
pub(super) fn command(own: &Path, step: Step, scene: &Scene) -> Command {
    let (files, size) = match step {
        Step::Create => (vec![scene.image()], scene.sizes.metadata),
        Step::Shrink => (vec![scene.image()], scene.sizes.shrink / 4),
        Step::SnapshotCreate
        | Step::SnapshotApply
        | Step::SnapshotDelete
        | Step::Map
        | Step::Measure
        | Step::Commit => (vec![scene.image()], 0),
        Step::Compare => (vec![scene.image(), scene.raw()], 0),
        Step::CompareSparse | Step::Rebase => (vec![scene.image(), scene.other()], 0),
        Step::ToImage => (vec![scene.raw(), scene.target()], 0),
        Step::ToRaw => (vec![scene.image(), scene.target()], 0),
    };
    let mut command = Command::new(own);
    command.args(["bench", "lifecycle-step", &format!("--size={size}")]);
    command.args(
        step.to_possible_value()
            .map(|value| value.get_name().to_owned()),
    );
    command.args(files);
    command
}

/// Does it.
pub(in crate::bench) fn run(args: &Args) -> Result<ExitCode> {
    let file = |index: usize| {
        args.files
            .get(index)
            .map_or(Path::new(""), PathBuf::as_path)
    };
    let write = || Image::options().open_path(file(0));
    let read = |index: usize| Image::options().read_only(true).open_path(file(index));
    let new = |index: usize| {
        let options = FileOptions::new().write(true).create_new(true);
        options.open(file(index))
    };
    match args.step {
        Step::Create => {
            let options = CreateOptions::new(args.size).preallocation(Preallocation::Metadata);
            Image::create(&new(0)?, &options)?;
        }
        Step::SnapshotCreate => {
            let image = write()?;
            image.create_snapshot(&SnapshotOptions {
                name: b"s".to_vec(),
                ..SnapshotOptions::default()
            })?;
            image.close()?;
        }
        Step::SnapshotApply => {
            let image = write()?;
            image.apply_snapshot(&SnapshotKey::any("s"))?;
            image.close()?;
        }
        Step::SnapshotDelete => {
            let image = write()?;
            image.delete_snapshot(&SnapshotKey::any("s"))?;
            image.close()?;
        }
        Step::Shrink => {
            let image = write()?;
            let options = ResizeOptions {
                shrink: true,
                ..ResizeOptions::default()
            };
            image.resize(args.size, options)?;
            image.close()?;
        }
        Step::Map => show_map(&read(0)?)?,
        Step::Measure => {
            let image = read(0)?;
            let options = MeasureOptions::new().source(&image);
            println!("{:?}", measure(&CreateOptions::default(), &options)?);
        }
        Step::Compare => {
            let (image, raw) = (read(0)?, File::open(file(1))?);
            let chains = [image.chain(), Chain::file(&raw)];
            let found = compare_chains(&chains[0], &chains[1], &CompareOptions::new())?;
            ensure!(found.difference.is_none(), "they differ");
        }
        Step::CompareSparse => {
            let images = [read(0)?, read(1)?];
            let chains = [images[0].chain(), images[1].chain()];
            let found = compare_chains(&chains[0], &chains[1], &CompareOptions::new())?;
            ensure!(found.difference.is_none(), "they differ");
        }
        Step::ToImage => {
            let (source, target) = (File::open(file(0))?, new(1)?);
            Image::create(&target, &CreateOptions::new(source.len()?))?;
            let image = Image::options().open_file(target)?;
            copy(&source, &image, &CopyOptions::new())?;
            image.close()?;
        }
        Step::ToRaw => {
            let target = new(1)?;
            copy(&read(0)?, Target::Storage(&target), &CopyOptions::new())?;
        }
        Step::Commit => {
            let options = Image::options().references(References::SameDirectory);
            let mut image = options.writable_layer(1).open_path(file(0))?;
            image.commit(&CommitOptions::new())?;
            image.close()?;
        }
        Step::Rebase => {
            let options = Image::options().references(References::SameDirectory);
            let mut image = options.clone().open_path(file(0))?;
            let options = options.path(file(0));
            let name = file(1).as_os_str().as_encoded_bytes();
            let other = BackingFile::open(name, "qcow2", &options)?;
            image.rebase(Some(&other), &RebaseOptions::new())?;
            image.close()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_map(image: &Image) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for row in map(image.chain(), 0..image.virtual_size())? {
        let row = row?;
        writeln!(
            out,
            "{} {} {} {:?}",
            row.start, row.len, row.zero, row.offset
        )?;
    }
    Ok(())
}
