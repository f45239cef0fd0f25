//! Sound images with one field damaged: never a milder verdict than QEMU's, and each other difference is meant to be.

pub(crate) mod bases;
pub(crate) mod damage;
mod layout;
mod rules;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use qcow2_check::{Options, check};
use qcow2_io::{Memory, Storage};

use crate::oracle::{self, Workshop};
use bases::{Base, IMAGE};
use damage::{Change, Mutant};
use rules::{Case, RULES};

/// Mutants of one base that one thread works on without making the files anew.
const BATCH: usize = 64;

/// One in so many mutants is tried, another one of each base.
const STEP: usize = 3;
/// Set in the environment, it has every mutant tried.
const ALL: &str = "QCOW2_ALL_MUTANTS";

#[test]
fn qemu_is_never_stricter_about_a_damaged_image_and_each_difference_has_its_rule() {
    if !oracle::is_available(4000, "mutants") {
        return;
    }
    let bases = bases::all();
    let step = if std::env::var_os(ALL).is_some() {
        1
    } else {
        STEP
    };
    let mutants: Vec<Vec<Mutant>> = (0..)
        .zip(&bases)
        .map(|(n, base)| {
            let all = damage::all(&base.bytes).into_iter().enumerate();
            let tried = |at: usize, mutant: &Mutant| at % step == n % step || mutant.is_rare();
            all.filter(|(at, m)| tried(*at, m))
                .map(|(_, m)| m)
                .collect()
        })
        .collect();
    let total: usize = mutants.iter().map(Vec::len).sum();
    let batches: Vec<(&Base, &[Mutant])> = bases
        .iter()
        .zip(&mutants)
        .flat_map(|(b, m)| m.chunks(BATCH).map(move |c| (b, c)))
        .collect();

    let outcomes = oracle::on_all_cores(&batches, |(base, mutants)| run(base, mutants));
    let mut used: BTreeMap<&str, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    for outcome in outcomes.into_iter().flatten() {
        match outcome {
            Outcome::Same => {}
            Outcome::Explained(rule) => *used.entry(rule).or_default() += 1,
            Outcome::Failed(what) => failures.push(what),
        }
    }

    eprintln!("{total} mutants, differences by rule:");
    for rule in RULES {
        eprintln!(
            "{:6} {}: {}",
            used.get(rule.name).unwrap_or(&0),
            rule.name,
            rule.why
        );
    }
    assert!(
        failures.is_empty(),
        "{} mutants failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    for rule in RULES {
        assert!(
            used.contains_key(rule.name),
            "no mutant needs the rule '{}'",
            rule.name
        );
    }
    assert!(total >= 2000, "only {total} mutants");
    if let Some(peak) = oracle::peak_memory_kib() {
        assert!(peak < 256 << 10, "peak memory of {peak} KiB");
    }
}

enum Outcome {
    Same,
    Explained(&'static str),
    Failed(String),
}

/// Damages an image in each of the ways, one after the other, and asks both.
fn run(base: &Base, mutants: &[Mutant]) -> Vec<Outcome> {
    let shop = Workshop::new();
    for (name, bytes) in &base.others {
        shop.write(name, bytes);
    }
    shop.write(IMAGE, &base.bytes);
    let image = Memory::from(base.bytes.clone());
    let mut outcomes = Vec::new();
    for mutant in mutants {
        apply(mutant.change, &shop.path(IMAGE), &image);
        let theirs = shop.check(IMAGE, base.access);
        let ours = check(
            &image,
            &Options {
                threads: 1,
                ..Options::default()
            },
        );
        outcomes.push(compare(&Case {
            base,
            mutant,
            theirs: &theirs,
            ours: &ours,
        }));
        revert(base, mutant.change, &shop.path(IMAGE), &image);
    }
    outcomes
}

fn compare(case: &Case<'_>) -> Outcome {
    if !case.differs() {
        return Outcome::Same;
    }
    let rule = RULES
        .iter()
        .find(|rule| (!case.is_milder() || rule.milder) && (rule.applies)(case));
    if let Some(rule) = rule {
        return Outcome::Explained(rule.name);
    }
    let findings: Vec<_> = case
        .ours
        .findings
        .iter()
        .take(4)
        .map(ToString::to_string)
        .collect();
    Outcome::Failed(format!(
        "{}{}: {}\n    QEMU {:?} {:?}\n    ours {:?} {:?}\n    {:?}\n    {}\n    {}",
        if case.is_milder() { "MILDER " } else { "" },
        case.base.name,
        case.mutant,
        case.their_verdict(),
        case.theirs.counts,
        case.ours.verdict(),
        case.ours.counts,
        case.ours.totals,
        findings.join("\n    "),
        case.theirs
            .message
            .lines()
            .take(4)
            .collect::<Vec<_>>()
            .join("\n    "),
    ))
}

fn apply(change: Change, path: &Path, image: &Memory) {
    match change {
        Change::Poke {
            offset, width, new, ..
        } => poke(path, image, offset, width, new),
        Change::Truncate { len } => resize(path, image, len),
    }
}

fn revert(base: &Base, change: Change, path: &Path, image: &Memory) {
    match change {
        Change::Poke {
            offset, width, old, ..
        } => poke(path, image, offset, width, old),
        Change::Truncate { .. } => {
            resize(path, image, 0);
            std::fs::write(path, &base.bytes).unwrap();
            image.write_at(&base.bytes, 0).unwrap();
        }
    }
}

fn poke(path: &Path, image: &Memory, offset: u64, width: u64, value: u64) {
    let bytes = value.to_be_bytes();
    let bytes = &bytes[bytes.len() - usize::try_from(width).unwrap()..];
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
    image.write_at(bytes, offset).unwrap();
}

fn resize(path: &Path, image: &Memory, len: u64) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
    image.set_len(len).unwrap();
}
