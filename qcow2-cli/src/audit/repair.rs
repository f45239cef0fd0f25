//! `--repair`, `--undo` and `--salvage-to`: what a repair would do, doing it, and the way back.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use qcow2_check::Verdict;
use qcow2_check::repair::{
    self, Effect, Level, Orphans, Plan, RepairOptions, SnapshotTables, StaleBitmaps,
    default_undo_path, read_undo,
};
use qcow2_io::{File, FileOptions};
use serde::Serialize;

use super::plan::{left, told};
use super::progress::{Interrupt, Progress};
use super::text::{Look, clean, shown};
use super::{in_words, json};
use crate::Console;

/// Names tried for the undo file, before it has to be named.
const UNDO_FILES_MAX: u32 = 100;

/// The level as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LevelName {
    /// Free leaked space, if nothing is wrong that could hide references
    Leaks,
    /// Make everything consistent that the image's own structures allow to
    All,
    /// Search the file for lost headers and tables, too
    Salvage,
}

impl From<LevelName> for Level {
    fn from(name: LevelName) -> Self {
        match name {
            LevelName::Leaks => Self::Leaks,
            LevelName::All => Self::All,
            LevelName::Salvage => Self::Salvage,
        }
    }
}

/// What becomes of clusters that lost their references, as it is typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OrphansName {
    /// Keep them in a snapshot named lost+found
    #[default]
    Snapshot,
    /// Leave them allocated; checkers call them leaks
    Leave,
    /// Free them
    Free,
}

impl From<OrphansName> for Orphans {
    fn from(name: OrphansName) -> Self {
        match name {
            OrphansName::Snapshot => Self::Snapshot,
            OrphansName::Leave => Self::Leave,
            OrphansName::Free => Self::Free,
        }
    }
}

/// What was asked for.
#[derive(Debug)]
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// How far the repair goes.
    pub level: Level,
    /// What becomes of clusters that lost their references.
    pub orphans: Orphans,
    /// Bitmaps that a crash left in use are dropped, too.
    pub drop_stale_bitmaps: bool,
    /// Nothing is written.
    pub plan_only: bool,
    /// Nobody is asked.
    pub yes: bool,
    /// Where what is overwritten is saved; beside the image unless given.
    pub undo_file: Option<&'a Path>,
    /// For programs.
    pub json: bool,
    /// Every action is told.
    pub all: bool,
    /// Only what has to be said.
    pub quiet: bool,
    /// A bar shows how far it is.
    pub progress: bool,
    /// Threads to work with; 0 for one for each processor.
    pub threads: usize,
    /// How it looks.
    pub look: Look,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Outcome<'a> {
    filename: String,
    plan: &'a Plan<'a>,
    left: Vec<&'a qcow2_check::Finding>,
    applied: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    undo_file: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Undone {
    filename: String,
    undo_file: String,
    #[serde(rename = "undone")]
    done: bool,
}

/// Repairs an image, or tells what that would do. Gives the exit code: that of the check of what is there in the end.
///
/// # Errors
///
/// Files that can't be opened or written, an image that there is no plan for, and when nobody is there to be asked.
pub fn run(request: &Request<'_>, interrupt: &Interrupt) -> Result<u8> {
    let file = open(request.image, !request.plan_only)?;
    let undo_path = undo_path(request)?;
    if undo_path.is_unfinished {
        if request.plan_only {
            Console::warn(format_args!(
                "{} holds a repair that was cut short; a repair would go back to its beginning first\n",
                shown(&undo_path.path)
            ));
        } else {
            go_back(&file, &undo_path.path)?;
            std::fs::remove_file(&undo_path.path)?;
            Console::warn(format_args!(
                "an earlier repair was cut short; the image is what it was before that\n"
            ));
        }
    }
    let progress = Progress::new(request.progress, interrupt);
    let options = options(request, &progress);
    let plan = repair::plan(&file, &options);
    progress.finish();
    let plan = plan.map_err(|error| words_of(request, &error))?;
    let apply = !request.plan_only && !plan.is_empty();
    if !request.json {
        super::print(&told(&plan, request))?;
    }
    if apply && !request.yes && !confirmed(request)? {
        Console::warn(format_args!("nothing was written\n"));
        return Ok(plan.before().verdict().exit_code());
    }
    if apply {
        let undo = create(&undo_path.path)?;
        plan.apply(Some(&undo))
            .with_context(|| format!("{}: the repair was cut short", shown(request.image)))?;
        sync_folder(&undo_path.path);
    }
    if request.json {
        let outcome = Outcome {
            filename: request.image.to_string_lossy().into_owned(),
            plan: &plan,
            left: left(&plan).collect(),
            applied: apply,
            undo_file: apply.then(|| undo_path.path.to_string_lossy().into_owned()),
        };
        super::print(&(json::to_ascii(&outcome)? + "\n"))?;
    } else if apply && !request.quiet {
        super::print(&format!(
            "Done. To go back: {} {} {}\n",
            request.look.typed.undo,
            shown(&undo_path.path),
            shown(request.image)
        ))?;
    }
    let verdict = if request.plan_only {
        plan.before().verdict()
    } else {
        plan.after().verdict()
    };
    Ok(verdict.exit_code())
}

pub(super) fn options<'a>(request: &Request<'_>, progress: &'a Progress) -> RepairOptions<'a> {
    RepairOptions {
        level: request.level,
        threads: request.threads,
        max_actions: if request.all { usize::MAX } else { 100 },
        monitor: Some(progress),
        max_growth: None,
        stale_bitmaps: if request.drop_stale_bitmaps {
            StaleBitmaps::Drop
        } else {
            StaleBitmaps::Keep
        },
        orphans: request.orphans,
        snapshot_tables: SnapshotTables::default(),
    }
}

/// Undoes what the undo file tells of.
///
/// # Errors
///
/// Files that can't be opened, and an undo file that is not of this image.
pub fn undo(image: &Path, undo_file: &Path, json: bool, quiet: bool) -> Result<u8> {
    let file = open(image, true)?;
    go_back(&file, undo_file)?;
    if json {
        let undone = Undone {
            filename: image.to_string_lossy().into_owned(),
            undo_file: undo_file.to_string_lossy().into_owned(),
            done: true,
        };
        super::print(&(json::to_ascii(&undone)? + "\n"))?;
    } else if !quiet {
        super::print(&format!("{} is what it was before\n", shown(image)))?;
    }
    Ok(0)
}

fn go_back(image: &File, undo_file: &Path) -> Result<()> {
    let undo = open(undo_file, true)?;
    repair::undo(image, &undo, false).with_context(|| shown(undo_file))?;
    Ok(())
}

pub(super) fn open(path: &Path, write: bool) -> Result<File> {
    FileOptions::new()
        .write(write)
        .open(path)
        .map_err(|error| anyhow!("{}: {}", shown(path), in_words(&error)))
}

fn create(path: &Path) -> Result<File> {
    FileOptions::new()
        .write(true)
        .create(true)
        .open(path)
        .map_err(|error| anyhow!("{}: {}", shown(path), in_words(&error)))
}

/// Makes the name of a new file durable, as far as the system lets us.
fn sync_folder(path: &Path) {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    if let Ok(folder) = std::fs::File::open(folder.unwrap_or(Path::new("."))) {
        _ = folder.sync_all();
    }
}

struct UndoPath {
    path: PathBuf,
    is_unfinished: bool,
}

/// Where the undo file goes. One that holds a finished repair is left alone.
fn undo_path(request: &Request<'_>) -> Result<UndoPath> {
    let named = request.undo_file.map(Path::to_owned);
    let first = named
        .clone()
        .unwrap_or_else(|| default_undo_path(request.image));
    for number in 1..UNDO_FILES_MAX {
        let path = match number {
            1 => first.clone(),
            number => {
                let mut name = first.as_os_str().to_owned();
                name.push(format!(".{number}"));
                PathBuf::from(name)
            }
        };
        if !path.try_exists()? {
            return Ok(UndoPath {
                path,
                is_unfinished: false,
            });
        }
        let file = open(&path, false)?;
        match read_undo(&file) {
            Ok(known) if known.sessions > 0 && !known.finished && !known.undone => {
                return Ok(UndoPath {
                    path,
                    is_unfinished: true,
                });
            }
            // Begun, and nothing of the image was changed.
            Ok(known) if known.sessions == 0 => {
                return Ok(UndoPath {
                    path,
                    is_unfinished: false,
                });
            }
            _ if named.is_some() => {
                bail!("{} exists; name another undo file", shown(&path));
            }
            _ => {}
        }
    }
    bail!("there are too many undo files; name one with --undo-file")
}

fn words_of(request: &Request<'_>, error: &repair::PlanError) -> anyhow::Error {
    let advice = match error {
        repair::PlanError::Hopeless(_) => {
            format!("; {} salvage searches the file", request.look.typed.level)
        }
        _ => String::new(),
    };
    let mut text = error.to_string();
    if let Some(cause) = std::error::Error::source(error) {
        _ = write!(text, ": {cause}");
    }
    anyhow!("{}: {}{advice}", shown(request.image), clean(&text))
}

fn confirmed(request: &Request<'_>) -> Result<bool> {
    if !io::stdin().is_terminal() {
        bail!("--yes applies the plan, --plan only shows it; nobody is there to be asked");
    }
    print_question(request)?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}

fn print_question(request: &Request<'_>) -> Result<()> {
    let mut err = io::stderr().lock();
    write!(err, "Apply it to {}? [y/N] ", shown(request.image))?;
    err.flush()?;
    Ok(())
}

/// A copy of what can be read, and what can't.
///
/// # Errors
///
/// Files that can't be opened or written, and an image that there is no plan for.
pub fn salvage_to(request: &Request<'_>, out: &Path, interrupt: &Interrupt) -> Result<u8> {
    // The plan lives as long as the program: an image that is opened on it asks for that.
    let file: &'static File = Box::leak(Box::new(open(request.image, false)?));
    let progress = Progress::new(request.progress, interrupt);
    let options = options(request, &progress);
    let plan = repair::plan(file, &options);
    progress.finish();
    let plan = plan.map_err(|error| words_of(request, &error))?;
    if !request.json {
        super::print(&told(&plan, request))?;
    }
    let mut doubtful: Vec<(u64, u64, Effect)> = plan
        .actions()
        .iter()
        .filter(|action| action.effect > Effect::Reachable && action.place.snapshot.is_none())
        .filter_map(|action| Some((action.place.guest?, action.effect)))
        .map(|(guest, effect)| (guest.start, guest.end, effect))
        .collect();
    let source = plan.into_preview();
    let unreadable = super::salvage::copy(source, out, interrupt)?;
    doubtful.extend(
        unreadable
            .into_iter()
            .map(|(start, end)| (start, end, Effect::Lost)),
    );
    doubtful.sort_unstable();
    doubtful.dedup();
    super::print(&ranges(&doubtful, out, request.json)?)?;
    Ok(
        if doubtful.iter().any(|(.., effect)| *effect == Effect::Lost) {
            Verdict::Corrupt.exit_code()
        } else {
            0
        },
    )
}

#[derive(Serialize)]
struct Doubt {
    start: u64,
    end: u64,
    effect: Effect,
}

fn ranges(doubtful: &[(u64, u64, Effect)], out: &Path, json: bool) -> Result<String> {
    if json {
        let list: Vec<Doubt> = doubtful
            .iter()
            .map(|(start, end, effect)| Doubt {
                start: *start,
                end: *end,
                effect: *effect,
            })
            .collect();
        return Ok(json::to_ascii(&list)? + "\n");
    }
    let mut text = format!("{} holds what can be read\n", shown(out));
    if doubtful.is_empty() {
        text.push_str("  all of it, as far as anyone can tell\n");
    }
    for (start, end, effect) in doubtful {
        _ = writeln!(text, "  guest {start:#x}..{end:#x}: {effect}");
    }
    Ok(text)
}
