//! Fuzz target: repair of a whole image, and the way back.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_check::fuzzing::repair(data));

#[cfg(not(fuzzing))]
fn main() {}
