//! Repairs, judged by both checkers, by what a guest reads, and beside `qemu-img check -r all`.

/// Refcount structures made anew where QEMU makes them.
mod anew;

/// What a guest can read.
mod guest;

/// What a plan calls ambiguous, and where.
mod ambiguous;

/// Every damage of the corpus, repaired by both: what differs, and why.
mod beside;

/// Damage that QEMU can't repair, each with its result beside ours.
mod classes;

/// Repairs that are cut short.
mod crashes;

/// Single fields of the header.
mod header;

/// The area of LUKS keys.
mod key_area;

/// Encrypted clusters, with the key and without.
mod keys;

/// Every damage of the mutant corpus, repaired.
mod mutants;

/// Snapshot tables that are incomplete, or go beyond the limits.
mod snapshot_tables;

/// Sectors that can't be read.
mod unreadable;
