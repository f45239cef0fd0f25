use super::{Algorithm, Hash, Mode};

/// Why there is no such cipher, or why it can't do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CipherError {
    /// No algorithm, mode, IV generator or hash of that name is known here.
    #[error("unknown {what} {name:?}")]
    UnknownName {
        /// What the name was meant for: `cipher`, `cipher mode`, `IV generator` or `hash`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The cipher has no variant with keys of this length.
    #[error("no {name} cipher in {mode} mode has a key of {len} bytes")]
    NoSuchKeyLength {
        /// The cipher's name.
        name: String,
        /// The mode.
        mode: Mode,
        /// Bytes of the key, of both its halves for XTS.
        len: usize,
    },
    /// The key is not as long as the algorithm and mode want it.
    #[error("{algorithm} in {mode} mode needs a key of {expected} bytes, not {found}")]
    KeyLength {
        /// The algorithm.
        algorithm: Algorithm,
        /// The mode.
        mode: Mode,
        /// Bytes that it needs.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// XTS is defined for blocks of 16 bytes only.
    #[error("xts mode needs blocks of 16 bytes; those of {algorithm} have {found}")]
    BlockLength {
        /// The algorithm.
        algorithm: Algorithm,
        /// Bytes of its blocks.
        found: usize,
    },
    /// ESSIV uses a digest as a key, and the cipher has no variant with keys of that length.
    #[error("essiv with {hash} needs a key of {len} bytes, which {name} doesn't have")]
    EssivDigest {
        /// The cipher's name.
        name: &'static str,
        /// The hash.
        hash: Hash,
        /// Bytes of its digests.
        len: usize,
    },
    /// The IV generator `essiv` was named without a hash.
    #[error("the IV generator essiv needs a hash, as in essiv:sha256")]
    EssivWithoutHash,
    /// Only whole sectors can be enciphered.
    #[error("{len} bytes are not whole sectors of 512 bytes")]
    PartialSector {
        /// Bytes that were given.
        len: usize,
    },
    /// The sectors go on past the largest sector number.
    #[error("{count} sectors from number {first} on have no number in 64 bits")]
    SectorNumber {
        /// The first sector.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Key material is no whole number of stripes of the key's length, or of none.
    #[error("key material of {found} bytes is not {stripes} stripes of {key_len} bytes")]
    Stripes {
        /// Bytes of the material.
        found: usize,
        /// Bytes of the key.
        key_len: usize,
        /// How many stripes there should be.
        stripes: u32,
    },
    /// The system has no random bytes for us.
    #[error("the system gives no random bytes: {reason}")]
    NoRandomness {
        /// What it says.
        reason: String,
    },
}
