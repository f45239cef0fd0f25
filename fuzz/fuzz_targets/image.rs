//! Fuzz target: requests on a whole image.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_image::fuzzing::image(data));

#[cfg(not(fuzzing))]
fn main() {}
