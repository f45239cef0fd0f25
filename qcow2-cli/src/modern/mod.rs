//! TODO
use std::ffi::OsString;
use std::process::ExitCode;

use crate::Console;

/// Runs a command line, the program's name first.
pub fn main(_args: &[OsString], console: &Console) -> ExitCode {
    crate::complain!(console, "nothing here");
    ExitCode::FAILURE
}
