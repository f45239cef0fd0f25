//! One program with three faces: which one it shows depends on the name it is called by.
#![forbid(unsafe_code)]

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().collect();
    qcow2_cli::run(&args)
}
