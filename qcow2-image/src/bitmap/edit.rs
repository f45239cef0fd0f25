//! Changing the directory of bitmaps: what is new is written to where nothing is, then the header switches, then what is old
//! is released. So each change is there as a whole or not at all.

use std::collections::BTreeMap;

use qcow2_alloc::{Allocation, Reason};
use qcow2_cache::{Kinds, MetadataError};
use qcow2_format::bitmap::BitmapCluster;
use qcow2_format::header::extension::{BITMAPS, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};
use qcow2_format::header::{BitmapsExtension, Extension};
use qcow2_format::{BitmapTableEntry, Header, HostOffset};

use super::directory::{Directory, Known, place_of_directory};
use super::place::{Piece, lost};
use super::{BitmapState, State};
use crate::{Image, ImageError};

/// A directory that is to take the place of the one there is.
pub(super) struct Edit<'a> {
    pub(super) directory: Directory,
    /// What bitmaps are to be, by their place in the list.
    pub(super) tables: BTreeMap<usize, Vec<Piece>>,
    /// Bytes of the disk, if that is to change.
    pub(super) size: Option<u64>,
    /// Those that get new places with each change do so with this one.
    pub(super) moves: bool,
    new: Vec<(Allocation<'a>, Kinds)>,
    /// Clusters: the first and their number.
    old: Vec<(HostOffset, u64, Kinds)>,
}

impl<'a> Edit<'a> {
    /// One that changes nothing yet.
    pub(super) fn new(directory: Directory) -> Self {
        Self {
            directory,
            tables: BTreeMap::new(),
            size: None,
            moves: true,
            new: Vec::new(),
            old: Vec::new(),
        }
    }

    /// The image will have these clusters.
    pub(super) fn add(&mut self, clusters: Allocation<'a>, kind: Kinds) {
        self.new.push((clusters, kind));
    }

    /// The image will no longer have these clusters.
    pub(super) fn drop_clusters(&mut self, first: HostOffset, count: u64, kind: Kinds) {
        self.old.push((first, count, kind));
    }
}

impl Image {
    /// Runs work on the bitmaps while no request is in flight, and frees what it releases.
    pub(super) fn edit_bitmaps<T>(
        &self,
        work: impl FnOnce(&mut State) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        self.meta.check_writable()?;
        self.get_ready()?;
        let _closed = self.gate.close();
        let done = {
            let mut state = self.bitmaps.lock();
            self.place_recorded(&mut state, None)?;
            work(&mut state)?
        };
        self.settle_closed()?;
        Ok(done)
    }

    /// The directory in memory.
    pub(super) fn directory(state: &State) -> Directory {
        state.directory.clone().unwrap_or_default()
    }

    /// A new table.
    pub(super) fn new_table(
        &self,
        entries: &[BitmapTableEntry],
    ) -> Result<Allocation<'_>, ImageError> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.place_bitmaps(&bytes, Kinds::BITMAP_TABLE)
    }

    /// Writes a structure to where nothing is. What its last cluster has behind it means nothing, so that is left as it is.
    fn place_bitmaps(&self, bytes: &[u8], kind: Kinds) -> Result<Allocation<'_>, ImageError> {
        let clusters = self.geometry.clusters_for(bytes.len() as u64);
        let place = self.alloc()?.allocate_contiguous(clusters)?;
        self.meta.write(kind, place.offset(), bytes)?;
        Ok(place)
    }

    /// The whole table of a bitmap, proven.
    pub(super) fn table_of(&self, known: &Known) -> Result<Vec<BitmapCluster>, ImageError> {
        let file = self.bits_of(known);
        let entries = file.entries(0, known.entry.table_entries.into())?;
        let numbered = (0..).zip(entries);
        numbered
            .map(|(number, entry)| file.judged(number, entry))
            .collect()
    }

    /// Gives up the table of a bitmap, and its data if that is wanted.
    pub(super) fn drop_table(
        &self,
        known: &Known,
        data: bool,
        edit: &mut Edit<'_>,
    ) -> Result<(), ImageError> {
        // Whose it is can't be told: lost space is the lesser evil.
        if matches!(known.state, BitmapState::Broken { .. }) {
            return Ok(());
        }
        let clusters = self.geometry.clusters_for(known.table_len());
        edit.drop_clusters(known.entry.table_offset, clusters, Kinds::BITMAP_TABLE);
        if data {
            for kind in self.table_of(known)? {
                if let BitmapCluster::Cluster(offset) = kind {
                    edit.drop_clusters(offset, 1, Kinds::BITMAP_DATA);
                }
            }
        }
        Ok(())
    }

    /// Makes the directory of an edit the image's. `change` changes the header beside, in the same moment.
    pub(super) fn switch_directory<'a>(
        &'a self,
        state: &mut State,
        mut edit: Edit<'a>,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), ImageError> {
        if edit.directory.rest.is_some() {
            return Err(ImageError::Unsupported {
                what: "the directory of bitmaps is broken: what can't be read of it must be removed first",
            });
        }
        let cluster = self.cluster_size();
        let old = place_of_directory(&self.header());
        // One that can't be read may lie anywhere.
        let whole = state.directory.as_ref();
        if let Ok(Some(old)) = old
            && whole.is_some_and(|directory| directory.rest.is_none())
        {
            let clusters = self.geometry.clusters_for(old.directory_len_bytes);
            edit.drop_clusters(old.directory_offset, clusters, Kinds::BITMAP_DIRECTORY);
        }
        self.place_tables(&mut edit)?;
        let extension = self.place_directory(&mut edit)?;
        self.make_durable()?;
        let map = self.meta.overlap();
        for (clusters, kind) in &edit.new {
            map.add(clusters.offset(), clusters.count() * cluster, *kind)
                .map_err(MetadataError::from)?;
        }
        let switched = self.meta.rewrite_header(|header| {
            set_extension(header, extension);
            change(header);
        });
        if let Err(error) = switched {
            if matches!(error, MetadataError::Header(_)) {
                // It didn't fit, so nothing was written.
                for (clusters, kind) in &edit.new {
                    map.remove(clusters.offset(), clusters.count() * cluster, *kind);
                }
                return Err(error.into());
            }
            // The file has the old header or the new one: nothing that either leads to may be used otherwise.
            for (clusters, _) in edit.new {
                clusters.keep();
            }
            self.meta.give_up();
            return Err(error.into());
        }
        for (clusters, _) in edit.new {
            clusters.keep();
        }
        let alloc = self.alloc()?;
        for (first, count, kind) in edit.old {
            map.remove(first, count * cluster, kind);
            alloc.release(self.geometry.host_cluster(first), count, Reason::Other);
        }
        if edit.moves {
            // Those that got new places are there as they are in memory.
            let all = edit.directory.known.iter();
            let moved = all.filter(|known| edit.directory.takes_anew(known));
            for number in moved.filter_map(|known| known.tracker) {
                self.forget_pages(state, Some(number));
            }
        }
        state.fresh = edit.moves && edit.directory.anew;
        state.directory = Some(edit.directory);
        Ok(())
    }

    /// Writes the directory of an edit; an empty one needs no place.
    fn place_directory<'a>(
        &'a self,
        edit: &mut Edit<'a>,
    ) -> Result<Option<BitmapsExtension>, ImageError> {
        let known = &mut edit.directory.known;
        if known.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for one in &mut *known {
            // For now, where it lies in the directory.
            one.place = HostOffset::new(bytes.len() as u64);
            let entry = one.entry.encode();
            bytes.extend(
                entry.map_err(|error| {
                    super::directory::unusable(&one.entry.name, error.to_string())
                })?,
            );
        }
        let len = bytes.len() as u64;
        let count = u32::try_from(known.len()).unwrap_or(u32::MAX);
        if count > MAX_BITMAPS || len > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(ImageError::Unsupported {
                what: "an image can't have more bitmaps than it has",
            });
        }
        let placed = self.place_bitmaps(&bytes, Kinds::BITMAP_DIRECTORY);
        let place = placed.map_err(|source| {
            if edit.directory.anew {
                lost(None, source)
            } else {
                source
            }
        })?;
        let offset = place.offset();
        for one in known {
            one.place = HostOffset::new(offset.get() + one.place.get());
        }
        edit.new.push((place, Kinds::BITMAP_DIRECTORY));
        Ok(Some(BitmapsExtension {
            count,
            directory_len_bytes: len,
            directory_offset: offset,
        }))
    }
}

/// Makes this the one extension that says where the directory lies.
fn set_extension(header: &mut Header, extension: Option<BitmapsExtension>) {
    header.autoclear.set_bitmaps(extension.is_some());
    let is_old = |one: &Extension| match one {
        Extension::Bitmaps(_) => true,
        Extension::Unknown { kind, .. } => *kind == BITMAPS,
        _ => false,
    };
    let all = &mut header.extensions;
    let place = all.iter().position(is_old).unwrap_or(all.len());
    all.retain(|one| !is_old(one));
    if let Some(new) = extension {
        all.insert(place, Extension::Bitmaps(new));
    }
}
