//! Damaged images, repaired here and by `qemu-img check -r all`: what each leaves of them, and the name of each difference.
//!
//! With `QCOW2_REPAIR_STEP=n` in the environment one in n mutants is tried, with 1 all of them; `cargo xtask soak --repair` sets it.

mod case;
mod rules;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::guest;
use crate::mutants::bases::{self, Base};
use crate::mutants::damage::{self, Mutant};
use crate::oracle::{self, Workshop};
use case::Case;
use rules::{LEFT, SPOTS};

/// One in so many mutants is tried, another one of each base.
const STEP: usize = 60;
/// Mutants there are, about.
const MUTANTS: usize = 19_000;
const STEP_VARIABLE: &str = "QCOW2_REPAIR_STEP";
const BATCH: usize = 16;
/// Failures that are told.
const TOLD: usize = 40;

/// What came of one image.
struct Outcome {
    rules: Vec<&'static str>,
    failure: Option<String>,
}

fn run(base: &Base, mutants: &[Mutant]) -> Vec<Outcome> {
    let shop = Workshop::new();
    for (name, bytes) in &base.others {
        shop.write(name, bytes);
    }
    let sound = guest::read(&base.bytes).unwrap();
    let one = |mutant| judge(&Case::new(base, &sound, mutant, &shop));
    mutants.iter().map(one).collect()
}

fn judge(case: &Case<'_>) -> Outcome {
    let mut rules = Vec::new();
    let mut failures = case.failures.clone();
    if !case.all.is_clean() {
        match LEFT.iter().find(|rule| (rule.applies)(case)) {
            Some(rule) => rules.push(rule.name),
            None => failures.push(left(case)),
        }
    }
    let mut unnamed = Vec::new();
    for spot in case.spots() {
        match SPOTS.iter().find(|rule| (rule.applies)(case, &spot)) {
            Some(rule) if !rules.contains(&rule.name) => rules.push(rule.name),
            Some(_) => {}
            None => unnamed.push(spot),
        }
    }
    if let Some(first) = unnamed.first() {
        let letter = |content: Option<u64>| match content {
            None => '!',
            same if same == first.sound => 's',
            same if same == first.empty => '0',
            same if same == first.damaged => 'd',
            _ => '?',
        };
        failures.push(format!(
            "{} places differ without a name, first {} {}: damaged {}, ours {}{}, theirs {}{}, QEMU {:?} then {:?}: {}\n{}",
            unnamed.len(),
            first.snapshot.as_ref().map_or("active".into(), |key| String::from_utf8_lossy(&key.1)),
            first.cluster,
            letter(first.damaged),
            letter(first.ours),
            if first.is_ours { "" } else { " (outside)" },
            letter(first.theirs),
            if first.is_theirs { "" } else { " (outside)" },
            case.theirs.run.exit,
            case.theirs.check.exit,
            case.theirs.run.message.lines().take(3).collect::<Vec<_>>().join(" | "),
            case.ours().plan,
        ));
    }
    let failure = (!failures.is_empty()).then(|| {
        format!(
            "{}: {}\n{}",
            case.base.name,
            case.mutant,
            failures.join("\n")
        )
    });
    Outcome { rules, failure }
}

/// Why the result of `all` is not clean.
fn left(case: &Case<'_>) -> String {
    let mut words = format!("all leaves it {:?}", case.all.verdict());
    if let Some(finding) = &case.all.hopeless {
        _ = write!(
            words,
            ", hopeless: {finding}; salvage {:?} {:?}",
            case.salvage.verdict(),
            case.salvage.hopeless
        );
    }
    if let Some(theirs) = &case.all.theirs {
        _ = write!(words, ", QEMU says {:?} {}", theirs.exit, theirs.message);
    }
    if let Some(report) = &case.all.report {
        for finding in report.findings.iter().take(3) {
            _ = write!(words, "\n    {finding}");
        }
    }
    format!("{words}\n{}", case.all.plan)
}

fn step() -> usize {
    let step = std::env::var(STEP_VARIABLE);
    step.map_or(STEP, |step| step.parse().unwrap())
}

/// Tries the mutants of one in `parts` bases.
fn part(part: usize, parts: usize) {
    if !oracle::is_available(MUTANTS / step() / parts, "repairs beside QEMU's") {
        return;
    }
    let step = step();
    let bases: Vec<(usize, Base)> = bases::all().into_iter().enumerate().collect();
    let bases = bases.iter().filter(|(n, _)| n % parts == part);
    let mutants: Vec<(&Base, Vec<Mutant>)> = bases
        .map(|(n, base)| {
            let all = damage::all(&base.bytes).into_iter().enumerate();
            let tried = all.filter(|(at, _)| at % step == n % step);
            (base, tried.map(|(_, mutant)| mutant).collect())
        })
        .collect();
    let total: usize = mutants.iter().map(|(_, mutants)| mutants.len()).sum();
    let batches: Vec<(&Base, &[Mutant])> = mutants
        .iter()
        .flat_map(|(base, mutants)| mutants.chunks(BATCH).map(move |batch| (*base, batch)))
        .collect();
    let outcomes = oracle::on_all_cores(&batches, |(base, mutants)| run(base, mutants));
    let mut used: BTreeMap<&str, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    for outcome in outcomes.into_iter().flatten() {
        for rule in outcome.rules {
            *used.entry(rule).or_default() += 1;
        }
        failures.extend(outcome.failure);
    }
    assert!(total > 0, "no mutants");
    eprintln!("{total} images repaired by both; of them");
    for (name, why) in rules::all() {
        eprintln!("{:6} {name}: {why}", used.get(name).unwrap_or(&0));
    }
    assert!(
        failures.is_empty(),
        "{} of {total} failed:\n{}",
        failures.len(),
        failures[..failures.len().min(TOLD)].join("\n")
    );
}

/// Parts that the images are tried in.
const PARTS: usize = 3;

#[test]
fn each_difference_from_qemus_repair_has_a_name_part_1() {
    part(0, PARTS);
}

#[test]
fn each_difference_from_qemus_repair_has_a_name_part_2() {
    part(1, PARTS);
}

#[test]
fn each_difference_from_qemus_repair_has_a_name_part_3() {
    part(2, PARTS);
}

#[test]
fn the_document_has_each_name_with_its_reason() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/repair.md");
    let document = std::fs::read_to_string(document).unwrap();
    for (name, why) in rules::all() {
        let row = format!("| {name} | {why} |");
        assert!(document.contains(&row), "docs/repair.md lacks: {row}");
    }
}
