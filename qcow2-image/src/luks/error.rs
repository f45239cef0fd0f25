use std::time::Duration;

use qcow2_format::LuksError as HeaderError;
use qcow2_io::StorageError;
use qcow2_io::cipher::CipherError;

/// Why an area can't be made, opened or changed. Slots count from 0. Never shows a key or a passphrase.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LuksError {
    /// The header is damaged, or can't be built.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The header, or the options for a new one, name what is unknown or does not go together.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// Header or key material reach beyond the area.
    #[error("LUKS header or key material end at {end:#x} of an area of {len:#x} bytes")]
    BeyondArea {
        /// Byte behind them, from the start of the area.
        end: u64,
        /// Bytes of the area.
        len: u64,
    },
    /// Header or key material reach beyond the file.
    #[error("LUKS header or key material end at {end:#x} of a file of {len:#x} bytes")]
    BeyondFile {
        /// Byte behind them.
        end: u64,
        /// Bytes of the file, or what a file can have.
        len: u64,
    },
    /// Trying a passphrase would take longer than the caller allows.
    #[error(
        "trying a passphrase takes {needed} rounds of PBKDF2, the limit is {limit}; a work limit of {needed} allows it, for an image that is trusted"
    )]
    TooMuchWork {
        /// Rounds that the header asks for: iterations times blocks of the hash, of all slots to be tried.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// No passphrase opens the disk.
    #[error("no key slot is active, nothing can open the disk")]
    NoActiveSlot,
    /// The passphrase opens no slot.
    #[error("the passphrase opens no key slot")]
    WrongPassphrase,
    /// The disk was unlocked elsewhere, or is encrypted anew since.
    #[error("the area has another master key than the one that was unlocked")]
    OtherKey,
    /// A slot that no area has.
    #[error("there is no key slot {slot}, slots are 0 to 7")]
    NoSuchSlot {
        /// The slot asked for.
        slot: u8,
    },
    /// A passphrase would be lost.
    #[error("key slot {slot} is active and is overwritten only by force")]
    SlotActive {
        /// The slot.
        slot: u8,
    },
    /// There is nothing to erase.
    #[error("key slot {slot} is not active")]
    SlotInactive {
        /// The slot.
        slot: u8,
    },
    /// The disk could never be read again.
    #[error(
        "key slot {slot} is the only active one; without it nobody can read the disk, so it is erased only by force"
    )]
    LastSlot {
        /// The slot.
        slot: u8,
    },
    /// The disk could never be read again.
    #[error(
        "the passphrase opens all active key slots; without them nobody can read the disk, so they are erased only by force"
    )]
    AllSlotsMatch,
    /// The passphrase to be erased is in no slot.
    #[error("the old passphrase opens no key slot")]
    NoSlotMatches,
    /// The slot to be erased holds something else.
    #[error("the old passphrase does not open key slot {slot}")]
    SlotOfOther {
        /// The slot.
        slot: u8,
    },
    /// All eight are in use.
    #[error("all key slots are active")]
    NoFreeSlot,
    /// An option that LUKS doesn't have.
    #[error("unknown option {option:?}")]
    UnknownOption {
        /// Its name.
        option: String,
    },
    /// A generator of vectors that nobody knows.
    #[error("ivgen-alg is {value:?}, known are plain, plain64 and essiv")]
    UnknownVectors {
        /// The value.
        value: String,
    },
    /// Something that is no number.
    #[error("iter-time is {value:?}, that is no number of milliseconds")]
    NotATime {
        /// The value.
        value: String,
    },
    /// More iterations than a header can express.
    #[error("a time of {time:?} needs more iterations than a header can hold")]
    TooMuchTime {
        /// The time.
        time: Duration,
    },
    /// The storage failed.
    #[error("could not {action}")]
    Storage {
        /// What was about to be done.
        action: &'static str,
        /// Why it failed.
        source: StorageError,
    },
}

/// What a caller may do about a [`LuksError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LuksErrorKind {
    /// The area is damaged: nothing.
    Damaged,
    /// The area or the options ask for what this crate doesn't have.
    Unsupported,
    /// Raise the work limit, if the image is trusted.
    TooMuchWork,
    /// Ask for another passphrase.
    WrongPassphrase,
    /// Force it, or leave it.
    Refused,
    /// Ask for something else.
    Invalid,
    /// The storage failed.
    Storage,
}

impl LuksError {
    /// What a caller may do about it.
    pub const fn kind(&self) -> LuksErrorKind {
        match self {
            Self::Header(_)
            | Self::BeyondArea { .. }
            | Self::BeyondFile { .. }
            | Self::NoActiveSlot => LuksErrorKind::Damaged,
            Self::Cipher(_) => LuksErrorKind::Unsupported,
            Self::TooMuchWork { .. } => LuksErrorKind::TooMuchWork,
            Self::WrongPassphrase | Self::NoSlotMatches | Self::SlotOfOther { .. } => {
                LuksErrorKind::WrongPassphrase
            }
            Self::SlotActive { .. }
            | Self::SlotInactive { .. }
            | Self::LastSlot { .. }
            | Self::AllSlotsMatch => LuksErrorKind::Refused,
            Self::OtherKey
            | Self::NoSuchSlot { .. }
            | Self::NoFreeSlot
            | Self::UnknownOption { .. }
            | Self::UnknownVectors { .. }
            | Self::NotATime { .. }
            | Self::TooMuchTime { .. } => LuksErrorKind::Invalid,
            Self::Storage { .. } => LuksErrorKind::Storage,
        }
    }

    /// Makes the storage's error one of ours, by what was about to be done.
    pub(super) fn while_trying(action: &'static str) -> impl FnOnce(StorageError) -> Self {
        move |source| Self::Storage { action, source }
    }
}
