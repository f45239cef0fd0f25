//! `cargo xtask check-image`: is an image sound, what is wrong with it, and what is dangerous about it?
//!
//! `inputs` finds the images, `audited` holds what was learned of one, `report` and `json` tell it. `progress` shows how far a
//! check is and lets the user end it, `online` makes several passes beside a writer agree, `chain` follows backing files.

mod audited;
mod chain;
mod demo;
mod explain;
mod facts;
mod inputs;
mod json;
mod online;
mod owner;
mod progress;
mod repair;
mod report;
mod salvage;
mod text;

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use qcow2_check::chain::{Chain, References};
use qcow2_check::{Code, Options, Report};
use qcow2_io::{File, FileOptions, StorageError, StorageErrorKind};

use audited::{Audited, worst};
use chain::Choice;
use facts::Facts;
use inputs::Inputs;
use progress::{Interrupt, Progress};
use repair::{LevelName, OrphansName};
use report::Extent;
use text::{Look, clean, plural, shown};

/// Findings kept of each code in a JSON report that was not asked for more or less.
const FINDINGS_KEPT: usize = 100;
/// More threads than this help nobody.
const THREADS_MAX: u64 = 1024;
/// Time between two passes beside a writer.
const ONLINE_PAUSE: Duration = Duration::from_millis(200);

/// Audit qcow2 images
///
/// Tells whether an image is sound, what is wrong with it and what is dangerous about it. Images are opened read-only,
/// and nothing that an image names is opened unless --chain is given. Of a folder, all qcow2 images below it are audited.
///
/// Without an image, a few are made under target/ and audited.
///
/// Exit codes are those of qemu-img check: 0 sound, 1 something could not be checked (or wrong use), 2 corrupt, 3 leaks only; of several
/// images the worst one counts, in the order 1, 2, 3, 0.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images, or folders with images
    #[arg(value_name = "IMAGE|DIR")]
    images: Vec<PathBuf>,

    /// How to report; `json` gives one object per image, on a line of its own
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,

    /// Show every finding, not just a screenful
    #[arg(long)]
    all: bool,

    /// Keep and show at most N findings of each kind
    #[arg(long, value_name = "N", conflicts_with = "all")]
    max_findings: Option<usize>,

    /// Threads to check with; 0 means one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=THREADS_MAX))]
    threads: u64,

    /// Show no progress, and no word about sound images
    #[arg(short, long)]
    quiet: bool,

    /// Exit with 2 if there is any hazard
    #[arg(long)]
    deny_hazards: bool,

    /// Decode every compressed cluster, too, and name those that can't be read; takes as long as reading the whole disk
    #[arg(long)]
    deep: bool,

    /// Audit the backing files, too, as far as --references lets them be opened
    #[arg(long)]
    chain: bool,

    /// What --chain may open: deny, same-directory (of the first image, and below; the default), allow:PATH (a file or folder,
    /// may be repeated) or all
    #[arg(long, value_name = "POLICY", requires = "chain", value_parser = chain::parse)]
    references: Vec<Choice>,

    /// Check beside a running writer: read again until the findings are stable, and leave out those that are not
    #[arg(long)]
    online: bool,

    /// Tell who owns the cluster at this offset of the image file: decimal or 0x…, perhaps with k, M, G or T
    #[arg(long, value_name = "HOST_OFFSET", value_parser = owner::parse_offset, conflicts_with_all = ["chain", "deny_hazards", "all", "max_findings", "deep"])]
    owner: Option<u64>,

    /// Repair the image: show the plan, ask, save what will be overwritten to an undo file, and do it
    #[arg(long, value_name = "LEVEL", value_enum, conflicts_with_all = ["chain", "online", "owner", "deny_hazards", "deep"])]
    repair: Option<LevelName>,

    /// Only show what the repair would do
    #[arg(long, requires = "repair")]
    plan: bool,

    /// Repair without asking
    #[arg(long, requires = "repair", conflicts_with = "plan")]
    yes: bool,

    /// Where what a repair overwrites is saved; beside the image, with .undo behind its name, unless given
    #[arg(long, value_name = "FILE", requires = "repair")]
    undo_file: Option<PathBuf>,

    /// What becomes of clusters that a repair finds without references after pointers were lost
    #[arg(long, value_enum, default_value_t, requires = "repair")]
    orphans: OrphansName,

    /// Let the repair drop bitmaps that a crash left in use, too
    #[arg(long, requires = "repair")]
    drop_stale_bitmaps: bool,

    /// Write what can be read of the repaired disk to a new image, and leave the old one as it is
    #[arg(long, value_name = "OUT", requires = "repair", conflicts_with_all = ["plan", "yes", "undo_file"])]
    salvage_to: Option<PathBuf>,

    /// Undo the repair that this file tells of
    #[arg(long, value_name = "FILE", conflicts_with_all = ["repair", "chain", "online", "owner", "deep"])]
    undo: Option<PathBuf>,

    /// Explain a finding's code; without CODE, or with `list`, name all codes
    #[arg(long, value_name = "CODE", num_args = 0..=1, default_missing_value = "list")]
    explain: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Human,
    Json,
    /// The page of all codes; with `--explain list` only.
    #[value(hide = true)]
    Markdown,
}

/// Audits what was asked for, or answers the question that was asked instead.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let code = match respond(args) {
        // Whoever reads the report has read enough.
        Err(error) if is_broken_pipe(&error) => return Ok(ExitCode::FAILURE),
        result => result?,
    };
    Ok(ExitCode::from(code))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

fn respond(args: &Args) -> Result<u8> {
    let look = Look::of_stdout();
    if let Some(code) = &args.explain {
        print(&explanation(code, args.format, look)?)?;
        return Ok(0);
    }
    if args.format == Format::Markdown {
        bail!("only `--explain list` has the format markdown");
    }
    if let Some(offset) = args.owner {
        return tell_owner(args, offset, look);
    }
    if let Some(level) = args.repair {
        return repaired(args, level, look);
    }
    if let Some(undo_file) = &args.undo {
        return repair::undo(only_image(args, "--undo")?, undo_file);
    }
    let references = chain::references(&args.references)?;
    let inputs = if args.images.is_empty() {
        demonstration(args)?
    } else {
        inputs::expand(&args.images)?
    };
    let auditor = Auditor {
        args,
        references,
        interrupt: Interrupt::listen()?,
        look,
    };
    auditor.audit_all(&inputs)
}

/// The one image that is named.
fn only_image<'a>(args: &'a Args, option: &str) -> Result<&'a Path> {
    let [path] = args.images.as_slice() else {
        bail!("{option} works on one image, which must be named");
    };
    Ok(path)
}

fn repaired(args: &Args, level: LevelName, look: Look) -> Result<u8> {
    let request = repair::Request {
        image: only_image(args, "--repair")?,
        level: level.into(),
        orphans: args.orphans.into(),
        drop_stale_bitmaps: args.drop_stale_bitmaps,
        plan_only: args.plan,
        yes: args.yes,
        undo_file: args.undo_file.as_deref(),
        json: args.format == Format::Json,
        all: args.all,
        quiet: args.quiet,
        threads: threads(args),
        look,
    };
    let interrupt = Interrupt::listen()?;
    match &args.salvage_to {
        Some(out) => repair::salvage_to(&request, out, &interrupt),
        None => repair::run(&request, &interrupt),
    }
}

/// Makes images to look at.
fn demonstration(args: &Args) -> Result<Inputs> {
    let images = demo::make()?;
    if let (Some(folder), false) = (images.first().and_then(|path| path.parent()), args.quiet) {
        eprintln!(
            "No image was named; these are made for show in {}\n",
            shown(folder)
        );
    }
    Ok(Inputs {
        images,
        ..Inputs::default()
    })
}

fn explanation(code: &str, format: Format, look: Look) -> Result<String> {
    let all = code.is_empty() || code.eq_ignore_ascii_case("list");
    match format {
        Format::Markdown => Ok(explain::markdown()),
        Format::Human if all => Ok(explain::list(look)),
        Format::Json if all => explain::list_json(),
        Format::Json => match Code::from_id(code) {
            Some(code) => explain::json(code),
            None => explain::one(code, look),
        },
        Format::Human => explain::one(code, look),
    }
}

fn tell_owner(args: &Args, offset: u64, look: Look) -> Result<u8> {
    let [path] = args.images.as_slice() else {
        bail!("--owner looks into one image");
    };
    let named = || shown(path);
    let file = open(path, args.online).map_err(|error| anyhow!("{}: {error}", named()))?;
    let options = Options {
        threads: threads(args),
        ..Options::default()
    };
    let json = args.format == Format::Json;
    let answer = owner::answer(path, &file, offset, &options, json, look).with_context(named)?;
    print(&answer)?;
    Ok(0)
}

fn threads(args: &Args) -> usize {
    usize::try_from(args.threads).unwrap_or(0)
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Opens an image for reading, locked as QEMU does; beside a writer only if that was asked for. In words on failure.
fn open(path: &Path, online: bool) -> Result<File, String> {
    FileOptions::new()
        .force_share(online)
        .open(path)
        .map_err(|error| {
            let advice = if error.kind() == StorageErrorKind::Locked {
                "; --online checks it beside the writer"
            } else {
                ""
            };
            format!("{}{advice}", in_words(&error))
        })
}

/// Why a file can't be opened, harmless to print. The report names the file.
fn in_words(error: &StorageError) -> String {
    let mut text = error.to_string();
    if let Some(path) = error.path() {
        let known = format!("{} in '{}' failed", error.operation(), path.display());
        if let Some(rest) = text.strip_prefix(&known) {
            text = format!("It can't be opened{rest}");
        }
    }
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    clean(&text)
}

/// What all images of a call have in common.
struct Auditor<'a> {
    args: &'a Args,
    references: References,
    interrupt: Interrupt,
    look: Look,
}

impl Auditor<'_> {
    fn audit_all(&self, inputs: &Inputs) -> Result<u8> {
        let args = self.args;
        let mut summary = Summary::default();
        let mut done = 0_u64;
        let several = inputs.images.len() > 1 || inputs.from_folder || args.chain;
        for path in &inputs.images {
            if self.interrupt.is_set() {
                break;
            }
            self.audit(path, &mut |audited| {
                summary.add(&audited, args.deny_hazards);
                print(&self.told(&audited, several)?)
            })?;
            done += 1;
        }
        let left = inputs.images.len() as u64 - done;
        for told in &inputs.unreadable {
            eprintln!("error: {told}");
        }
        if left > 0 || !inputs.unreadable.is_empty() {
            summary.code = worst(summary.code, 1);
        }
        if several && args.format == Format::Human && !args.quiet {
            print(&summary.words(left, inputs))?;
        } else if !args.quiet && inputs.skipped + left > 0 {
            eprint!("{}", summary.words(left, inputs));
        }
        Ok(summary.code)
    }

    /// What is said of one image.
    fn told(&self, audited: &Audited, several: bool) -> Result<String> {
        let Self { args, look, .. } = *self;
        if args.format == Format::Json {
            return Ok(json::object(audited, args.deny_hazards)? + "\n");
        }
        let unremarkable = audited.exit_code(true) == 0;
        Ok(match (unremarkable, args.quiet, several) {
            (true, true, _) => String::new(),
            (false, true, _) => report::headline(audited, look) + "\n",
            // The images for show are to be looked at.
            (true, false, true) if !args.images.is_empty() => report::short(audited, look),
            (_, false, true) => report::render(audited, extent(args), look) + "\n",
            (_, false, false) => report::render(audited, extent(args), look),
        })
    }

    /// Audits an image, and with `--chain` what lies below it.
    fn audit(&self, path: &Path, tell: &mut dyn FnMut(Audited) -> Result<()>) -> Result<()> {
        let file = match open(path, self.args.online) {
            Ok(file) => file,
            Err(error) => return tell(Audited::failed(path.to_owned(), false, error)),
        };
        if !self.args.chain {
            return tell(self.audit_file(path, &file));
        }
        let options = FileOptions::new().force_share(self.args.online);
        for layer in Chain::new(path, file, self.references.clone(), options) {
            let mut audited = self.audit_file(&layer.path, &layer.file);
            if let Some(finding) = layer.finding() {
                chain::add(&mut audited.report, finding);
            }
            audited.below = Some(chain::below(&layer));
            tell(audited)?;
            if self.interrupt.is_set() {
                break;
            }
        }
        Ok(())
    }

    fn audit_file(&self, path: &Path, file: &File) -> Audited {
        let started = Instant::now();
        let mut audited = Audited {
            name: path.to_owned(),
            is_qcow2: facts::has_magic(file),
            facts: Facts::read(file),
            report: Report::default(),
            error: None,
            elapsed: Duration::ZERO,
            reading: None,
            below: None,
        };
        if self.args.online {
            let (report, reading) = online::settle(self.passes(file));
            audited.report = report;
            audited.reading = Some(reading);
        } else {
            audited.report = self.pass(file);
        }
        audited.elapsed = started.elapsed();
        audited
    }

    /// One look at the whole image.
    fn pass(&self, file: &File) -> Report {
        let args = self.args;
        let progress = Progress::new(!args.quiet, &self.interrupt);
        let options = Options {
            threads: threads(args),
            max_findings: match args.max_findings {
                _ if args.all => usize::MAX,
                Some(max) => max,
                None => FINDINGS_KEPT,
            },
            monitor: Some(&progress),
            deep: args.deep,
        };
        let report = qcow2_check::audit(file, &options);
        progress.finish();
        report
    }

    /// Looks until two in a row agree.
    fn passes(&self, file: &File) -> Vec<Report> {
        let mut passes: Vec<Report> = Vec::new();
        while passes.len() < online::MAX_PASSES {
            if !passes.is_empty() {
                std::thread::sleep(ONLINE_PAUSE);
            }
            let report = self.pass(file);
            let cancelled = report.cancelled;
            let settled = passes
                .last()
                .is_some_and(|last| online::agree(last, &report));
            passes.push(report);
            if settled || cancelled {
                break;
            }
        }
        passes
    }
}

fn extent(args: &Args) -> Extent {
    match args.max_findings {
        _ if args.all => Extent::places(usize::MAX),
        Some(places) => Extent::places(places),
        None => Extent::SCREEN,
    }
}

/// What several images come to.
#[derive(Debug, Default)]
struct Summary {
    images: u64,
    /// Images by verdict, in the words of the report.
    kinds: Vec<(&'static str, u64)>,
    code: u8,
}

impl Summary {
    fn add(&mut self, audited: &Audited, deny_hazards: bool) {
        self.images += 1;
        self.code = worst(self.code, audited.exit_code(deny_hazards));
        let kind = report::verdict_words(audited);
        match self.kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => self.kinds.push((kind, 1)),
        }
    }

    fn words(&self, left: u64, inputs: &Inputs) -> String {
        let kinds: Vec<String> = self
            .kinds
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        let mut text = format!("{}: {}", plural(self.images, "image"), kinds.join("; "));
        if left > 0 {
            _ = write!(text, "; ended early, {left} not looked at");
        }
        if inputs.skipped > 0 {
            _ = write!(text, "; {}", skipped(inputs.skipped));
        }
        text.push('\n');
        text
    }
}

fn skipped(count: u64) -> String {
    format!("{} skipped, not qcow2", plural(count, "file"))
}
