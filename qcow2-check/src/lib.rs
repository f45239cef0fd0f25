//! Is a qcow2 image consistent?
//!
//! [`check`] reads an image's metadata, in parallel and through nothing but [`Storage`](qcow2_io::Storage), and gives a
//! [`Report`]: the counts and the verdict of `qemu-img check`, and findings that go beyond it. [`audit`] adds what is
//! dangerous about an image. Neither opens what an image names, nor writes, nor trusts a field: time and memory follow
//! what the file holds, not what it claims. [`repair`] plans what would put an image right, and does it with a way back.
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod audit;
mod bitmaps;
mod blocks;
pub mod chain;
mod check;
mod code;
mod compare;
mod copied;
mod crypto;
mod deep;
mod finding;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod load;
mod owners;
mod reader;
mod recount;
mod references;
mod refmap;
pub mod repair;
mod report;
mod run;
mod snapshots;
#[cfg(any(test, feature = "test-utils"))]
pub mod synth;
mod threads;
mod units;
mod walk;

pub use check::{audit, check};
pub use code::Code;
pub use finding::{ByteRange, Finding, Place, Severity, Structure};
pub use owners::{ClusterOwners, Owner, owners};
pub use recount::{CopiedDifference, Recount, RecountError, RefcountDifference, recount};
pub use report::{Counts, Report, Verdict};
pub use run::{Monitor, Options, Phase};

pub(crate) use run::Run;
