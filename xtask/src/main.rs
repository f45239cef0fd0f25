//! The project harness.
fn main() {}
