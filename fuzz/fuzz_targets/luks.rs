//! Fuzz target: LUKS header.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_format::fuzzing::luks(data));

#[cfg(not(fuzzing))]
fn main() {}
