//! What metadata there is, and which of it is watched.

use std::fmt;
use std::ops::{BitOr, Not};

/// A set of kinds of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Kinds(u16);

macro_rules! kinds {
    ($($(#[$doc:meta])* $bit:literal $name:ident $option:literal $words:literal,)+) => {
        impl Kinds {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)+

            /// Every kind with the name of its switch.
            pub const NAMED: &'static [(&'static str, Self)] = &[$(($option, Self::$name),)+];

            /// What the kinds are called, for messages.
            fn words(self) -> impl Iterator<Item = &'static str> {
                [$((Self::$name, $words),)+]
                    .into_iter()
                    .filter(move |(kind, _)| self.intersects(*kind))
                    .map(|(_, words)| words)
            }
        }
    };
}

kinds! {
    /// The first cluster.
    0 MAIN_HEADER "main-header" "the header",
    /// The active L1 table.
    1 ACTIVE_L1 "active-l1" "the active L1 table",
    /// L2 tables of the active L1 table.
    2 ACTIVE_L2 "active-l2" "an active L2 table",
    /// Refcount blocks.
    3 REFCOUNT_BLOCK "refcount-block" "a refcount block",
    /// The refcount table.
    4 REFCOUNT_TABLE "refcount-table" "the refcount table",
    /// The snapshot table.
    5 SNAPSHOT_TABLE "snapshot-table" "the snapshot table",
    /// L1 tables of snapshots.
    6 INACTIVE_L1 "inactive-l1" "an L1 table of a snapshot",
    /// L2 tables of snapshots.
    7 INACTIVE_L2 "inactive-l2" "an L2 table of a snapshot",
    /// The bitmap directory.
    8 BITMAP_DIRECTORY "bitmap-directory" "the bitmap directory",
    /// Tables of bitmaps.
    9 BITMAP_TABLE "bitmap-table" "a bitmap table",
    /// Data of bitmaps.
    10 BITMAP_DATA "bitmap-data" "bitmap data",
    /// The LUKS header and its key material.
    11 CRYPTO_HEADER "crypto-header" "the encryption header",
}

impl Kinds {
    /// None.
    pub const NONE: Self = Self(0);
    /// All.
    pub const ALL: Self = Self((1 << 12) - 1);

    /// The bits.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The set with these bits; others are dropped.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & Self::ALL.0)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the two have a kind in common.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The kinds of both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The kinds of this that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Kinds {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Not for Kinds {
    type Output = Self;

    fn not(self) -> Self {
        Self::ALL.without(self)
    }
}

impl fmt::Debug for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::NAMED
            .iter()
            .filter(|(_, kind)| self.intersects(*kind))
            .map(|(name, _)| *name);
        f.debug_set().entries(names).finish()
    }
}

impl fmt::Display for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, words) in self.words().enumerate() {
            if index > 0 {
                f.write_str(" and ")?;
            }
            f.write_str(words)?;
        }
        Ok(())
    }
}

/// Which kinds every write is tested against: a template, and switches for single kinds on top of it.
///
/// The default is all of them. The templates `constant`, `cached` and `all` hold what QEMU's hold and, since it costs nothing
/// here, the kinds that QEMU doesn't watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapChecks {
    template: Template,
    on: Kinds,
    off: Kinds,
}

/// A named choice of kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Template {
    /// Nothing is tested.
    None,
    /// What lies in fixed places.
    Constant,
    /// What QEMU knows without asking the disk.
    Cached,
    /// Everything.
    #[default]
    All,
}

impl Template {
    /// The template of that name: `none`, `constant`, `cached` or `all`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "constant" => Self::Constant,
            "cached" => Self::Cached,
            "all" => Self::All,
            _ => return None,
        })
    }

    fn kinds(self) -> Kinds {
        let beyond_qemu = Kinds::BITMAP_TABLE | Kinds::BITMAP_DATA | Kinds::CRYPTO_HEADER;
        match self {
            Self::None => Kinds::NONE,
            Self::Constant => {
                Kinds::MAIN_HEADER
                    | Kinds::ACTIVE_L1
                    | Kinds::REFCOUNT_TABLE
                    | Kinds::SNAPSHOT_TABLE
                    | Kinds::BITMAP_DIRECTORY
                    | beyond_qemu
            }
            Self::Cached => Kinds::ALL.without(Kinds::INACTIVE_L2),
            Self::All => Kinds::ALL,
        }
    }
}

impl Default for OverlapChecks {
    fn default() -> Self {
        Self::template(Template::All)
    }
}

impl OverlapChecks {
    /// The kinds of a template.
    pub const fn template(template: Template) -> Self {
        Self {
            template,
            on: Kinds::NONE,
            off: Kinds::NONE,
        }
    }

    /// The same with some kinds switched on or off.
    #[must_use]
    pub fn with(mut self, kinds: Kinds, on: bool) -> Self {
        if on {
            self.on = self.on | kinds;
            self.off = self.off.without(kinds);
        } else {
            self.off = self.off | kinds;
            self.on = self.on.without(kinds);
        }
        self
    }

    /// The same with the switch of that name, as in QEMU's `overlap-check.NAME`; `None` if there is no such switch.
    #[must_use]
    pub fn switch(self, name: &str, on: bool) -> Option<Self> {
        let (_, kind) = Kinds::NAMED.iter().find(|(known, _)| *known == name)?;
        Some(self.with(*kind, on))
    }

    /// The kinds that are tested for.
    pub fn kinds(self) -> Kinds {
        (self.template.kinds() | self.on).without(self.off)
    }
}
