//! What a plan consists of: actions, each with its reason, its place, and what it does to the guest's data.

use std::borrow::Cow;
use std::fmt;

use crate::{ByteRange, Place};

macro_rules! kinds {
    ($( $name:ident = $id:literal, $what:literal; )*) => {
        /// What an action does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum ActionKind {
            $( #[doc = $what] $name, )*
        }

        impl ActionKind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[ $( Self::$name, )* ];

            /// The stable identifier, e.g. `DROP-L2-ENTRY`.
            pub const fn id(self) -> &'static str {
                match self { $( Self::$name => $id, )* }
            }

            /// What it does, in plain words.
            pub const fn explanation(self) -> &'static str {
                match self { $( Self::$name => $what, )* }
            }
        }
    };
}

kinds! {
    MarkCorrupt = "MARK-CORRUPT", "Sets the corrupt bit while the repair runs, so that nobody writes to the image in between.";
    MendHeader = "MEND-HEADER", "Rewrites a field or extension of the header.";
    FindHeader = "FIND-HEADER", "Makes a header from what lies in the file.";
    FindL1 = "FIND-L1", "Takes a cluster that looks like an L1 table for the active one.";
    MakeL1 = "MAKE-L1", "Makes a new L1 table of L2 tables that were found.";
    FindL2 = "FIND-L2", "Puts an L2 table back that nothing refers to.";
    FindSnapshots = "FIND-SNAPSHOTS", "Takes a cluster that looks like a snapshot table for the one that the header does not lead to.";
    DropBitmap = "DROP-BITMAP", "Drops a bitmap, or all of them.";
    MendBitmap = "MEND-BITMAP", "Marks a part of a bitmap as changed, or clears bits that mean nothing.";
    MendSnapshot = "MEND-SNAPSHOT", "Rewrites an entry of the snapshot table.";
    DropSnapshot = "DROP-SNAPSHOT", "Drops a snapshot whose tables can't be found.";
    GrowFile = "GROW-FILE", "Makes the file long enough for what it has, with zeros.";
    MendL1Entry = "MEND-L1-ENTRY", "Clears bits of an L1 entry that mean nothing.";
    DropL1Entry = "DROP-L1-ENTRY", "Clears an L1 entry that leads to no L2 table.";
    MendL2Entry = "MEND-L2-ENTRY", "Clears or sets bits of an L2 entry; its cluster stays.";
    DropL2Entry = "DROP-L2-ENTRY", "Gives up an L2 entry whose cluster can't be known or is not there.";
    CopyTable = "COPY-TABLE", "Copies a table that two owners share, for the later one.";
    CopyCluster = "COPY-CLUSTER", "Copies a cluster that two owners share, for the later one.";
    MakeRefcountTable = "MAKE-REFCOUNT-TABLE", "Makes a new refcount table at the end of the file.";
    MakeRefcountBlock = "MAKE-REFCOUNT-BLOCK", "Makes a new refcount block at the end of the file.";
    MendRefcountEntry = "MEND-REFCOUNT-ENTRY", "Corrects an entry of the refcount table.";
    KeepOrphans = "KEEP-ORPHANS", "Makes a snapshot of clusters that lost their references, so that they are neither lost nor free.";
    RaiseRefcounts = "RAISE-REFCOUNTS", "Raises refcounts that are lower than the references.";
    LowerRefcounts = "LOWER-REFCOUNTS", "Lowers refcounts that are higher than the references: leaked space is free again.";
    SetCopied = "SET-COPIED", "Corrects COPIED flags by the references.";
    ClearBits = "CLEAR-BITS", "Clears the dirty and the corrupt bit, as the last thing of all.";
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for ActionKind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

/// What an action does to the data that the guest sees, now or in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Effect {
    /// Each byte reads as before.
    None,
    /// What could not be read can be read.
    Reachable,
    /// What is there may belong to another place of the disk.
    Ambiguous,
    /// What was there can't be known; it reads as zeros, or as the backing file where nothing was mapped.
    Lost,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "no guest data affected",
            Self::Reachable => "guest data made reachable",
            Self::Ambiguous => "guest data ambiguous",
            Self::Lost => "guest data lost",
        })
    }
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct Action {
    /// What is done.
    pub kind: ActionKind,
    /// To what. Its guest range is what [`effect`](field@Self::effect) speaks of.
    pub place: Place,
    /// Why, and with which values.
    pub reason: Cow<'static, str>,
    /// Other guest ranges that the effect speaks of: those of who shares the cluster.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Vec::is_empty"))]
    pub also: Vec<ByteRange>,
    /// How many entries or clusters it stands for; at least 1.
    pub count: u64,
    /// Bytes of the file that are changed, as far as they are told one by one: see [`Plan::writes`](super::Plan::writes) for all.
    pub changes: Vec<ByteRange>,
    /// What becomes of guest data.
    pub effect: Effect,
}

impl Action {
    pub(super) fn new(
        kind: ActionKind,
        place: Place,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            kind,
            place,
            reason: reason.into(),
            also: Vec::new(),
            count: 1,
            changes: Vec::new(),
            effect: Effect::None,
        }
    }

    pub(super) fn effect(mut self, effect: Effect) -> Self {
        self.effect = effect;
        self
    }

    pub(super) fn also(mut self, guests: Vec<ByteRange>) -> Self {
        self.also = guests;
        self
    }

    pub(super) fn times(mut self, count: u64) -> Self {
        self.count = count;
        self
    }

    pub(super) fn changes(mut self, start: u64, len: u64) -> Self {
        self.changes.push(ByteRange::new(start, len));
        self
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.kind, self.place, self.reason)?;
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        if self.effect != Effect::None {
            write!(f, " [{}]", self.effect)?;
        }
        Ok(())
    }
}

/// Actions in their order; of each kind only so many one by one.
#[derive(Debug)]
pub(super) struct Actions {
    list: Vec<Action>,
    limit: usize,
    of_kind: Vec<usize>,
}

impl Actions {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            list: Vec::new(),
            limit: limit.max(1),
            of_kind: vec![0; ActionKind::ALL.len()],
        }
    }

    pub(super) fn add(&mut self, action: Action) {
        let Some(of_kind) = self.of_kind.get_mut(action.kind as usize) else {
            return;
        };
        *of_kind += 1;
        if *of_kind <= self.limit {
            self.list.push(action);
            return;
        }
        // The last one of its kind stands for all that follow.
        let mut list = self.list.iter_mut().rev();
        if let Some(last) = list.find(|known| known.kind == action.kind) {
            last.count = last.count.saturating_add(action.count);
            last.effect = last.effect.max(action.effect);
        }
    }

    pub(super) fn has(&self, kind: ActionKind) -> bool {
        self.of_kind.get(kind as usize).is_some_and(|n| *n > 0)
    }

    pub(super) fn len(&self) -> usize {
        self.of_kind.iter().sum()
    }

    pub(super) fn finish(self) -> Vec<Action> {
        self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Structure;

    #[test]
    fn what_is_beyond_the_limit_is_counted() {
        let mut actions = Actions::new(2);
        for at in 0..5 {
            let place = Place::of(Structure::L2Table).entry(at);
            let action = Action::new(ActionKind::DropL2Entry, place, "gone").effect(Effect::Lost);
            actions.add(action.times(2));
        }
        let list = actions.finish();
        assert_eq!(list.len(), 2);
        assert_eq!((list[0].count, list[1].count), (2, 8));
        assert_eq!(
            list[0].to_string(),
            "DROP-L2-ENTRY L2 table entry 0: gone (2 times) [guest data lost]"
        );
    }

    #[test]
    fn identifiers_are_unique() {
        let mut ids: Vec<_> = ActionKind::ALL.iter().map(|kind| kind.id()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), ActionKind::ALL.len());
    }
}
