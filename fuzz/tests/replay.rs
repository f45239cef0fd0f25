//! Without libFuzzer: every target takes its seeds and every input that once broke it, and the list of targets is complete.

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use qcow2_fuzz::{TARGETS, Target};

/// What the fuzzer allows an input, too.
const INPUT_LIMIT: Duration = Duration::from_secs(10);

/// Runs one input. What goes wrong is added to `broken`, so that one defect does not hide the next.
fn replay(target: &Target, what: &str, bytes: &[u8], broken: &mut Vec<String>) {
    let start = Instant::now();
    if catch_unwind(|| (target.run)(bytes)).is_err() {
        broken.push(format!("{}: {what} panics", target.name));
    }
    let taken = start.elapsed();
    if taken > INPUT_LIMIT {
        broken.push(format!("{}: {what} takes {taken:?}", target.name));
    }
}

#[test]
fn whatever_once_broke_a_target_breaks_it_no_more() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut broken = Vec::new();
    let mut known = BTreeSet::from(["README.md".to_owned()]);
    for target in &TARGETS {
        known.insert(target.name.to_owned());
        let Ok(entries) = fs::read_dir(folder.join(target.name)) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            replay(
                target,
                &path.display().to_string(),
                &fs::read(&path).unwrap(),
                &mut broken,
            );
        }
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            known.contains(&name),
            "regressions/{name} belongs to no target"
        );
    }
}

#[test]
fn every_target_takes_its_seeds_and_what_is_left_of_them() {
    let mut broken = Vec::new();
    for target in &TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        let names: BTreeSet<_> = seeds.iter().map(|seed| &seed.name).collect();
        assert_eq!(
            names.len(),
            seeds.len(),
            "{}: two seeds have one name",
            target.name
        );
        for seed in &seeds {
            assert!(
                seed.bytes.len() <= target.max_len_bytes,
                "{}: {} is too long",
                target.name,
                seed.name
            );
            replay(target, &seed.name, &seed.bytes, &mut broken);
            for parts in 1..4 {
                replay(
                    target,
                    &format!("{parts}/4 of {}", seed.name),
                    &seed.bytes[..seed.bytes.len() / 4 * parts],
                    &mut broken,
                );
            }
        }
        replay(target, "no bytes", &[], &mut broken);
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn each_target_has_a_program_and_each_program_a_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed: BTreeSet<_> = TARGETS
        .iter()
        .map(|target| target.name.to_owned())
        .collect();
    let programs: BTreeSet<_> = fs::read_dir(root.join("fuzz_targets"))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(programs, listed);
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for name in listed {
        let path = format!("path = \"fuzz_targets/{name}.rs\"");
        assert!(
            manifest.contains(&path),
            "Cargo.toml has no [[bin]] for {name}"
        );
    }
}
