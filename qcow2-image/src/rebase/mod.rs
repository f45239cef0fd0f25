//! Rebase: another backing file for an image whose disk stays what it is.
//!
//! What the image does not have itself came from the old backing file and will come from the new one. Where these differ, the image
//! gets what the old one has; then its header names the new one. Until then it names the old one, over which nothing has
//! changed, so a rebase that was cut short can be done again.

use std::fmt;
use std::sync::Arc;

use qcow2_format::Header;
use qcow2_format::header::Extension;
use qcow2_io::Null;
use qcow2_io::codec::Level;

use crate::chain::{BackingFile, Chain, ChainError, Local, Lower, Transferred, Walker};
use crate::difference::{Differ, Verdict};
use crate::transfer::{Candidate, Candidates, Disks, Rival, Sink, Work, transfer};
use crate::{Image, ImageError, Monitor};

/// How a rebase is done.
#[derive(Clone, Copy, Default)]
#[must_use]
pub struct RebaseOptions<'a> {
    work: Work<'a>,
    compress: Option<Level>,
    dense: bool,
}

impl<'a> RebaseOptions<'a> {
    /// The defaults: as many threads as there are processors, nothing compressed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads to work with, the caller's among them; 0, the default, means one for each processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.work.threads = threads;
        self
    }

    /// Compresses what the image gets. Clusters that it has in part are stored as they are.
    pub fn compress(mut self, level: Level) -> Self {
        self.compress = Some(level);
        self
    }

    /// Zeros that the old backing file has within its length are stored as data, as qemu-img does, and take their space. Else
    /// they are only noted.
    pub fn dense(mut self, on: bool) -> Self {
        self.dense = on;
        self
    }

    /// Looks at no more bytes of the disk a second, on average, where the tables don't tell that both files are the same. 0, the
    /// default, means no limit.
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

impl fmt::Debug for RebaseOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RebaseOptions")
            .field("threads", &self.work.threads)
            .field("rate", &self.work.rate)
            .field("compress", &self.compress)
            .field("dense", &self.dense)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Changes the backing file and keeps the disk as it is: what the old one had and the new one has not is stored in the image
    /// first. With `None` the image needs none any more. From then on the image reads from the new one.
    ///
    /// Nothing is read where the tables tell that both are the same, and nothing stored where both read alike. Backing
    /// files may be shorter or longer than the image: what they lack are zeros.
    ///
    /// Only the disk as it is now is looked after: a snapshot of the image that does not have something itself shows the new file.
    ///
    /// To change only what the image says, whatever the new file has, use [`set_backing_name`](Self::set_backing_name).
    ///
    /// # Errors
    ///
    /// Before anything is written: a name that does not fit ([`ImageError::Header`]); a new chain that the image is part of
    /// ([`ImageError::InChain`]); [`ImageError::Unsupported`] for an image that names a backing file but was opened without
    /// one, for one whose data file is to be raw, and for compressing where that is not possible. Later on what the disks report, and
    /// [`ChainError::Cancelled`]: the image is then as before, though larger, and the rebase can be done again.
    ///
    /// # Durability
    ///
    /// Durable on return. After a crash the image names the old file or the new one, and its disk is the same over either. In version 2
    /// this holds as long as header and name fit in 512 bytes.
    pub fn rebase(
        &mut self,
        to: Option<&BackingFile>,
        options: &RebaseOptions<'_>,
    ) -> Result<Transferred, ChainError> {
        self.meta.check_writable().map_err(ImageError::from)?;
        self.check_rebase(to, options)?;
        let had_none = self.backing.is_none();
        if had_none {
            // Zeros have to be noted, for the new file may have something else.
            self.backing = Some(Arc::new(Null::new()));
        }
        let done = self.keep_what_differs(to, options);
        let done = done.and_then(|done| {
            let names = to.map(|to| (to.name(), to.format()));
            self.set_backing_name(names)?;
            Ok(done)
        });
        match &done {
            Ok(_) => {
                let lower = to.map(|to| to.lower.clone());
                (self.backing, self.below) = lower.map(Lower::into_parts).unzip();
            }
            Err(_) if had_none => self.backing = None,
            Err(_) => {}
        }
        done
    }

    fn check_rebase(
        &self,
        to: Option<&BackingFile>,
        options: &RebaseOptions<'_>,
    ) -> Result<(), ImageError> {
        let header = self.header();
        if self.backing.is_none() && header.backing_name.is_some() {
            return Err(ImageError::Unsupported {
                what: "without the old backing file nobody knows what the disk has to keep",
            });
        }
        let size = self.virtual_size();
        if options.compress.is_some() {
            self.check_compressible(0, size)?;
        }
        let Some(to) = to else { return Ok(()) };
        if self.raw_data {
            return Err(ImageError::Unsupported {
                what: "an image whose data file is raw can't have a backing file",
            });
        }
        if to.has(self) {
            return Err(ImageError::InChain);
        }
        let mut changed = header;
        name_backing(&mut changed, Some((to.name(), to.format())));
        changed.encode()?;
        Ok(())
    }

    /// Stores what the old chain has and the new one has not.
    fn keep_what_differs(
        &self,
        to: Option<&BackingFile>,
        options: &RebaseOptions<'_>,
    ) -> Result<Transferred, ChainError> {
        let size = self.virtual_size();
        let none = Null::new();
        let own = self.chain();
        let old = own.clone().below(1);
        let new = to.map_or_else(|| Chain::raw(&none), BackingFile::chain);
        let mut candidates = Uncovered {
            own: Walker::new(&own.above(1), size)?,
            differ: Differ::new(&old, &new, size)?,
            at: 0,
            gap_end: 0,
            end: size,
        };
        let source = old.storage().unwrap_or(&none);
        let disks = Disks {
            source,
            source_name: "old backing file",
            other: new.storage().unwrap_or(&none),
            other_name: "new backing file",
            target: Sink::Gaps(self, options.compress),
            target_name: "image",
            size,
            dense_below: if options.dense {
                source.len().map_err(ImageError::from)?
            } else {
                0
            },
        };
        transfer(disks, &mut candidates, options.work)
    }
}

/// Puts name and format of a backing file into a header.
pub(crate) fn name_backing(header: &mut Header, backing: Option<(&[u8], &[u8])>) {
    header
        .extensions
        .retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
    header.backing_name = None;
    if let Some((name, format)) = backing {
        header.backing_name = Some(name.to_vec());
        header
            .extensions
            .insert(0, Extension::BackingFormat(format.to_vec()));
    }
}

/// Where the image has nothing itself, and its backing files may differ.
struct Uncovered<'a> {
    /// The image alone.
    own: Walker<'a>,
    differ: Differ<'a>,
    at: u64,
    /// The image has nothing from `at` to here.
    gap_end: u64,
    end: u64,
}

impl Candidates for Uncovered<'_> {
    fn next(&mut self) -> Result<Option<Candidate>, ChainError> {
        while self.at < self.end {
            if self.at >= self.gap_end {
                let (found, run) = self.own.look(self.at, self.end)?;
                if !matches!(found.local, Local::Nothing(_)) {
                    self.at += run;
                    continue;
                }
                self.gap_end = self.at + run;
            }
            let start = self.at;
            let (verdict, stop) = self.differ.look(start, self.gap_end)?;
            self.at = stop;
            let Verdict::Open {
                is_zero,
                other_is_zero,
            } = verdict
            else {
                continue;
            };
            let rival = if other_is_zero {
                Rival::Zeros
            } else {
                Rival::Data
            };
            return Ok(Some(Candidate {
                range: start..stop,
                is_zero,
                rival,
            }));
        }
        Ok(None)
    }
}
