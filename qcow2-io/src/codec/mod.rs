//! How compressed clusters are coded.
//!
//! A compressed cluster is a stream that gives one cluster, inside a window of whole sectors whose exact end nobody noted:
//! what follows the stream is padding or the next cluster. So a decoder here is told how much to produce, and stops there.

#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

#[cfg(any(feature = "zlib", feature = "zstd"))]
use std::cell::RefCell;
use std::fmt;
#[cfg(any(feature = "zlib", feature = "zstd"))]
use std::thread::LocalKey;

/// A way to compress clusters.
///
/// The names are always there; whether a build can decode them is a matter of its features `zlib` and `zstd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Raw deflate streams, without the header and checksum of a zlib file; called zlib by all tools.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Why a stream gives no cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The codec was left out of this build.
    #[error("this build has no {codec} decoder")]
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
    /// The process can't have the memory a decoder needs, some hundred KiB.
    #[error("no memory for a {codec} decoder")]
    NoMemory {
        /// Which codec.
        codec: Codec,
    },
}

impl Codec {
    /// Whether this build can decode it.
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
    /// When the stream doesn't give exactly this cluster, or this build has no such decoder. What `out` holds is then
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
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// Runs `work` with the decoder of this thread, made at first use: making one costs as much as decoding a small cluster.
#[cfg(any(feature = "zlib", feature = "zstd"))]
fn with_decoder<D, R>(
    slot: &'static LocalKey<RefCell<Option<D>>>,
    make: impl FnOnce() -> Result<D, CodecError>,
    work: impl FnOnce(&mut D) -> Result<R, CodecError>,
) -> Result<R, CodecError> {
    // A thread that is ending has no slots any more.
    let kept = slot.try_with(RefCell::take).ok().flatten();
    let mut decoder = match kept {
        Some(decoder) => decoder,
        None => make()?,
    };
    let result = work(&mut decoder);
    // Then the decoder just goes.
    let _ = slot.try_with(|slot| slot.replace(Some(decoder)));
    result
}

#[cfg(test)]
#[cfg(all(feature = "zlib", feature = "zstd"))]
mod tests;
