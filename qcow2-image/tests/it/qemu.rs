//! Programs beside QEMU. Longer runs: `cargo xtask soak`.

use std::path::Path;

use qcow2_image::testing::{
    Failure, Program, RealEngine, Scale, live, qemu, run_beside_qemu, run_by_qemu,
};

/// Whether the tools are there. If not, says so; where they are required, fails.
pub(crate) fn is_available(what: &str) -> bool {
    if qemu::is_available() {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(!required, "qemu-img and qemu-io not found, but required");
    eprintln!("skipped {what}: qemu-img and qemu-io not found");
    false
}

fn run_all(
    seeds: std::ops::Range<u64>,
    run: impl Fn(&RealEngine, &Program, &Path) -> Result<(), Failure>,
) {
    for seed in seeds {
        let folder = tempfile::tempdir().unwrap();
        let program = Program::random(seed, Scale::Full, true);
        run(&RealEngine::default(), &program, folder.path())
            .map_err(|failure| failure.during(format_args!("seed {seed}")))
            .unwrap();
    }
}

#[test]
fn what_is_written_here_qemu_reads() {
    if is_available("24 programs beside QEMU") {
        run_all(2000..2024, |engine, program, folder| {
            run_beside_qemu(engine, program, folder)
        });
    }
}

#[test]
fn what_qemu_writes_is_read_here() {
    if is_available("16 programs played by QEMU") {
        run_all(3000..3016, |engine, program, folder| {
            run_by_qemu(engine, program, folder)
        });
    }
}

#[test]
fn lives_go_on_whoever_does_the_next_deed() {
    if is_available("12 lives") {
        for seed in 1..13 {
            let folder = tempfile::tempdir().unwrap();
            live(seed, 12, folder.path()).unwrap();
        }
    }
}
