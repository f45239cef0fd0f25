//! Checks and repairs of images in the reference program's way, told line by line in its words.

mod words;

use std::error::Error;

use qcow2_check::repair::{
    self, Level, Plan, PlanError, RefcountRepair, RepairOptions, SnapshotTables,
};
use qcow2_check::{Code, Finding, Options, Report, check};
use qcow2_io::Storage;

use crate::Console;

/// Findings of a kind that are told one by one.
const TOLD: usize = 1 << 20;

/// Plans a repair that puts things where the reference program does.
pub(crate) fn plan(file: &dyn Storage, level: Level) -> Result<Plan<'_>, PlanError> {
    let options = RepairOptions {
        level,
        max_actions: TOLD,
        refcounts: RefcountRepair::Anew,
        snapshot_tables: SnapshotTables::AsWritten,
        ..RepairOptions::default()
    };
    repair::plan(file, &options)
}

/// Repairs an image that was not closed, before it is opened for writing, if nothing but refcounts and what mirrors them is wrong with
/// it. Everything else is left as it is, to who opens it.
pub(crate) fn unclosed(file: &dyn Storage) -> Result<(), String> {
    let plan = plan(file, Level::All).map_err(|error| with_causes(&error))?;
    let is_harmless = |finding: &Finding| {
        is_count(finding.code) || finding.code == Code::CopiedWrong || !is_told(finding)
    };
    if !plan.snapshot_cuts().is_empty() || !plan.before().findings.iter().all(is_harmless) {
        return Ok(());
    }
    tell_of_repair(file, &plan);
    plan.apply(None).map_err(|error| with_causes(&error))?;
    file.flush().map_err(|error| with_causes(&error))
}

/// An error and what caused it.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What a check finds before a repair, but for what the repair cuts off the snapshot table at once.
pub(crate) fn found_before<'p>(plan: &'p Plan<'_>) -> &'p Report {
    plan.before_without_cuts().unwrap_or_else(|| plan.before())
}

/// Whether clusters in use have no refcount at all.
pub(crate) fn lacks_refcounts(report: &Report) -> bool {
    report.total(Code::RefcountMissing) > 0
}

/// Checks, and tells what is found.
pub(crate) fn inspect(file: &dyn Storage) -> Report {
    let options = Options {
        max_findings: TOLD,
        ..Options::default()
    };
    let report = check(file, &options);
    tell(file, &report);
    report
}

/// Tells of the findings that the reference program has an eye for: structures first, then counts, then flags.
pub(crate) fn tell(file: &dyn Storage, report: &Report) {
    tell_before_flags(file, report, "ERROR");
    for finding in counted(report, |code| code == Code::CopiedWrong) {
        complain(format_args!(
            "ERROR {}",
            words::of_flag(file, file, finding)
        ));
    }
}

/// As [`tell`], without flags; `verb` says what becomes of snapshots that are incomplete.
pub(crate) fn tell_before_flags(file: &dyn Storage, report: &Report, verb: &str) {
    for finding in counted(report, |code| !is_count(code) && code != Code::CopiedWrong) {
        complain(format_args!("{}", words::line(file, finding, verb)));
    }
    let size = words::cluster_size(file);
    for finding in counted(report, is_count) {
        let verb = match finding.code {
            Code::Leak => "Leaked",
            _ => "ERROR",
        };
        refcounts(finding, size, verb);
    }
}

/// Tells what is found and what is done about it; gives the number of flags that come right by themselves, and of those that are
/// turned beside what was found.
pub(crate) fn tell_of_repair(file: &dyn Storage, plan: &Plan<'_>) -> (u64, u64) {
    for cut in plan.snapshot_cuts() {
        complain(format_args!("{}", words::of_cut(*cut)));
    }
    let report = found_before(plan);
    let verb = match plan.level() {
        Level::Leaks => "ERROR",
        _ => "Repairing",
    };
    tell_before_flags(file, report, verb);
    if words::is_rebuilt(file, plan) {
        complain(format_args!("Rebuilding refcount structure"));
        for (cluster, references) in words::structures_left(file, plan) {
            complain(format_args!(
                "Repairing cluster {cluster} refcount={} reference={references}",
                references + 1
            ));
        }
    } else {
        let size = words::cluster_size(file);
        for finding in counted(report, is_count) {
            refcounts(finding, size, "Repairing");
        }
    }
    let mut by_themselves = 0;
    for finding in counted(report, |code| code == Code::CopiedWrong) {
        if words::flag_changes(file, plan.preview(), finding) {
            complain(format_args!(
                "Repairing {}",
                words::of_flag(file, plan.preview(), finding)
            ));
        } else {
            by_themselves += finding.count;
        }
    }
    let known: Vec<&Finding> = counted(report, |code| code == Code::CopiedWrong).collect();
    let turned = words::flags_turned(file, plan, &known);
    for line in &turned {
        complain(format_args!("Repairing {line}"));
    }
    (by_themselves, turned.len() as u64)
}

/// Whether it is about a refcount.
fn is_count(code: Code) -> bool {
    matches!(code, Code::Leak | Code::RefcountLow | Code::RefcountMissing)
}

fn is_told(finding: &Finding) -> bool {
    finding.code.counted_by_qemu()
}

fn counted(report: &Report, wanted: impl Fn(Code) -> bool) -> impl Iterator<Item = &Finding> {
    let findings = report.findings.iter();
    findings.filter(move |finding| is_told(finding) && wanted(finding.code))
}

/// A line for each cluster whose refcount is wrong.
fn refcounts(finding: &Finding, cluster_size: u64, verb: &str) {
    let Some((clusters, refcount, references)) = words::of_count(finding, cluster_size) else {
        complain(format_args!("{verb} {finding}"));
        return;
    };
    for cluster in clusters {
        complain(format_args!(
            "{verb} cluster {cluster} refcount={refcount} reference={references}"
        ));
    }
}

fn complain(line: std::fmt::Arguments<'_>) {
    Console::warn(format_args!("{line}\n"));
}
