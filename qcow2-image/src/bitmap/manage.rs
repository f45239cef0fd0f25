//! Creating, removing, clearing bitmaps; recording or not; and what to make of one that was not stored.

use qcow2_format::bitmap::{
    BitmapCluster, BitmapFlags, DIRTY_TRACKING, MAX_GRANULARITY_BITS, MAX_NAME_LEN,
    MIN_GRANULARITY_BITS, required_table_entries,
};
use qcow2_format::{BitmapEntry, HostOffset};

use super::directory::{Known, text, unusable};
use super::edit::Edit;
use super::merge::Sparse;
use super::place::Piece;
use super::{BitmapState, State};
use crate::{Image, ImageError};

/// What a new bitmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapOptions {
    /// Bytes of the disk that a bit stands for: a power of two from 512 to 2 GiB. If not given, the cluster size, but at
    /// least 4 KiB and at most 64 KiB.
    pub granularity: Option<u64>,
    /// Whether it records from the beginning on.
    pub enabled: bool,
}

impl BitmapOptions {
    /// A bitmap that records, with the granularity that QEMU would choose.
    pub fn new() -> Self {
        Self {
            granularity: None,
            enabled: true,
        }
    }

    /// Sets the granularity, in bytes.
    #[must_use]
    pub fn granularity(mut self, bytes: u64) -> Self {
        self.granularity = Some(bytes);
        self
    }

    /// Whether it records from the beginning on.
    #[must_use]
    pub fn enabled(mut self, on: bool) -> Self {
        self.enabled = on;
        self
    }
}

impl Default for BitmapOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// What an inconsistent bitmap is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapRecovery {
    /// Everything has changed. That is always true enough.
    AllChanged,
    /// What the file has of it.
    ///
    /// This is right, and misses nothing that ever reached the file, if it was this engine that recorded in the bitmap
    /// when it was not closed, and if nothing but this engine has written to the image since. It is *wrong* if that was QEMU: it
    /// stores bitmaps only when it closes the image. Nothing in the file tells which of them it was, so the caller must know.
    AsStored,
}

impl Image {
    /// Makes a new bitmap, with nothing in it. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// Names that are taken, empty or longer than 1023 bytes, and granularities that are not allowed
    /// ([`ImageError::Option`]); disks that are empty or too large for the granularity ([`ImageError::BitmapUnusable`]);
    /// [`ImageError::Unsupported`] for version 2, for more bitmaps than the format allows, and while the directory
    /// of bitmaps is broken; a header that has no room for it. Nothing has changed then. And what the storage reports, after which
    /// the bitmap is there or not.
    ///
    /// # Durability
    ///
    /// On return it is durable.
    pub fn create_bitmap(&self, name: &[u8], options: &BitmapOptions) -> Result<(), ImageError> {
        self.add_bitmap(name, options, None)
    }

    /// Makes a new bitmap with these bits, or with none: as a whole or not at all.
    pub(super) fn add_bitmap(
        &self,
        name: &[u8],
        options: &BitmapOptions,
        bits: Option<&Sparse>,
    ) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        if self.rules.version2 {
            return Err(ImageError::Unsupported {
                what: "an image of version 2 can't have bitmaps",
            });
        }
        let granularity_bits = self.granularity_bits(options.granularity)?;
        let len = name.len() as u64;
        if len == 0 || len > MAX_NAME_LEN {
            return Err(refuse_name(name, "1 to 1023 bytes are allowed"));
        }
        self.edit_bitmaps(|state| {
            let directory = Self::directory(state);
            if directory.find(name).is_ok() {
                return Err(refuse_name(name, "another bitmap has it"));
            }
            let mut entry = BitmapEntry {
                // For now, anything but nowhere.
                table_offset: HostOffset::new(self.cluster_size()),
                kind: DIRTY_TRACKING,
                granularity_bits,
                name: name.to_vec(),
                ..BitmapEntry::default()
            };
            let size = self.virtual_size();
            let in_use = options.enabled || directory.anew;
            entry.flags = BitmapFlags::new(in_use, options.enabled);
            entry.table_entries = self.table_entries(&entry, size)?;
            let new = Known {
                entry,
                place: HostOffset::new(0),
                state: BitmapState::Consistent,
                tracker: None,
            };
            let mut edit = Edit::new(directory);
            let table = vec![BitmapCluster::AllZeros; index(new.entry.table_entries)];
            let table = match bits {
                Some(bits) => {
                    self.check_size(&new, bits)?;
                    self.add_to_table(&new, table, bits, &mut edit)?
                }
                None => table.into_iter().map(Piece::There).collect(),
            };
            edit.tables.insert(edit.directory.known.len(), table);
            edit.directory.known.push(new);
            self.switch_directory(state, edit, |_| {})?;
            match &mut state.directory {
                Some(directory) if options.enabled => match directory.known.last_mut() {
                    Some(known) => self.track(known),
                    None => Ok(()),
                },
                _ => Ok(()),
            }
        })
    }

    fn granularity_bits(&self, wanted: Option<u64>) -> Result<u8, ImageError> {
        let bytes = wanted.unwrap_or(self.cluster_size().clamp(4 << 10, 64 << 10));
        let range = 1 << MIN_GRANULARITY_BITS..=1 << MAX_GRANULARITY_BITS;
        if !bytes.is_power_of_two() || !range.contains(&bytes) {
            return Err(ImageError::Option {
                option: "granularity",
                value: bytes.to_string(),
                why: "it must be a power of two from 512 to 2 GiB".to_owned(),
            });
        }
        Ok(u8::try_from(bytes.trailing_zeros()).unwrap_or(MAX_GRANULARITY_BITS))
    }

    /// Entries that the table of a bitmap has to have for a disk of this size.
    pub(super) fn table_entries(&self, entry: &BitmapEntry, size: u64) -> Result<u32, ImageError> {
        let needed = required_table_entries(self.geometry, size, entry.granularity_bits.into());
        if needed == 0 {
            return Err(unusable(&entry.name, "an empty disk can't have bitmaps"));
        }
        let entries = u32::try_from(needed).unwrap_or(u32::MAX);
        let sized = BitmapEntry {
            table_entries: entries,
            ..entry.clone()
        };
        match sized.defects(self.geometry, size).first() {
            None => Ok(entries),
            Some(_) => Err(unusable(
                &entry.name,
                format!(
                    "{size} bytes are too many for bits of {} bytes each",
                    1_u64 << entry.granularity_bits
                ),
            )),
        }
    }

    /// Removes a bitmap, whatever its state; and, if there is more than one of this name, which is an error, all of them. An
    /// empty name also removes what can't be read of a broken directory.
    ///
    /// What a broken bitmap has in the file is not freed, for it may belong to others.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoBitmap`], and what the storage reports, after which the bitmap is there or not.
    ///
    /// # Durability
    ///
    /// On return it is durable.
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state| {
            let mut directory = Self::directory(state);
            let rest = name.is_empty() && directory.rest.take().is_some();
            let (old, kept): (Vec<Known>, Vec<Known>) = directory
                .known
                .into_iter()
                .partition(|known| known.entry.name == name);
            directory.known = kept;
            if old.is_empty() && !rest {
                return Err(ImageError::NoBitmap { name: text(name) });
            }
            let mut edit = Edit::new(directory);
            // The others do so at the end.
            edit.moves = false;
            for known in &old {
                self.drop_table(known, true, &mut edit)?;
            }
            self.switch_directory(state, edit, |_| {})?;
            for known in &old {
                self.untrack(state, known);
            }
            Ok(())
        })
    }

    /// Makes a bitmap record nothing. No request is in flight, and it is settled or no one's any more.
    fn untrack(&self, state: &mut State, known: &Known) {
        if let Some(number) = known.tracker {
            self.forget_pages(state, Some(number));
            self.bitmaps.trackers.release(number);
        }
    }

    /// Clears all bits of a bitmap; if it records, it goes on. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoBitmap`]; [`ImageError::BitmapUnusable`] for one that is not consistent; and what the storage
    /// reports, after which all bits are clear or none.
    ///
    /// # Durability
    ///
    /// On return it is durable.
    pub fn clear_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state| {
            let known = Self::directory(state).usable(name)?.clone();
            let entries = known.entry.table_entries;
            self.replace_table(state, &known, entries, BitmapCluster::AllZeros)
        })
    }

    /// Gives a bitmap a table of such entries, without clusters, instead of what it has.
    fn replace_table(
        &self,
        state: &mut State,
        known: &Known,
        entries: u32,
        kind: BitmapCluster,
    ) -> Result<(), ImageError> {
        let mut edit = Edit::new(Self::directory(state));
        let mut all = (0..).zip(&mut edit.directory.known);
        if let Some((at, new)) = all.find(|(_, one)| one.place == known.place) {
            new.entry.flags = known.entry.flags;
            new.state = known.state.clone();
            let pieces = (0..entries).map(|_| Piece::There(kind));
            edit.tables.insert(at, pieces.collect());
        }
        self.drop_table(known, true, &mut edit)?;
        self.switch_directory(state, edit, |_| {})?;
        if known.tracker.is_some() {
            self.forget_pages(state, known.tracker);
        }
        Ok(())
    }

    /// Lets a bitmap record from here on, also when the image is opened again. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// As [`clear_bitmap`](Self::clear_bitmap).
    ///
    /// # Durability
    ///
    /// On return it is durable.
    pub fn enable_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state| {
            Self::change_known(state, name, |known| {
                if known.entry.flags.auto() {
                    return Ok(());
                }
                self.write_flags(known, BitmapFlags::new(true, true))?;
                self.meta.flush()?;
                self.track(known)
            })
        })
    }

    /// Lets a bitmap be as it is from here on: it records nothing more. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// As [`clear_bitmap`](Self::clear_bitmap).
    ///
    /// # Durability
    ///
    /// On return it is durable, with all that it has recorded.
    pub fn disable_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state| {
            let directory = Self::directory(state);
            let (anew, known) = (directory.anew, directory.usable(name)?.clone());
            if let Some(number) = known.tracker {
                self.settle_bitmaps(state, Some(number))?;
            }
            Self::change_known(state, name, |known| {
                self.write_flags(known, BitmapFlags::new(anew, false))?;
                Ok(self.meta.flush()?)
            })?;
            self.untrack(state, &known);
            Self::change_known(state, name, |known| {
                known.tracker = None;
                Ok(())
            })
        })
    }

    /// Changes what is known of a consistent bitmap.
    fn change_known(
        state: &mut State,
        name: &[u8],
        change: impl FnOnce(&mut Known) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let none = || ImageError::NoBitmap { name: text(name) };
        let directory = state.directory.as_mut().ok_or_else(none)?;
        let index = directory.find(name)?;
        let known = directory.known.get_mut(index).ok_or_else(none)?;
        known.check_consistent()?;
        change(known)
    }

    /// Makes an inconsistent bitmap consistent again, by taking it for something that is known. One that was enabled goes on
    /// recording. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoBitmap`]; [`ImageError::BitmapUnusable`] for one that is not inconsistent, or that is to be taken as
    /// it is stored and has another size than the disk; and what the storage reports, after which the bitmap is inconsistent
    /// still or recovered.
    ///
    /// # Durability
    ///
    /// On return it is durable; but while one that records is in use, a crash makes it inconsistent once more.
    pub fn recover_bitmap(&self, name: &[u8], how: BitmapRecovery) -> Result<(), ImageError> {
        self.edit_bitmaps(|state| {
            let directory = Self::directory(state);
            let index = directory.find(name)?;
            let none = || ImageError::NoBitmap { name: text(name) };
            let mut known = directory.known.get(index).ok_or_else(none)?.clone();
            match &known.state {
                BitmapState::Inconsistent => {}
                BitmapState::Consistent => return Err(unusable(name, "it is consistent")),
                BitmapState::Broken { why } => return Err(unusable(name, why.clone())),
            }
            let auto = known.entry.flags.auto();
            known.state = BitmapState::Consistent;
            known.entry.flags = BitmapFlags::new(auto || directory.anew, auto);
            let needed = self.table_entries(&known.entry, self.virtual_size())?;
            match how {
                BitmapRecovery::AllChanged => {
                    self.replace_table(state, &known, needed, BitmapCluster::AllOnes)?;
                }
                BitmapRecovery::AsStored => {
                    if needed != known.entry.table_entries {
                        let why = "it was stored for a disk of another size";
                        return Err(unusable(name, why));
                    }
                    self.table_of(&known)?;
                }
            }
            let known_now = state.directory.as_mut();
            let known_now = known_now.and_then(|directory| directory.known.get_mut(index));
            let known_now = known_now.ok_or_else(none)?;
            self.write_flags(known_now, known.entry.flags)?;
            self.meta.flush()?;
            known_now.state = BitmapState::Consistent;
            if auto && known_now.tracker.is_none() {
                self.track(known_now)?;
            }
            Ok(())
        })
    }
}

fn refuse_name(name: &[u8], why: &str) -> ImageError {
    ImageError::Option {
        option: "name",
        value: text(name),
        why: why.to_owned(),
    }
}

fn index(entries: u32) -> usize {
    usize::try_from(entries).unwrap_or(usize::MAX)
}
