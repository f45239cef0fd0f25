//! Programs on images in memory. Longer runs: `cargo xtask soak --without-qemu`.

use qcow2_image::testing::{Program, RealEngine, Scale, run_in_memory};

#[test]
fn small_disks_hold_what_was_written() {
    for seed in 0..300 {
        let program = Program::random(seed, Scale::Small, false);
        run_in_memory(&RealEngine::default(), &program)
            .map_err(|failure| failure.during(format_args!("seed {seed}")))
            .unwrap();
    }
}

#[test]
fn large_disks_hold_what_was_written() {
    for seed in 1000..1040 {
        let program = Program::random(seed, Scale::Full, false);
        run_in_memory(&RealEngine::default(), &program)
            .map_err(|failure| failure.during(format_args!("seed {seed}")))
            .unwrap();
    }
}
