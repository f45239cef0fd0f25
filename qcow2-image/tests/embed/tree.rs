//! Embedding must not drag half of the registry along.

use std::collections::BTreeSet;
use std::process::Command;

#[test]
fn at_most_twenty_crates_come_along_without_features() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--package", "qcow2-image"])
        .args(["--no-default-features", "--edges", "normal"])
        .args(["--prefix", "none"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    let tree = String::from_utf8(output.stdout).unwrap();
    // Two versions of a crate are two crates. Lines end with a path, or a mark for what stood there before.
    let crates: BTreeSet<Vec<&str>> = tree
        .lines()
        .map(|line| line.split_whitespace().take(2).collect())
        .filter(|words: &Vec<&str>| !words.is_empty())
        .collect();
    assert!(crates.iter().any(|words| words[0] == "qcow2-image"));
    assert!(crates.len() <= 20, "{}: {crates:?}", crates.len());
}
