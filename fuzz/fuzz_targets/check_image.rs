//! Fuzz target: check and audit of a whole image.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_check::fuzzing::image(data));

#[cfg(not(fuzzing))]
fn main() {}
