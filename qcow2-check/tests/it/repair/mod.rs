//! Repairs, judged by both checkers, by what a guest reads, and beside `qemu-img check -r all`.

/// What a guest can read.
mod guest;

/// Every damage of the corpus, repaired by both: what differs, and why.
mod beside;

/// Damage that QEMU can't repair, each with its result beside ours.
mod classes;

/// Repairs that are cut short.
mod crashes;

/// Single fields of the header.
mod header;

/// Every damage of the mutant corpus, repaired.
mod mutants;

/// Snapshot tables that are incomplete, or go beyond the limits.
mod snapshot_tables;
