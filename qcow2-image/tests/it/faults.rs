//! Each storage operation fails in turn. Longer runs: `cargo xtask soak --faults`.

use qcow2_image::testing::{FaultRuns, Program, RealEngine, Scale, in_memory};

#[test]
fn no_single_fault_corrupts_or_is_kept_quiet() {
    let engine = RealEngine::default();
    let mut met = 0;
    for seed in 0..12 {
        let program = Program::random(seed, Scale::Small, false);
        let files = in_memory(&engine, &program.shape, None).unwrap();
        let runs = FaultRuns::new(&engine, &program, &files).unwrap();
        for case in runs.cases().unwrap() {
            let run = runs.run(case);
            let during = |failure: qcow2_image::testing::Failure| {
                failure.during(format_args!("seed {seed}, {case}"))
            };
            met += usize::from(run.map_err(during).unwrap());
        }
    }
    assert!(met > 500, "only {met} faults were met");
}
