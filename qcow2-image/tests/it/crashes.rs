//! Images as a crash may leave them. Longer runs: `cargo xtask crash`.

use qcow2_image::Rules;
use qcow2_image::testing::{Failure, Program, RealEngine, Scale, crash_states, in_memory};

/// States looked at for each program.
const STATES: usize = 60;

/// Runs the programs until one fails; gives the number of states.
fn run(rules: Rules, seeds: std::ops::Range<u64>) -> Result<usize, Failure> {
    let engine = RealEngine { rules };
    let mut states = 0;
    for seed in seeds {
        let program = Program::random(seed, Scale::Small, false);
        let files = in_memory(&engine, &program.shape, None)?;
        states += crash_states(&engine, &program, &files, STATES)
            .map_err(|failure| failure.during(format_args!("seed {seed}")))?;
    }
    Ok(states)
}

/// A program must come to grief without the rule, and not with it.
fn assert_noticed(rules: Rules) {
    assert_ne!(rules, Rules::ALL);
    let noticed = |seed: u64| run(rules, seed..seed + 1).is_err();
    let seed = (0..300).find(|seed| noticed(*seed));
    let seed = seed.expect("no program needs the rule");
    run(Rules::ALL, seed..seed + 1).unwrap();
}

#[test]
fn no_crash_corrupts_or_loses_what_was_flushed() {
    assert!(run(Rules::ALL, 0..40).unwrap() > 1000);
}

#[test]
fn refcounts_must_be_raised_before_pointers() {
    assert_noticed(Rules {
        refcount_before_pointer: false,
        ..Rules::ALL
    });
}

#[test]
fn data_must_be_there_before_pointers() {
    assert_noticed(Rules {
        data_before_pointer: false,
        ..Rules::ALL
    });
}

#[test]
fn clusters_must_be_released_after_pointers_are_gone() {
    assert_noticed(Rules {
        release_after_pointer: false,
        ..Rules::ALL
    });
}

#[test]
fn roots_must_switch_last() {
    assert_noticed(Rules {
        root_last: false,
        ..Rules::ALL
    });
}

#[test]
fn a_flush_must_cover_everything() {
    assert_noticed(Rules {
        flush_is_complete: false,
        ..Rules::ALL
    });
}

#[test]
fn the_dirty_bit_must_be_set_first() {
    assert_noticed(Rules {
        dirty_bit_first: false,
        ..Rules::ALL
    });
}
