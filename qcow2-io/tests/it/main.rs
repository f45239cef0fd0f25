//! What the crate promises, from outside.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]
#![expect(clippy::print_stderr, reason = "a test that is skipped says so")]

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
