//! The corpus of damaged images, repaired one by one: clean afterwards, nothing lost that was not damaged, and each byte brought back by
//! the undo file.

use std::collections::BTreeMap;

use qcow2_check::repair::{Level, Plan, PlanError, RepairOptions, plan, undo};
use qcow2_check::{Code, Options, Severity, Verdict, check};
use qcow2_io::Memory;

use super::guest::{self, Disk, Guest};
use crate::mutants::bases::{self, Base};
use crate::mutants::damage::{self, Change, Mutant};
use crate::oracle;

/// One in so many mutants is tried, another one of each base.
const STEP: usize = 12;
/// Set in the environment, it has every mutant tried.
const ALL: &str = "QCOW2_ALL_MUTANTS";
const BATCH: usize = 32;

/// How a repair ended.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Ending {
    /// Nothing was wrong, or nothing that a repair touches.
    Nothing,
    Clean,
    /// Clean, but for clusters that are kept since something may have been lost.
    Orphans,
    /// Something is left that this level can't put right.
    Left,
    /// There was nothing to begin with, but a search found all of the active disk.
    Salvaged,
    /// A search found a part of it.
    Part,
    /// A search found nothing, either.
    Hopeless,
}

#[derive(Debug)]
struct Outcome {
    ending: Ending,
    what: String,
    failures: Vec<String>,
}

/// Longest file that a damage makes: an end far away stands for any.
const LEN_MAX: u64 = 16 << 20;

/// The image with the damage.
pub(super) fn damaged(base: &Base, mutant: &Mutant) -> Vec<u8> {
    let mut bytes = base.bytes.clone();
    match mutant.change {
        Change::Poke {
            offset, width, new, ..
        } => {
            let value = new.to_be_bytes();
            let value = &value[value.len() - usize::try_from(width).unwrap()..];
            let at = usize::try_from(offset).unwrap();
            let end = bytes.len().max(at + value.len());
            bytes.resize(end, 0);
            bytes[at..at + value.len()].copy_from_slice(value);
        }
        Change::Truncate { len } => bytes.resize(usize::try_from(len.min(LEN_MAX)).unwrap(), 0),
    }
    bytes
}

/// Clusters that are in `damaged` as they were in `sound`, with all that leads to them, and read otherwise in `now`.
pub(super) fn lost(sound: &Guest, damaged: &Guest, now: &Guest) -> Vec<String> {
    let disks = |guest: &Guest| {
        let snapshots = guest.snapshots.iter();
        let named = snapshots
            .map(|(key, disk)| (String::from_utf8_lossy(&key.1).into_owned(), disk.clone()));
        [("active".to_owned(), guest.active.clone())]
            .into_iter()
            .chain(named)
            .collect::<BTreeMap<String, Disk>>()
    };
    let (sound, damaged, now) = (disks(sound), disks(damaged), disks(now));
    let mut lost = Vec::new();
    for (name, sound) in &sound {
        let Some(damaged) = damaged.get(name) else {
            continue;
        };
        for (index, (sound, damaged)) in sound.iter().zip(damaged).enumerate() {
            let now = now.get(name).and_then(|disk| disk.get(index)?.content);
            if sound == damaged && sound.content.is_some() && now != sound.content {
                lost.push(format!("{name} cluster {index}"));
            }
        }
    }
    lost
}

fn run(base: &Base, mutants: &[Mutant]) -> Vec<Outcome> {
    let sound = guest::read(&base.bytes).unwrap();
    mutants
        .iter()
        .map(|mutant| one(base, &sound, mutant))
        .collect()
}

fn one(base: &Base, sound: &Guest, mutant: &Mutant) -> Outcome {
    let bytes = damaged(base, mutant);
    let image = Memory::from(bytes.clone());
    let mut failures = Vec::new();
    let what = format!("{}: {mutant}", base.name);
    let options = RepairOptions {
        level: Level::All,
        threads: 1,
        ..RepairOptions::default()
    };
    let made = plan(&image, &options);
    let planned = match made {
        Ok(planned) => planned,
        Err(PlanError::Hopeless(finding)) => {
            let what = format!("{what}: {finding}");
            return salvaged(base, sound, &image, what);
        }
        Err(error) => {
            failures.push(format!("{error}"));
            return Outcome {
                ending: Ending::Hopeless,
                what,
                failures,
            };
        }
    };
    if image.to_vec().unwrap() != bytes {
        failures.push("planning changed the image".to_owned());
    }
    let ending = ending(&planned);
    let text = planned.to_string();
    let undo_file = Memory::new();
    let promised = planned.after().totals.clone();
    planned.apply(Some(&undo_file)).unwrap();
    let after = check(&image, &Options::default());
    let grave = |totals: &[(Code, u64)]| {
        let grave = totals
            .iter()
            .filter(|(code, _)| code.severity() >= Severity::Leak);
        grave.copied().collect::<Vec<_>>()
    };
    if grave(&after.totals) != grave(&promised) {
        failures.push(format!("promised {promised:?}, found {:?}", after.totals));
    }
    let repaired = image.to_vec().unwrap();
    let before = guest::read(&bytes);
    // Not if the disk has an absurd size, or the header was mended.
    if let (Some(before), Some(now)) = (before, guest::read(&repaired)) {
        let lost = lost(sound, &before, &now);
        if !lost.is_empty() {
            let first = &lost[..lost.len().min(4)];
            failures.push(format!("{} lost: {first:?}", lost.len()));
        }
    }
    let is_explained = LEFT.iter().any(|rule| (rule.applies)(base, &promised));
    if ending == Ending::Left && !is_explained {
        let first = planned
            .after()
            .findings
            .iter()
            .filter(|f| f.severity() >= Severity::Leak)
            .take(3);
        let first: Vec<String> = first.map(ToString::to_string).collect();
        failures.push(format!("left: {promised:?} {first:?}"));
    } else {
        let again = plan(&image, &options).unwrap();
        if !again.is_empty() && ending != Ending::Left {
            failures.push(format!("a second run wants to do more: {again}"));
        }
    }
    undo(&image, &undo_file, false).unwrap();
    if image.to_vec().unwrap() != bytes {
        failures.push("undo brought something else back".to_owned());
    }
    if !failures.is_empty() {
        failures.push(text);
    }
    Outcome {
        ending,
        what,
        failures,
    }
}

/// What a search of the file makes of an image that has nothing to begin with.
fn salvaged(base: &Base, sound: &Guest, image: &Memory, what: String) -> Outcome {
    let bytes = image.to_vec().unwrap();
    let options = RepairOptions {
        level: Level::Salvage,
        threads: 1,
        ..RepairOptions::default()
    };
    let mut failures = Vec::new();
    let planned = match plan(image, &options) {
        Ok(planned) => planned,
        Err(PlanError::Hopeless(_)) => {
            return Outcome {
                ending: Ending::Hopeless,
                what,
                failures,
            };
        }
        Err(error) => {
            failures.push(format!("salvage: {error}"));
            return Outcome {
                ending: Ending::Hopeless,
                what,
                failures,
            };
        }
    };
    let undo_file = Memory::new();
    planned.apply(Some(&undo_file)).unwrap();
    let left = planned.after().totals.clone();
    let ending = ending(&planned);
    if ending == Ending::Left && !LEFT.iter().any(|rule| (rule.applies)(base, &left)) {
        failures.push(format!("salvage left: {left:?}\n{planned}"));
    }
    let now = guest::read(&image.to_vec().unwrap()).unwrap_or_default();
    let same = sound.active.iter().zip(&now.active);
    let kept = same.filter(|(a, b)| a.content == b.content).count();
    let mapped = sound.active.len();
    undo(image, &undo_file, false).unwrap();
    if image.to_vec().unwrap() != bytes {
        failures.push("undo brought something else back".to_owned());
    }
    let whole = sound
        .active
        .iter()
        .zip(&now.active)
        .all(|(a, b)| a.content == b.content)
        && sound.active.len() <= now.active.len();
    Outcome {
        ending: if whole {
            Ending::Salvaged
        } else {
            Ending::Part
        },
        what: format!("{what}: {kept} of {mapped}: {planned}"),
        failures,
    }
}

/// Why something may be left.
struct Rule {
    why: &'static str,
    applies: fn(&Base, &[(Code, u64)]) -> bool,
}

const LEFT: &[Rule] = &[
    Rule {
        why: "key material that is damaged can't be made anew",
        applies: |_, left| left.iter().any(|(code, _)| *code == Code::CryptoInvalid),
    },
    Rule {
        why: "an image with an external data file can't have a snapshot of what was lost, so that stays as leaks",
        applies: |base, left| {
            base.name.starts_with("data-file")
                && left
                    .iter()
                    .all(|(code, _)| code.severity() <= Severity::Leak)
        },
    },
    Rule {
        why: "encrypted clusters are not moved without the key",
        applies: |base, left| {
            let shared = [Code::DataShared, Code::DataOnMetadata];
            base.name == "luks" && left.iter().any(|(code, _)| shared.contains(code))
        },
    },
];

fn ending(plan: &Plan<'_>) -> Ending {
    let after = plan.after();
    match after.verdict() {
        _ if plan.is_empty() && plan.before().verdict() == Verdict::Sound => Ending::Nothing,
        Verdict::Sound if plan.keeps_orphans() => Ending::Orphans,
        Verdict::Sound => Ending::Clean,
        _ => Ending::Left,
    }
}

#[test]
fn every_damage_is_repaired_and_nothing_undamaged_is_lost() {
    if !oracle::is_available(600, "repairs") {
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
            all.filter(|(at, _)| at % step == n % step)
                .map(|(_, m)| m)
                .collect()
        })
        .collect();
    let batches: Vec<(&Base, &[Mutant])> = bases
        .iter()
        .zip(&mutants)
        .flat_map(|(b, m)| m.chunks(BATCH).map(move |c| (b, c)))
        .collect();
    let outcomes = oracle::on_all_cores(&batches, |(base, mutants)| run(base, mutants));
    let mut endings: BTreeMap<Ending, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    for outcome in outcomes.into_iter().flatten() {
        *endings.entry(outcome.ending).or_default() += 1;
        if !outcome.failures.is_empty() {
            failures.push(format!(
                "{}\n    {}",
                outcome.what,
                outcome.failures.join("\n    ")
            ));
        }
    }
    eprintln!("{endings:?}; what may be left:");
    for rule in LEFT {
        eprintln!("    {}", rule.why);
    }
    assert!(
        failures.is_empty(),
        "{} repairs failed:\n{}",
        failures.len(),
        failures
            .iter()
            .take(10)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    );
}
