//! What the levels mean.

/// How long to search.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// Earlier places compared for a match.
    pub(super) depth: u32,
    /// The search for a longer match ends with one of that many bytes.
    pub(super) nice: usize,
    /// A match of that many bytes is taken without a look at what starts later.
    pub(super) good: usize,
    /// How many bytes on a better match may start, so that it is taken instead.
    pub(super) patience: usize,
}

impl Effort {
    /// That of a level from 1 to 9; others count as the nearest.
    pub(super) fn of_level(level: i32) -> Self {
        let (depth, nice, good, patience) = match level {
            ..=1 => (2, 16, 0, 0),
            2 => (5, 24, 0, 0),
            3 => (12, 32, 0, 0),
            4 => (8, 32, 8, 1),
            5 => (12, 32, 16, 1),
            6 => (24, 64, 64, 1),
            7 => (64, 128, 128, 1),
            8 => (192, 258, 258, 2),
            9.. => (1024, 258, 258, 2),
        };
        Self {
            depth,
            nice,
            good,
            patience,
        }
    }
}
