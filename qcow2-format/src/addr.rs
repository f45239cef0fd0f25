//! Address spaces, kept apart by type.
//!
//! A guest offset is a position in the virtual disk, a host offset one in the image file (or in the external data file
//! where that is said). Offsets are bytes and print in hexadecimal; cluster numbers print in decimal. Arithmetic is
//! checked: whatever is added, an image may have chosen.

use core::fmt;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Offset of `bytes` bytes from the start.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The offset in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The offset `bytes` further on, or `None` where 64 bits don't hold it.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Whether the offset is a multiple of `unit`, a power of two.
            pub const fn is_aligned_to(self, unit: u64) -> bool {
                self.0 & unit.wrapping_sub(1) == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

macro_rules! cluster {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// The cluster numbered `index`, counted from 0.
            pub const fn new(index: u64) -> Self {
                Self(index)
            }

            /// The cluster's number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The cluster `count` further on, or `None` where 64 bits don't hold it.
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

offset! {
    /// Byte position in the virtual disk, as the guest sees it.
    GuestOffset
}
offset! {
    /// Byte position in the image file, or in the external data file for guest data that lies there.
    HostOffset
}
cluster! {
    /// Number of a cluster of the virtual disk.
    GuestCluster
}
cluster! {
    /// Number of a cluster of the image file.
    HostCluster
}
