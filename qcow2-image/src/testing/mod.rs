//! The harness: random programs on disks, and judges that share nothing with the engine.
//!
//! A [`Program`] is an image of some [`Shape`] and a sequence of [`Action`]s, all from one seed. A [`Player`] plays it on an open
//! image, with a [`Ledger`] of plain bytes beside it. On that stand the runs: beside QEMU ([`run_beside_qemu`], [`run_by_qemu`]) or
//! alone ([`run_in_memory`]), with a crash at any moment ([`crash_states`]), with any operation of the storage failing
//! ([`FaultRuns`]). A run that fails is made small by [`shrink`]. What is done to an image as a whole comes in [`lives`](live), and
//! is cut short by [`Record`] and [`strike_everywhere`].
#![expect(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what goes wrong in a test may end it"
)]

mod action;
mod content;
mod crash;
mod cut;
mod differential;
mod engine;
mod failure;
mod faults;
mod files;
mod ledger;
mod life;
mod lifeline;
mod play;
mod prepare;
pub mod qemu;
mod random;
mod real;
mod shape;
mod shrink;
mod snapshots;

#[cfg(test)]
mod tests;

pub use action::{Action, Program};
pub use content::{Content, origin_of};
pub use crash::{Entry, Moment, Overlay, Tape, crash_states};
pub use cut::{Crash, Record, Strike, damage, strike_everywhere};
pub use differential::{run_beside_qemu, run_by_qemu, run_in_memory};
pub use engine::{Engine, Refusal, Subject, Tolerance};
pub use failure::Failure;
pub use faults::{FaultCase, FaultRuns};
pub use files::{Files, First};
pub use ledger::{Effect, Ledger, State, View};
pub use life::live;
pub use play::{Manner, Player};
pub use prepare::{in_folder, in_memory};
pub use random::Random;
pub use real::RealEngine;
pub use shape::{
    CacheSize, DataFile, Encryption, Format, Layer, Origin, Scale, Shape, Step, Tuning,
};
pub use shrink::{catch, shrink, silence_panics};
pub use snapshots::compare_snapshots;
