//! Auditing what was asked for: images one by one, chains layer by layer, passes until they agree.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use qcow2_check::chain::{Chain, References};
use qcow2_check::{Options, Report};
use qcow2_io::{File, FileOptions};

use super::audited::{Audited, worst};
use super::facts::{self, Facts};
use super::inputs::Inputs;
use super::progress::{Interrupt, Progress};
use super::report::{self, Extent};
use super::text::{Look, plural};
use super::{chain, json, online, open, print};
use crate::Console;

/// Findings kept of each code in a JSON report that was not asked for more or less.
const FINDINGS_KEPT: usize = 100;
/// Time between two passes beside a writer.
const ONLINE_PAUSE: Duration = Duration::from_millis(200);

/// How images are audited and told of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For programs: an object per image, on a line of its own.
    pub json: bool,
    /// Every finding is told.
    pub all: bool,
    /// Findings kept and told of each kind.
    pub max_findings: Option<usize>,
    /// Threads to work with; 0 for one for each processor.
    pub threads: usize,
    /// No word about sound images.
    pub quiet: bool,
    /// A bar shows how far it is.
    pub progress: bool,
    /// A hazard counts as much as a corruption.
    pub deny_hazards: bool,
    /// Compressed clusters are decoded, too.
    pub deep: bool,
    /// What an image refers to is audited, too, as far as the references allow.
    pub chain: bool,
    /// What may be opened then.
    pub references: References,
    /// Beside a writer, until the findings are stable.
    pub online: bool,
    /// Sound images are told of in full, too.
    pub full: bool,
    /// How it looks.
    pub look: Look,
}

/// Audits images; gives the exit code. Of several images the worst one counts.
///
/// # Errors
///
/// Nobody reads the report.
pub fn run(settings: &Settings, inputs: &Inputs, interrupt: &Interrupt) -> Result<u8> {
    Auditor {
        settings,
        interrupt,
    }
    .audit_all(inputs)
}

struct Auditor<'a> {
    settings: &'a Settings,
    interrupt: &'a Interrupt,
}

impl Auditor<'_> {
    fn audit_all(&self, inputs: &Inputs) -> Result<u8> {
        let settings = self.settings;
        let mut summary = Summary::default();
        let mut done = 0_u64;
        let several = inputs.images.len() > 1 || inputs.from_folder || settings.chain;
        for path in &inputs.images {
            if self.interrupt.is_set() {
                break;
            }
            self.audit(path, &mut |audited| {
                summary.add(&audited, settings.deny_hazards);
                print(&self.told(&audited, several)?)
            })?;
            done += 1;
        }
        let left = inputs.images.len() as u64 - done;
        for told in &inputs.unreadable {
            Console::warn(format_args!("error: {told}\n"));
        }
        if left > 0 || !inputs.unreadable.is_empty() {
            summary.code = worst(summary.code, 1);
        }
        if several && !settings.json && !settings.quiet {
            print(&summary.words(left, inputs))?;
        } else if !settings.quiet && inputs.skipped + left > 0 {
            Console::warn(format_args!("{}", summary.words(left, inputs)));
        }
        Ok(summary.code)
    }

    /// What is said of one image.
    fn told(&self, audited: &Audited, several: bool) -> Result<String> {
        let settings = self.settings;
        let look = settings.look;
        if settings.json {
            return Ok(json::object(audited, settings.deny_hazards)? + "\n");
        }
        let unremarkable = audited.exit_code(true) == 0;
        Ok(match (unremarkable, settings.quiet, several) {
            (true, true, _) => String::new(),
            (false, true, _) => report::headline(audited, look) + "\n",
            (true, false, true) if !settings.full => report::short(audited, look),
            (_, false, true) => report::render(audited, extent(settings), look) + "\n",
            (_, false, false) => report::render(audited, extent(settings), look),
        })
    }

    /// Audits an image, and what lies below it if that was asked for.
    fn audit(&self, path: &Path, tell: &mut dyn FnMut(Audited) -> Result<()>) -> Result<()> {
        let settings = self.settings;
        let file = match open(path, settings.online) {
            Ok(file) => file,
            Err(error) => return tell(Audited::failed(path.to_owned(), false, error)),
        };
        if !settings.chain {
            return tell(self.audit_file(path, &file));
        }
        let options = FileOptions::new().force_share(settings.online);
        for layer in Chain::new(path, file, settings.references.clone(), options) {
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
        if self.settings.online {
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
        let settings = self.settings;
        let progress = Progress::new(settings.progress, self.interrupt);
        let options = Options {
            threads: settings.threads,
            max_findings: match settings.max_findings {
                _ if settings.all => usize::MAX,
                Some(max) => max,
                None => FINDINGS_KEPT,
            },
            monitor: Some(&progress),
            deep: settings.deep,
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

fn extent(settings: &Settings) -> Extent {
    match settings.max_findings {
        _ if settings.all => Extent::places(usize::MAX),
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
