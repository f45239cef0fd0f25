//! Commit: what an overlay holds goes down into a layer below.
//!
//! The base gets everything that the layers above it have, and is flushed. Only then the overlay is emptied, if it is. So at each moment
//! the top of the chain reads the same, and a commit that was cut short can be done again; the base alone, and what else lies over it,
//! is then in between.

mod empty;

use std::fmt;

use crate::chain::{ChainError, Local, Transferred, Walker};
use crate::transfer::{Candidate, Candidates, Disks, Rival, Sink, Work, transfer};
use crate::{Image, ImageError, Monitor, ResizeOptions};

/// How a commit is done.
#[derive(Clone, Copy)]
#[must_use]
pub struct CommitOptions<'a> {
    work: Work<'a>,
    base: usize,
    keep: bool,
}

impl Default for CommitOptions<'_> {
    fn default() -> Self {
        Self {
            work: Work::default(),
            base: 1,
            keep: false,
        }
    }
}

impl<'a> CommitOptions<'a> {
    /// The defaults: into the backing file, the overlay is emptied, as many threads as there are processors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Into which layer: 1, the default, is the backing file, 2 the backing file of that, and so on. What lies between is read,
    /// too. Behind 1 the overlay keeps what it has, for else layers in between would show through; these, seen alone, are
    /// worthless then.
    pub fn base(mut self, depth: usize) -> Self {
        self.base = depth;
        self
    }

    /// Whether the overlay keeps what it has; by default it is emptied.
    pub fn keep(mut self, on: bool) -> Self {
        self.keep = on;
        self
    }

    /// Threads to work with, the caller's among them; 0, the default, means one for each processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.work.threads = threads;
        self
    }

    /// Carries no more bytes of data a second down, on average; zeros that are known count for nothing. 0, the default, means no limit.
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.work.rate = bytes_per_second;
        self
    }

    /// Who watches.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.work.monitor = Some(monitor);
        self
    }
}

impl fmt::Debug for CommitOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommitOptions")
            .field("base", &self.base)
            .field("keep", &self.keep)
            .field("threads", &self.work.threads)
            .field("rate", &self.work.rate)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Writes what this image, and the layers between, hold down into a layer of the chain, which must be open for writing:
    /// [by its place](crate::ImageOptions::writable_layer) or [given](crate::ImageOptions::backing_image) so. A base that is shorter than this disk
    /// grows; one that is longer keeps what it has behind. Afterwards the image is emptied: it reads through to the
    /// base. Its snapshots stay; what they don't have themselves comes from the base as it is then.
    ///
    /// # Errors
    ///
    /// Before anything is written: [`ChainError::NoLayer`], a base or, if it is to be emptied, an image that is open for reading only.
    /// Later on what the disks report, [`ChainError::Emptying`] and [`ChainError::Cancelled`]: this disk reads the same then, and the commit can be
    /// done again.
    ///
    /// # Durability
    ///
    /// Durable on return. After a crash at any moment this disk reads the same.
    pub fn commit(&mut self, options: &CommitOptions<'_>) -> Result<Transferred, ChainError> {
        let empties = !options.keep && options.base == 1;
        if empties {
            self.meta.check_writable().map_err(ImageError::from)?;
        }
        let chain = self.chain();
        let layers = chain.layers().len();
        let base = chain.layers().get(options.base);
        let base = base
            .filter(|_| options.base > 0)
            .ok_or(ChainError::NoLayer {
                depth: options.base,
                layers,
            })?;
        if let Some(image) = base.image() {
            image.meta.check_writable().map_err(ImageError::from)?;
        }
        let size = self.virtual_size();
        let target = base.storage();
        if target.len().map_err(ImageError::from)? < size {
            match base.image() {
                Some(image) => image.resize(size, ResizeOptions::default())?,
                None => target.set_len(size).map_err(ImageError::from)?,
            }
        }
        let mut candidates = Above {
            walker: Walker::new(&self.chain().above(options.base), size)?,
            at: 0,
            end: size,
        };
        let disks = Disks {
            source: self,
            source_name: "overlay",
            other: self,
            other_name: "overlay",
            target: Sink::Disk(target),
            target_name: "base",
            size,
            dense_below: 0,
        };
        let done = transfer(disks, &mut candidates, options.work)?;
        match base.image() {
            Some(image) => image.settle()?,
            None => target.flush().map_err(ImageError::from)?,
        }
        if empties {
            self.empty().map_err(ChainError::Emptying)?;
        }
        Ok(done)
    }
}

/// What the layers above the base hold.
struct Above<'a> {
    walker: Walker<'a>,
    at: u64,
    end: u64,
}

impl Candidates for Above<'_> {
    fn next(&mut self) -> Result<Option<Candidate>, ChainError> {
        while self.at < self.end {
            let start = self.at;
            let (found, run) = self.walker.look(start, self.end)?;
            self.at += run;
            // Behind a short layer are zeros that hide what the base has.
            if matches!(found.local, Local::Nothing(_)) && !found.is_cut {
                continue;
            }
            return Ok(Some(Candidate {
                range: start..start + run,
                is_zero: found.local.reads_as_zeros(),
                rival: Rival::None,
            }));
        }
        Ok(None)
    }
}
