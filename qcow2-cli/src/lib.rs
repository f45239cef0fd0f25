//! The `qcow2` program: work on disk images, and a drop-in for `qemu-img` and `qemu-io`.
//!
//! [`run`] looks at the name the program was called by. [`img`] and [`io`] take the command lines of those tools and print what they
//! print, and open disks through [`node`]; [`modern`] is the program's own, [`audit`] what it says about the state of images. All speak
//! through a [`Console`].
#![forbid(unsafe_code)]

pub mod audit;
mod console;
pub mod img;
pub mod io;
mod mend;
pub mod modern;
pub mod node;
mod objects;
pub mod words;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

pub use console::Console;
pub use objects::{ObjectError, Objects};

/// Runs the program with a whole command line, the program's name first.
pub fn run(args: &[OsString]) -> ExitCode {
    let name = args.first().map(Path::new).and_then(Path::file_name);
    let called = args
        .first()
        .map_or("qcow2".into(), |arg| arg.to_string_lossy());
    let console = Console::new(called);
    let code = match name.and_then(|name| name.to_str()) {
        Some(name) if name.starts_with("qemu-img") => img::main(args, &console),
        Some(name) if name.starts_with("qemu-io") => io::main(args, &console),
        _ => modern::main(args, &console),
    };
    console.flush();
    code
}
