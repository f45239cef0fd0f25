//! Finding what nothing refers to: header, L1 tables, L2 tables.
//!
//! What is found is ranked by evidence, and the best is taken. A guess that is wrong costs nothing that was there: it only says what
//! free, unreferenced clusters mean, and the undo file has the rest.

mod header;
mod l1;
mod scan;
mod snapshots;
mod tables;

pub(super) use header::find as header;
pub(super) use l1::find as l1;
pub(super) use l1::find_another as another_l1;
pub(super) use l1::is_sound as leads_to_l1;
pub(super) use snapshots::find as snapshots;
pub(super) use snapshots::plausible as plausible_snapshots;
pub(super) use tables::find as tables;
