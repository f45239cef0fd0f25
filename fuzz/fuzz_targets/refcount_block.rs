//! Fuzz target: refcount blocks of every width.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_format::fuzzing::refcount_block(data));

#[cfg(not(fuzzing))]
fn main() {}
