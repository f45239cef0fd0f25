//! What the crate promises, from outside.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]
#![expect(clippy::print_stderr, reason = "a test that is skipped says so")]

/// Ciphers and keys, against images of QEMU's.
#[cfg(feature = "encryption")]
mod cipher;
/// Decoders of compressed clusters, against QEMU's.
#[cfg(all(feature = "zlib", feature = "zstd"))]
mod codec;
/// Every backend and wrapper passes the contract's suite.
mod conformance;
/// Block devices, where the machine lets us make one.
mod device;
/// Opening: what is refused, what is created, what a file tells about itself.
mod file;
/// Locks, between handles of this crate and against a running QEMU.
mod lock;
/// Random programs on every backend, judged by a vector of bytes.
mod model;

/// Files whose batches go through io_uring.
#[cfg(feature = "io-uring")]
mod uring;

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use qcow2_io::{FileOptions, StorageErrorKind};

/// Whether the file system of temporary files does direct I/O; says so once if not.
fn direct_io_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions::new().write(true).create(true).direct(true);
        match options.open(dir.path().join("probe")) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}");
                eprintln!("SKIPPED: {error}");
                false
            }
        }
    })
}

/// Whether QEMU's tools are here; a machine that judges commits must have them.
fn qemu_is_here() -> bool {
    let here = ["qemu-img", "qemu-io"].iter().all(|tool| {
        let mut command = Command::new(tool);
        command.arg("--version").stdout(Stdio::null());
        command.status().is_ok()
    });
    if !here {
        let required = ["QCOW2_REQUIRE_QEMU", "CI"]
            .iter()
            .any(|name| std::env::var_os(name).is_some());
        assert!(!required, "the environment requires qemu-img and qemu-io");
        eprintln!("SKIPPED: no qemu-img or no qemu-io on this machine");
    }
    here
}
