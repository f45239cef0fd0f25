//! Fuzz target: LUKS areas opened and changed.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_image::fuzzing::luks_open(data));

#[cfg(not(fuzzing))]
fn main() {}
