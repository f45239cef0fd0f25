use std::fs;

use super::Bench;

/// Commands that help lists.
fn commands(help: &str) -> Vec<&str> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect()
}

#[test]
fn each_command_has_help_with_examples_a_page_and_completions() {
    let bench = Bench::new();
    let help = bench.ok(&["--help"]);
    assert!(help.contains("Exit codes:"), "{help}");
    let commands = commands(&help);
    assert_eq!(commands.len(), 21, "{commands:?}");
    bench.ok(&["man", "pages", "-q"]);
    let script = bench.ok(&["completions", "bash"]);
    for name in commands {
        let page = fs::read_to_string(bench.path(&format!("pages/qcow2-{name}.1"))).unwrap();
        assert!(page.contains(&format!(".TH qcow2-{name} 1")), "{name}");
        assert!(
            script.contains(&format!("qcow2__{name}"))
                || script.contains(&format!("qcow2__subcmd__{name}")),
            "{name}"
        );
        if ["img", "io"].contains(&name) {
            continue;
        }
        let help = bench.ok(&[name, "--help"]);
        assert!(help.contains("Examples:\n  qcow2 "), "{name}: {help}");
        assert!(page.contains("Examples"), "{name}");
        if name != "completions" && !["snapshot", "bitmap"].contains(&name) {
            assert!(help.contains("--json"), "{name}");
            assert!(help.contains("--quiet"), "{name}");
        }
    }
}

#[test]
fn actions_have_pages_of_their_own() {
    let bench = Bench::new();
    let written = bench.object(&["man", "pages"]);
    let pages = written["pages"].as_array().unwrap();
    for page in ["qcow2.1", "qcow2-snapshot-export.1", "qcow2-bitmap-merge.1"] {
        assert!(pages.iter().any(|found| found == page), "{page}");
        assert!(bench.path("pages").join(page).is_file());
    }
    assert_eq!(
        fs::read_dir(bench.path("pages")).unwrap().count(),
        pages.len()
    );
}

#[test]
fn every_shell_has_its_completions() {
    let bench = Bench::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = bench.ok(&["completions", shell]);
        assert!(script.contains("passphrase-file"), "{shell}");
    }
    bench.fails(1, &["completions", "csh"]);
}
