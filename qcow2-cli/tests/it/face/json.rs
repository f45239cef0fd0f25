use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;

use super::Bench;

/// The keys that a section of docs/json.md tells of, and whether they may be missing.
fn documented(section: &str) -> BTreeMap<String, bool> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/json.md");
    let page = fs::read_to_string(path).unwrap();
    let wanted = |line: &&str| {
        let names = line.trim_start_matches("### ");
        line.starts_with("### ") && (names == section || is_listed(names, section))
    };
    let lines: Vec<&str> = page.lines().collect();
    let at = lines.iter().position(wanted);
    let at = at.unwrap_or_else(|| panic!("docs/json.md has no section {section}"));
    lines[at + 1..]
        .iter()
        .take_while(|line| !line.starts_with('#'))
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .filter(|key| *key != "key")
        .map(|key| match key.strip_suffix('?') {
            Some(key) => (key.to_owned(), true),
            None => (key.to_owned(), false),
        })
        .collect()
}

/// Whether a heading such as `bitmap add, remove` or `commit, rebase` has this command.
fn is_listed(heading: &str, command: &str) -> bool {
    let mut group = "";
    heading.split(", ").any(|name| match name.split_once(' ') {
        Some((first, _)) => {
            group = first;
            name == command
        }
        None => name == command || format!("{group} {name}") == command,
    })
}

/// All keys of an object; those of nested ones where the page tells of them.
fn keys(value: &Value, prefix: &str, known: &BTreeMap<String, bool>, found: &mut BTreeSet<String>) {
    let Value::Object(object) = value else { return };
    for (key, value) in object {
        let path = format!("{prefix}{key}");
        let is_told = |start: &str| known.keys().any(|key| key.starts_with(start));
        found.insert(path.clone());
        if is_told(&format!("{path}.")) {
            keys(value, &format!("{path}."), known, found);
        }
        let inner = format!("{path}[].");
        if let (Value::Array(items), true) = (value, is_told(&inner)) {
            for item in items {
                keys(item, &inner, known, found);
            }
        }
    }
}

/// The objects have the keys that the page tells of, and no others.
fn agree(section: &str, objects: &[Value]) {
    let known = documented(section);
    assert!(!known.is_empty(), "{section}");
    for object in objects {
        let mut found = BTreeSet::new();
        keys(object, "", &known, &mut found);
        for key in &found {
            assert!(
                known.contains_key(key),
                "{section}: {key} is not documented"
            );
        }
        let is_there = |key: &str| {
            // What lies in something that is missing, or in an empty array, is missing with it.
            let outer = key.rfind(['.', '[']).map(|at| &key[..at]);
            let outer = outer.map(|key| key.trim_end_matches("[]"));
            let inside_array = key.contains("[].");
            found.contains(key)
                || outer.is_some_and(|outer| !found.contains(outer))
                || inside_array && !found.iter().any(|found| found.contains("[]."))
        };
        for (key, may_be_missing) in &known {
            assert!(
                *may_be_missing || is_there(key),
                "{section}: {key} is missing in {object}"
            );
        }
    }
}

#[test]
fn every_answer_has_the_keys_that_the_page_tells_of() {
    let bench = Bench::with_disk();
    let check = |section: &str, words: &[&str]| agree(section, &bench.objects(words));
    check("create", &["create", "a.qcow2", "1M"]);
    check(
        "create",
        &["create", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"],
    );
    check(
        "snapshot create",
        &["snapshot", "create", "disk.qcow2", "one"],
    );
    check("bitmap add", &["bitmap", "add", "disk.qcow2", "b"]);
    bench.io("disk.qcow2", "write -P 8 64k 64k");
    check("info", &["info", "disk.qcow2"]);
    check("info", &["info", "--chain", "top.qcow2"]);
    check("check", &["check", "disk.qcow2"]);
    check("map", &["map", "top.qcow2"]);
    check("snapshot list", &["snapshot", "list", "disk.qcow2"]);
    check("snapshot diff", &["snapshot", "diff", "disk.qcow2", "one"]);
    check("bitmap list", &["bitmap", "list", "disk.qcow2"]);
    check("bitmap ranges", &["bitmap", "ranges", "disk.qcow2", "b"]);
    check("convert", &["convert", "-c", "disk.qcow2", "copy.qcow2"]);
    check("compare", &["compare", "disk.qcow2", "copy.qcow2"]);
    check("compare", &["compare", "disk.qcow2", "a.qcow2"]);
    check("measure", &["measure", "disk.qcow2"]);
    check("measure", &["measure", "--size", "1M", "-O", "raw"]);
    check("repair", &["repair", "--plan", "disk.qcow2"]);
    let overlay = ["-b", "a.qcow2", "-F", "qcow2"];
    let snapshot = ["snapshot", "export", "disk.qcow2", "one", "since.qcow2"];
    check("snapshot export", &[&snapshot[..], &overlay].concat());
    let bitmap = ["bitmap", "export", "disk.qcow2", "b", "dirty.qcow2"];
    check("bitmap export", &[&bitmap[..], &overlay].concat());
    check("commit", &["commit", "top.qcow2"]);
    check("rebase", &["rebase", "--no-backing", "top.qcow2"]);
    check("resize", &["resize", "a.qcow2", "2M"]);
    check("amend", &["amend", "--lazy-refcounts", "on", "a.qcow2"]);
    check("compact", &["compact", "disk.qcow2"]);
    check("bitmap clear", &["bitmap", "clear", "disk.qcow2", "b"]);
    check(
        "bitmap remove",
        &["bitmap", "remove", "-y", "disk.qcow2", "b"],
    );
    check(
        "snapshot delete",
        &["snapshot", "delete", "-y", "disk.qcow2", "one"],
    );
    check("explain", &["explain", "LEAK"]);
    check("explain", &["explain"]);
    check("man", &["man", "pages"]);
}

/// Clears the refcounts of the first clusters, and lets an entry of the L1 table lead nowhere.
fn damage(bench: &Bench, name: &str) {
    let mut bytes = fs::read(bench.path(name)).unwrap();
    let at = |bytes: &[u8], from: usize| {
        let number = u64::from_be_bytes(bytes[from..from + 8].try_into().unwrap());
        usize::try_from(number & !(1 << 63)).unwrap()
    };
    let table = at(&bytes, 48);
    let block = at(&bytes, table);
    bytes[block..block + 8].fill(0);
    fs::write(bench.path(name), bytes).unwrap();
}

#[test]
fn reports_of_audits_have_the_keys_that_the_page_tells_of() {
    let bench = Bench::with_disk();
    bench.ok(&["create", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"]);
    bench.ok(&["snapshot", "create", "disk.qcow2", "one"]);
    bench.ok(&["convert", "-c", "disk.qcow2", "packed.qcow2"]);
    damage(&bench, "packed.qcow2");
    fs::write(bench.path("junk"), vec![1; 65536]).unwrap();
    let check = |section: &str, words: &[&str]| agree(section, &bench.objects(words));
    check("audit", &["audit", "disk.qcow2"]);
    check("audit", &["audit", "--online", "disk.qcow2"]);
    check("audit", &["audit", "--deep", "packed.qcow2"]);
    check("audit", &["audit", "--chain", "top.qcow2"]);
    check("audit", &["audit", "junk", "gone"]);
    check("audit --owner", &["audit", "--owner", "0", "disk.qcow2"]);
    let found = bench.object(&["audit", "packed.qcow2"]);
    assert_eq!(found["verdict"], "corrupt");
    assert_eq!(found["exit-code"], 2);
    assert!(found["findings"][0]["place"]["structure"].is_string());
    assert_eq!(bench.objects(&["audit", "--chain", "top.qcow2"]).len(), 2);
}

#[test]
fn repairs_tell_of_all_that_they_do_in_json() {
    let bench = Bench::with_disk();
    damage(&bench, "disk.qcow2");
    let planned = bench.object(&["repair", "--plan", "disk.qcow2"]);
    agree("repair", std::slice::from_ref(&planned));
    assert_eq!(planned["applied"], false);
    assert_eq!(planned["plan"]["verdict-before"], "corrupt");
    assert_eq!(planned["plan"]["verdict-after"], "sound");
    let saved = bench.object(&["repair", "--salvage-to", "saved.qcow2", "disk.qcow2"]);
    agree("repair --salvage-to", std::slice::from_ref(&saved));
    assert_eq!(saved["complete"], true);
    let done = bench.object(&["repair", "--yes", "disk.qcow2"]);
    agree("repair", std::slice::from_ref(&done));
    assert_eq!(done["applied"], true);
    bench.same("saved.qcow2", "disk.qcow2");
    let undo = done["undo-file"].as_str().unwrap();
    let undone = bench.object(&["repair", "--undo", undo, "disk.qcow2"]);
    agree("repair --undo", std::slice::from_ref(&undone));
    assert_eq!(undone["undone"], true);
    assert_eq!(bench.run(&["check", "disk.qcow2"]).code, 2);
}

#[test]
fn what_is_lost_is_told_by_a_salvage() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "-c", "disk.qcow2", "packed.qcow2"]);
    let mut bytes = fs::read(bench.path("packed.qcow2")).unwrap();
    // Deflate has no such block type, so the cluster can't be decoded.
    let map = bench.objects(&["map", "packed.qcow2"]);
    assert_eq!(map[0]["compressed"], true);
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    let entry = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = usize::try_from(entry(&bytes, l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    let place = usize::try_from(entry(&bytes, l2) & ((1 << 54) - 1)).unwrap();
    bytes[place..place + 16].fill(0xff);
    fs::write(bench.path("packed.qcow2"), bytes).unwrap();
    let words = [
        "repair",
        "--json",
        "--salvage-to",
        "saved.qcow2",
        "packed.qcow2",
    ];
    let answer = bench.run(&words);
    assert_eq!(answer.code, 2, "{answer:?}");
    let told: Value = serde_json::from_str(&answer.out).unwrap();
    agree("repair --salvage-to", std::slice::from_ref(&told));
    assert_eq!(told["complete"], false);
    assert_eq!(told["doubtful"][0]["start"], 0);
    assert_eq!(told["doubtful"][0]["end"], 65536);
    assert_eq!(told["doubtful"][0]["effect"], "lost");
}

#[test]
fn the_keys_of_an_encrypted_image_are_told() {
    let bench = Bench::new();
    fs::write(bench.path("key"), "secret").unwrap();
    bench.ok(&[
        "create",
        "--encrypt",
        "luks",
        "-o",
        "encrypt.iter-time=10",
        "--new-passphrase-file",
        "key",
        "a.qcow2",
        "1M",
    ]);
    let info = bench.object(&["info", "a.qcow2"]);
    agree("info", std::slice::from_ref(&info));
    assert_eq!(info["qcow2"]["encryption"]["key-slots"][0], 0);
}

#[test]
fn names_that_are_no_text_are_no_danger_in_json() {
    let bench = Bench::new();
    bench.ok(&["create", "e\u{301}\u{1b}[0m.qcow2", "1M"]);
    let answer = bench.run(&["info", "--json", "e\u{301}\u{1b}[0m.qcow2"]);
    assert_eq!(answer.code, 0);
    assert!(
        answer
            .out
            .trim_end()
            .bytes()
            .all(|b| b == b' ' || b.is_ascii_graphic())
    );
    let text = bench.ok(&["info", "e\u{301}\u{1b}[0m.qcow2"]);
    assert!(!text.contains('\u{1b}'));
}
