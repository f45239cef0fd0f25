//! Who has a cluster, where several want it.
//!
//! Only clusters with owners that may not share them are looked into. Owners come in the order of their standing, and the first one
//! has the cluster.

use std::collections::HashMap;

use crate::Structure;
use crate::image::Image;
use crate::refmap::RefMap;

/// The first owner of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// What the header or another table names. The number is a snapshot's or bitmap's.
    Meta(Structure, Option<u64>),
    /// The L2 table for this index.
    Table(u64),
    /// Data of this guest cluster.
    Data(u64),
    /// Compressed data: any number of them share a cluster.
    Packed,
}

/// How a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The claimant has the cluster, perhaps with others that may share it.
    Granted,
    /// Somebody else has it.
    Taken(Owner),
    /// The claimant may share it, but the refcount can't count that far.
    Full,
}

/// The clusters in question, and who has them.
#[derive(Debug)]
pub(super) struct Claims {
    wanted: RefMap,
    owners: HashMap<u64, (Owner, u64)>,
    refcount_max: u64,
    bits: u32,
    /// Whether a guest cluster keeps its place beside compressed data that claims it, too.
    mixed: bool,
}

impl Claims {
    /// Claims on the clusters of `wanted`. A guest cluster may stay beside compressed data, counted like it, if they may be `mixed`:
    /// then nothing is written there in place, so neither harms the other.
    pub(super) fn new(image: &Image<'_>, wanted: RefMap, mixed: bool) -> Self {
        Self {
            wanted,
            owners: HashMap::new(),
            refcount_max: image.geometry.refcount_max(),
            bits: image.cluster_bits(),
            mixed,
        }
    }

    pub(super) fn is_wanted(&self, offset: u64) -> bool {
        self.wanted.is_seen(offset >> self.bits)
    }

    /// Claims the clusters of a range with `weight` references. If any of them is taken, none is had.
    pub(super) fn claim(&mut self, offset: u64, len: u64, owner: Owner, weight: u64) -> Outcome {
        let first = offset >> self.bits;
        let last = offset.saturating_add(len.max(1) - 1) >> self.bits;
        for cluster in first..=last {
            if !self.wanted.is_seen(cluster) {
                continue;
            }
            match self.owners.get(&cluster) {
                Some((known, _)) if *known != owner && !self.may_mix(*known, owner) => {
                    return Outcome::Taken(*known);
                }
                Some((_, sum)) if sum.saturating_add(weight) > self.refcount_max => {
                    return Outcome::Full;
                }
                _ => {}
            }
        }
        for cluster in first..=last {
            if self.wanted.is_seen(cluster) {
                let entry = self.owners.entry(cluster).or_insert((owner, 0));
                entry.1 = entry.1.saturating_add(weight);
                if entry.0 == Owner::Packed {
                    // Only one guest cluster may be there beside it.
                    entry.0 = owner;
                }
            }
        }
        Outcome::Granted
    }

    fn may_mix(&self, known: Owner, owner: Owner) -> bool {
        let pair = (known, owner);
        self.mixed
            && matches!(
                pair,
                (Owner::Packed, Owner::Data(_)) | (Owner::Data(_), Owner::Packed)
            )
    }
}
