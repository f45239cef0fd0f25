//! What requests go to: images and plain files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use qcow2_image::Image;
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_io::{FileOptions, Storage};

use super::work::{Buffer, Random};

/// Something that can be read and written; each call does all of it.
pub(super) trait Disk: Sync {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    fn write(&self, buf: &[u8], offset: u64) -> Result<()>;
}

impl Disk for Image {
    #[inline]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.read_at(buf, offset)?)
    }

    #[inline]
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        Ok(self.write_at(buf, offset)?)
    }
}

/// A plain file, by system calls without anything around them.
pub(super) struct Raw(fs::File);

impl Raw {
    /// A new file of `len` bytes, all of them a hole.
    pub(super) fn create(path: &Path, len: u64) -> Result<Self> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .with_context(|| path.display().to_string())?;
        file.set_len(len)?;
        Ok(Self(file))
    }

    /// An existing file, for reading.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).with_context(|| path.display().to_string())?;
        Ok(Self(file))
    }

    pub(super) fn sync(&self) -> Result<()> {
        Ok(self.0.sync_data()?)
    }
}

impl Disk for Raw {
    #[inline]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let done = rustix::io::pread(&self.0, &mut *buf, offset)?;
        ensure!(done == buf.len(), "a short read at {offset:#x}");
        Ok(())
    }

    #[inline]
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let done = rustix::io::pwrite(&self.0, buf, offset)?;
        ensure!(done == buf.len(), "a short write at {offset:#x}");
        Ok(())
    }
}

/// Writes a new image file.
pub(super) fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let file = FileOptions::new().write(true).create_new(true).open(path)?;
    Ok(Image::create(&file, options)?)
}

/// Opens an image for writing, as a monitor would.
pub(super) fn open(path: &Path) -> Result<Image> {
    Ok(Image::options().open_path(path)?)
}

/// A new image of `len` bytes, a multiple of 1 MiB, all of it written.
pub(super) fn create_full(path: &Path, len: u64) -> Result<()> {
    create(
        path,
        &CreateOptions::new(len).preallocation(Preallocation::Metadata),
    )?;
    let image = open(path)?;
    fill(&image, len)?;
    Ok(image.close()?)
}

/// The data of a [full](create_full) image, as a plain file.
///
/// The rival of an image is the image's own file: a copy would lie elsewhere in memory, where the same work takes some per
/// cent more or less.
pub(super) struct Inside {
    file: Raw,
    /// Where the guest's first byte lies.
    first: u64,
}

impl Inside {
    const CLUSTER: u64 = 64 << 10;
    /// What an L2 table maps; each lies in front of its data.
    const TABLE_SPAN: u64 = 512 << 20;

    /// Opens the file again, which the image has locked.
    pub(super) fn open(path: &Path, image: &Image) -> Result<Self> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| path.display().to_string())?;
        let header = image.header();
        let l1_end = header.l1_table_offset.get() + u64::from(header.l1_entries) * 8;
        let inside = Self {
            file: Raw(file),
            first: l1_end.next_multiple_of(Self::CLUSTER) + Self::CLUSTER,
        };
        ensure_same(image, &inside, image.virtual_size())?;
        Ok(inside)
    }

    #[inline]
    fn place(&self, offset: u64) -> u64 {
        self.first + offset + offset / Self::TABLE_SPAN * Self::CLUSTER
    }
}

impl Disk for Inside {
    #[inline]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read(buf, self.place(offset))
    }

    #[inline]
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write(buf, self.place(offset))
    }
}

/// A new plain file, written from start to end.
pub(super) fn full_raw(path: &Path, len: u64) -> Result<Raw> {
    let raw = Raw::create(path, len)?;
    fill(&raw, len)?;
    raw.sync()?;
    Ok(raw)
}

const PIECE: usize = 1 << 20;

/// Writes all of a disk, no two blocks alike.
pub(super) fn fill(disk: &impl Disk, len: u64) -> Result<()> {
    let mut random = Random::new(0);
    let mut buffer = Buffer::new(PIECE);
    for offset in (0..len).step_by(PIECE) {
        for word in buffer.bytes().as_chunks_mut::<8>().0 {
            *word = random.next().to_be_bytes();
        }
        disk.write(buffer.bytes(), offset)?;
    }
    Ok(())
}

/// Fails unless both read the same, at every 61st block of 4 KiB.
fn ensure_same(ours: &impl Disk, rival: &impl Disk, len: u64) -> Result<()> {
    let (mut left, mut right) = (Buffer::new(4096), Buffer::new(4096));
    for offset in (0..len).step_by(61 * 4096) {
        ours.read(left.bytes(), offset)?;
        rival.read(right.bytes(), offset)?;
        ensure!(
            left.bytes() == right.bytes(),
            "the guest's bytes at {offset:#x} are not where they should be"
        );
    }
    Ok(())
}
