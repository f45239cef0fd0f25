//! Bitmaps that lie where the file is to end. While they move, nobody records in them: they are stored before, and taken up
//! again before requests go on.

use qcow2_cache::{Kinds, MetadataError};
use qcow2_format::bitmap::{BitmapCluster, BitmapDirectory};
use qcow2_format::header::Extension;
use qcow2_format::{BitmapTableEntry, HostCluster, HostOffset};
use qcow2_io::Storage as _;

use super::occupancy::Occupancy;
use super::structures::{Structure, What};
use super::{Work, index};
use crate::{Image, ImageError};

/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// A cluster of a bitmap's data, and where the entry lies that leads to it.
struct Data {
    cluster: u64,
    entry: HostOffset,
}

impl Work<'_> {
    /// Moves what bitmaps have behind `goal` into holes; tells whether there was anything. The gate is closed.
    pub(super) fn move_bitmaps(
        &mut self,
        map: &mut Occupancy,
        goal: u64,
    ) -> Result<bool, ImageError> {
        let image = self.image;
        let all = image.bitmap_structures()?;
        let data = image.bitmap_data()?;
        if all.iter().all(|it| it.end() <= goal) && data.iter().all(|it| it.cluster < goal) {
            return Ok(false);
        }
        image.close_bitmaps()?;
        let moved = self.move_closed(map, goal, &all, &data);
        // Requests that wait take it for ready.
        if let Err(error) = image.get_ready() {
            image.meta.give_up();
            return Err(error);
        }
        moved
    }

    fn move_closed(
        &mut self,
        map: &mut Occupancy,
        goal: u64,
        all: &[Structure],
        data: &[Data],
    ) -> Result<bool, ImageError> {
        let image = self.image;
        let bits = image.geometry.cluster_bits();
        image.close_books()?;
        let mut any = false;
        for it in all.iter().filter(|it| it.end() > goal) {
            let Some(place) = map.free_run(1, goal.min(it.first), it.count) else {
                continue;
            };
            image.move_structure(it, place)?;
            image.close_books()?;
            for cluster in place..place + it.count {
                map.take(cluster);
            }
            self.moved_bytes += it.count << bits;
            any = true;
        }
        if any {
            // The entries of tables that were moved lie elsewhere now.
            return Ok(true);
        }
        let mut moves = Vec::new();
        let mut hole = map.next_free(1);
        for it in data.iter().filter(|it| it.cluster >= goal) {
            if hole >= goal {
                break;
            }
            moves.push((it, hole));
            hole = map.next_free(hole + 1);
        }
        for part in moves.chunks(index(self.slice)) {
            image.rework(|| image.move_bitmap_data(part))?;
            self.moved_bytes += (part.len() as u64) << bits;
        }
        Ok(!moves.is_empty())
    }
}

impl Image {
    /// The directory of bitmaps and their tables; the image is sound.
    fn bitmap_structures(&self) -> Result<Vec<Structure>, ImageError> {
        let header = self.header();
        let mut found = Vec::new();
        let extension = header.bitmaps().filter(|_| header.autoclear.bitmaps());
        let Some(extension) = extension else {
            return Ok(found);
        };
        let mut add = |what, offset: HostOffset, len: u64| {
            found.push(Structure {
                what,
                first: self.geometry.host_cluster(offset).get(),
                count: self.geometry.clusters_for(len),
            });
        };
        let (offset, len) = (extension.directory_offset, extension.directory_len_bytes);
        let left = self.meta.storage().len()?.saturating_sub(offset.get());
        let mut bytes = vec![0; index(len.min(left))];
        self.meta.storage().read_at(&mut bytes, offset.get())?;
        let mut at = offset.get();
        for entry in BitmapDirectory::new(&bytes, extension.count).flatten() {
            let len = u64::from(entry.table_entries) * 8;
            let pointer = HostOffset::new(at);
            add(What::BitmapTable { pointer, len }, entry.table_offset, len);
            let unpadded = 24 + entry.extra_data.len() + entry.name.len();
            at += unpadded.next_multiple_of(8) as u64;
        }
        // Its place comes last, since the pointers to tables lie in it.
        add(What::BitmapDirectory, offset, len);
        Ok(found)
    }

    /// All clusters with data of bitmaps.
    fn bitmap_data(&self) -> Result<Vec<Data>, ImageError> {
        let mut found = Vec::new();
        for it in self.bitmap_structures()? {
            let What::BitmapTable { len, .. } = it.what else {
                continue;
            };
            let table = it.first << self.geometry.cluster_bits();
            for number in 0..len.div_ceil(PIECE) {
                let start = number * PIECE;
                let part = (len - start).min(PIECE);
                let mut bytes = vec![0; index(part)];
                self.meta.storage().read_at(&mut bytes, table + start)?;
                for (place, word) in (table + start..).step_by(8).zip(bytes.as_chunks::<8>().0) {
                    let entry = BitmapTableEntry::from_bits(u64::from_be_bytes(*word));
                    if let BitmapCluster::Cluster(data) = entry.kind() {
                        found.push(Data {
                            cluster: self.geometry.host_cluster(data).get(),
                            entry: HostOffset::new(place),
                        });
                    }
                }
            }
        }
        Ok(found)
    }

    fn move_bitmap_data(&self, moves: &[(&Data, u64)]) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        let map = self.meta.overlap();
        let size = self.cluster_size();
        let at = |cluster: u64| HostOffset::new(cluster * size);
        let last = moves.iter().map(|(_, to)| *to).max().unwrap_or(0);
        alloc.cover(HostCluster::new(last + 1))?;
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for (data, to) in moves {
            self.check_free(*to)?;
            alloc.set_refcount(HostCluster::new(*to), 1)?;
            self.meta
                .storage()
                .read_at(&mut bytes, at(data.cluster).get())?;
            self.meta.write(Kinds::BITMAP_DATA, at(*to), &bytes)?;
        }
        // New refcount blocks, too.
        self.meta.commit(alloc)?;
        self.meta.write_refcounts()?;
        self.meta.flush()?;
        for (data, to) in moves {
            map.add(at(*to), size, Kinds::BITMAP_DATA)
                .map_err(MetadataError::from)?;
            let word = at(*to).get().to_be_bytes();
            self.meta.write(Kinds::BITMAP_TABLE, data.entry, &word)?;
        }
        self.meta.flush()?;
        for (data, _) in moves {
            map.remove(at(data.cluster), size, Kinds::BITMAP_DATA);
            alloc.set_refcount(HostCluster::new(data.cluster), 0)?;
        }
        Ok(())
    }

    /// Has the header, or the directory, find a structure of bitmaps at another place.
    pub(super) fn redirect_bitmaps(&self, what: What, new: HostOffset) -> Result<(), ImageError> {
        match what {
            What::BitmapTable { pointer, .. } => {
                let bytes = new.get().to_be_bytes();
                self.meta.write(Kinds::BITMAP_DIRECTORY, pointer, &bytes)?;
                Ok(self.meta.flush()?)
            }
            _ => self
                .meta
                .rewrite_header(|header| {
                    for extension in &mut header.extensions {
                        if let Extension::Bitmaps(bitmaps) = extension {
                            bitmaps.directory_offset = new;
                        }
                    }
                })
                .map_err(|error| {
                    // Old or new, who knows.
                    self.meta.give_up();
                    error.into()
                }),
        }
    }
}
