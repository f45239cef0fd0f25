//! How compressed clusters are coded.
//!
//! A compressed cluster is a stream that gives one cluster, inside a window of whole sectors whose exact end nobody noted:
//! what follows the stream is padding or the next cluster. So a decoder here is told how much to produce, and stops there.
//! An encoder gives one stream that says where it ends, or none when it would be no shorter than the cluster.

#[cfg(feature = "zlib")]
mod deflate;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg(all(feature = "zlib", feature = "zstd"))]
#[doc(hidden)]
pub mod fuzzing;
mod level;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

#[cfg(any(feature = "zlib", feature = "zstd"))]
use std::cell::RefCell;
use std::fmt;
#[cfg(any(feature = "zlib", feature = "zstd"))]
use std::thread::LocalKey;

pub use level::Level;

/// A way to compress clusters.
///
/// The names are always there; whether a build can code them is a matter of its features `zlib` and `zstd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Raw deflate streams, without the header and checksum of a zlib file; called zlib by all tools.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Why a stream gives no cluster, or a cluster can't be compressed as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The codec was left out of this build.
    #[error("this build can't do {codec} compression: it was made without the feature `{codec}`")]
    Unavailable {
        /// Which one.
        codec: Codec,
    },
    /// The stream, or the window it lies in, ends before the cluster is complete.
    #[error("the {codec} stream ends after {found} of {expected} bytes")]
    EndsEarly {
        /// Which codec.
        codec: Codec,
        /// Bytes that were decoded; of zstd, bytes of whole frames.
        found: usize,
        /// Bytes of a cluster.
        expected: usize,
    },
    /// The stream goes on where the cluster is complete, and the codec doesn't allow that.
    #[error("the {codec} stream goes on past the {expected} bytes of a cluster")]
    TooLong {
        /// Which codec.
        codec: Codec,
        /// Bytes of a cluster.
        expected: usize,
    },
    /// The bytes are no such stream.
    #[error("the {codec} stream is damaged: {reason}")]
    Damaged {
        /// Which codec.
        codec: Codec,
        /// What the decoder says.
        reason: &'static str,
    },
    /// The process can't have the memory that coding needs: some hundred KiB, at high levels of zstd some ten MiB.
    #[error("no memory for {codec} compression")]
    NoMemory {
        /// Which codec.
        codec: Codec,
    },
    /// The encoder fails for a reason that lies in it alone.
    #[error("the {codec} encoder fails: {reason}")]
    Encoder {
        /// Which codec.
        codec: Codec,
        /// What the encoder says.
        reason: &'static str,
    },
    /// The codec has no such level.
    #[error("{codec} has no compression level {found}: it goes from {min} to {max}")]
    Level {
        /// Which codec.
        codec: Codec,
        /// What was asked for.
        found: i32,
        /// The lowest level there is.
        min: i32,
        /// The highest level there is.
        max: i32,
    },
}

impl Codec {
    /// Whether this build can encode and decode it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Zlib => cfg!(feature = "zlib"),
            Self::Zstd => cfg!(feature = "zstd"),
        }
    }

    /// Fills `out`, one cluster, from the stream that `input` starts with. What `input` holds behind the stream is ignored.
    ///
    /// A deflate stream may go on past the cluster, and needs no end; back-references reach 32 KiB whatever the writer's
    /// window was. Zstandard frames must end where the cluster does, may be several, skippable ones among them, and may
    /// claim any window: none is allocated. Memory doesn't depend on the input. Each thread keeps a decoder of its own.
    ///
    /// # Errors
    ///
    /// When the stream doesn't give exactly this cluster, or this build has no such codec. What `out` holds is then
    /// unspecified.
    pub fn decompress(self, input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        match self {
            #[cfg(feature = "zlib")]
            Self::Zlib => zlib::decompress(input, out),
            #[cfg(feature = "zstd")]
            Self::Zstd => zstd::decompress(input, out),
            #[cfg(not(all(feature = "zlib", feature = "zstd")))]
            codec => {
                let _ = (input, out);
                Err(CodecError::Unavailable { codec })
            }
        }
    }

    /// Compresses a cluster to the start of `out`, and says how many bytes the stream has there.
    ///
    /// `None` when the stream would be no shorter than the cluster, or finds no room in `out`: then the cluster is to be
    /// stored as it is. Give it an `out` as long as the cluster. What `out` holds behind the stream, or without one, is
    /// unspecified.
    ///
    /// A deflate stream refers back at most 4 KiB and ends with a final block; a Zstandard stream is one frame with its
    /// content size and without a checksum. The same cluster, level and version of the libraries give the same stream. Each
    /// thread keeps an encoder of its own.
    ///
    /// # Errors
    ///
    /// [`CodecError::Level`] for a level that belongs to another codec and isn't one of this, else
    /// [`CodecError::Unavailable`], [`CodecError::NoMemory`] or [`CodecError::Encoder`].
    pub fn compress(
        self,
        level: Level,
        cluster: &[u8],
        out: &mut [u8],
    ) -> Result<Option<usize>, CodecError> {
        let level = level.of(self)?;
        let limit = out.len().min(cluster.len().saturating_sub(1));
        let out = out.get_mut(..limit).unwrap_or_default();
        match self {
            #[cfg(feature = "zlib")]
            Self::Zlib => Ok(zlib::compress(level, cluster, out)),
            #[cfg(feature = "zstd")]
            Self::Zstd => zstd::compress(level, cluster, out),
            #[cfg(not(all(feature = "zlib", feature = "zstd")))]
            codec => {
                let _ = (level, out);
                Err(CodecError::Unavailable { codec })
            }
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// What a thread keeps from one cluster to the next: making an encoder or decoder costs as much as coding a small cluster.
#[cfg(any(feature = "zlib", feature = "zstd"))]
type Slot<C> = LocalKey<RefCell<Option<C>>>;

/// Takes what the slot holds. Nothing in a thread that is ending: it has no slots any more.
#[cfg(any(feature = "zlib", feature = "zstd"))]
fn take<C>(slot: &'static Slot<C>) -> Option<C> {
    slot.try_with(RefCell::take).ok().flatten()
}

/// Puts it back for the next cluster. In a thread that is ending it just goes.
#[cfg(any(feature = "zlib", feature = "zstd"))]
fn keep<C>(slot: &'static Slot<C>, coder: C) {
    let _ = slot.try_with(|slot| slot.replace(Some(coder)));
}

#[cfg(test)]
#[cfg(all(feature = "zlib", feature = "zstd"))]
mod tests;
