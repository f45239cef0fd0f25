//! Chains: rebase, commit and differences, beside plain bytes and beside QEMU.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// Random chains, and what their disks hold.
mod rig;

/// What comes of it, beside plain bytes.
mod model;

/// Layers of special kinds.
mod kinds;

/// Work that is cut short, by a crash at any moment or by any single fault.
mod cut_short;

/// The same of exports.
mod cut_export;

/// Work that is not to go faster than someone says.
mod held_back;

/// The same beside qemu-img.
mod oracle;
