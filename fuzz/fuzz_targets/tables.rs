//! Fuzz target: snapshot table and bitmap directory.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_format::fuzzing::tables(data));

#[cfg(not(fuzzing))]
fn main() {}
