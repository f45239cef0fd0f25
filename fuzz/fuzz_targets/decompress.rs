//! Fuzz target: compressed clusters, both codecs and both directions.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_io::codec::fuzzing::decompress(data));

#[cfg(not(fuzzing))]
fn main() {}
