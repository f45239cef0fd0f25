//! How hard to try.

use super::{Codec, CodecError};

/// How much work goes into a smaller stream.
///
/// The default is the codec's own best choice, see [`Codec::default_level`]; it goes with every codec. Any other level
/// belongs to a codec, whose range is [`Codec::levels`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Level(Option<i32>);

impl Level {
    /// A level of a codec: 1 to 9 for zlib, 1 to 22 for zstd. Higher ones are slower, and mostly give less.
    ///
    /// # Errors
    ///
    /// [`CodecError::Level`] when it is outside of the codec's range. It doesn't matter whether this build has the codec.
    pub fn new(codec: Codec, level: i32) -> Result<Self, CodecError> {
        Self(Some(level)).of(codec)?;
        Ok(Self(Some(level)))
    }

    /// The number of this level, for a codec that may be another than it was made for.
    pub(super) fn of(self, codec: Codec) -> Result<i32, CodecError> {
        let found = self.0.unwrap_or(codec.default_level());
        let (min, max) = codec.levels();
        if (min..=max).contains(&found) {
            return Ok(found);
        }
        Err(CodecError::Level {
            codec,
            found,
            min,
            max,
        })
    }
}

impl Codec {
    /// The lowest and the highest level, both allowed.
    pub fn levels(self) -> (i32, i32) {
        match self {
            Self::Zlib => (1, 9),
            Self::Zstd => (1, 22),
        }
    }

    /// The level that [`Level::default`] means.
    ///
    /// For zlib it takes under 40 % of the time of level 6 of the C library, which QEMU uses, for streams that are a little
    /// shorter; lower ones give longer streams than that, higher ones up to 2 % less. For zstd it is QEMU's.
    pub fn default_level(self) -> i32 {
        match self {
            Self::Zlib => 4,
            Self::Zstd => 3,
        }
    }
}
