//! `cargo xtask check-image`: is an image sound, what is wrong with it, and what is dangerous about it?
//!
//! The work is done, and told, by [`qcow2_cli::audit`]; this reads the command line, and makes images for show.

mod demo;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::ValueEnum;
use qcow2_cli::audit::repair::{self, LevelName, OrphansName};
use qcow2_cli::audit::{
    self, Choice, Form, Inputs, Interrupt, Look, PassphraseArgs, Settings, Switches, Typed, print,
    shown,
};

/// More threads than this help nobody.
const THREADS_MAX: u64 = 1024;
/// How this program is told what hints ask for.
const TYPED: Typed = Typed {
    explain: "--explain",
    undo: "cargo xtask check-image --undo",
    level: "--repair",
};

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

    #[command(flatten)]
    switches: Switches,

    /// Threads to check with; 0 means one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=THREADS_MAX))]
    threads: u64,

    /// Show no progress, and no word about sound images
    #[arg(short, long)]
    quiet: bool,

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

    /// Which files that the image names --salvage-to may open; as --references
    #[arg(long, value_name = "POLICY", requires = "salvage_to", value_parser = audit::parse_references)]
    salvage_references: Vec<Choice>,

    #[command(flatten)]
    passphrases: PassphraseArgs,

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

impl From<Format> for Form {
    fn from(format: Format) -> Self {
        match format {
            Format::Human => Self::Human,
            Format::Json => Self::Json,
            Format::Markdown => Self::Markdown,
        }
    }
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
    let look = Look::of_stdout(&TYPED);
    if let Some(code) = &args.explain {
        print(&audit::explanation(code, args.format.into(), look)?)?;
        return Ok(0);
    }
    if args.format == Format::Markdown {
        bail!("only `--explain list` has the format markdown");
    }
    if let Some(offset) = args.switches.owner {
        return tell_owner(args, offset, look);
    }
    if let Some(level) = args.repair {
        return repaired(args, level, look);
    }
    if let Some(undo_file) = &args.undo {
        return repair::undo(
            only_image(args, "--undo")?,
            undo_file,
            args.format == Format::Json,
            args.quiet,
        );
    }
    let inputs = if args.images.is_empty() {
        demonstration(args)?
    } else {
        audit::expand(&args.images)?
    };
    audit::run(&settings(args, look)?, &inputs, &Interrupt::listen()?)
}

fn settings(args: &Args, look: Look) -> Result<Settings> {
    Ok(Settings {
        json: args.format == Format::Json,
        all: args.switches.all,
        max_findings: args.switches.max_findings,
        threads: threads(args),
        quiet: args.quiet,
        progress: !args.quiet,
        deny_hazards: args.switches.deny_hazards,
        deep: args.switches.deep,
        chain: args.switches.chain,
        references: args.switches.references()?,
        online: args.switches.online,
        // The images for show are to be looked at.
        full: args.images.is_empty(),
        look,
    })
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
        all: args.switches.all,
        quiet: args.quiet,
        progress: !args.quiet,
        threads: threads(args),
        secrets: args.passphrases.secrets()?,
        references: audit::references(&args.salvage_references)?,
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

fn tell_owner(args: &Args, offset: u64, look: Look) -> Result<u8> {
    let [path] = args.images.as_slice() else {
        bail!("--owner looks into one image");
    };
    let form = args.format.into();
    print(&audit::owner_of(
        path,
        offset,
        args.switches.online,
        threads(args),
        form,
        look,
    )?)?;
    Ok(0)
}

fn threads(args: &Args) -> usize {
    usize::try_from(args.threads).unwrap_or(0)
}
