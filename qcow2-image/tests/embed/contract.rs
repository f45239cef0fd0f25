//! The suite that every storage passes, on images. Their length is fixed here: another one is a resize, which comes in
//! whole sectors.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use qcow2_format::header::Version;
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::{CacheOptions, Image, ImageOptions};
use qcow2_io::{
    Extent, Limits, Memory, Op, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags, conformance,
};

use crate::oracle::{assert_sound, in_memory};

/// Not a whole number of clusters, whatever their size.
const SIZE: u64 = (3 << 20) + 512;

/// An image that keeps its length.
#[derive(Debug)]
struct Fixed(Image);

impl Storage for Fixed {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.0.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if len == self.0.len()? {
            return Ok(());
        }
        Err(StorageError::new(
            Operation::SetLen,
            StorageErrorKind::Unsupported,
        ))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.0.extents(range, max)
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn submit(&self, ops: &mut [Op<'_>]) {
        self.0.submit(ops);
    }
}

/// Runs the suite on images of one kind, and checks each of them afterwards.
fn conforms(options: &CreateOptions, open: impl Fn() -> ImageOptions) {
    let made = Mutex::new(Vec::new());
    conformance::run(|| {
        let data = options.chosen_data_file().map(|_| Arc::new(Memory::new()));
        let options = options.clone();
        let mut how = open();
        let options = match data {
            Some(data) => {
                how = how.data_file(data.clone());
                options.data_file_storage(data)
            }
            None => options,
        };
        let memory = in_memory(&options);
        made.lock().unwrap().push(memory.clone());
        Box::new(Fixed(how.open(memory).unwrap()))
    });
    let made = made.into_inner().unwrap();
    assert!(made.len() > 10, "the suite takes an image a test");
    for memory in made {
        assert_sound(&memory);
    }
}

fn disk() -> CreateOptions {
    CreateOptions::new(SIZE)
}

#[test]
fn images_with_the_usual_clusters_conform() {
    conforms(&disk(), Image::options);
}

#[test]
fn images_of_version_2_conform() {
    conforms(&disk().version(Version::V2), Image::options);
}

#[test]
fn images_with_tiny_clusters_and_hardly_a_cache_conform() {
    let cache = CacheOptions::new()
        .l2_bytes(1024)
        .l2_slice_bytes(512)
        .refcount_bytes(0);
    for bits in [1, 64] {
        let options = disk().cluster_size(512).refcount_bits(bits);
        conforms(&options, || Image::options().cache(cache));
    }
}

#[test]
fn images_with_huge_clusters_conform() {
    conforms(&disk().cluster_size(2 << 20), Image::options);
}

#[test]
fn images_with_subclusters_conform() {
    let options = disk().extended_l2(true);
    conforms(&options, Image::options);
    conforms(&options.cluster_size(16384), Image::options);
}

#[test]
fn images_with_lazy_refcounts_conform() {
    conforms(&disk().lazy_refcounts(true), Image::options);
}

#[test]
fn preallocated_images_conform() {
    let options = disk().preallocation(Preallocation::Metadata);
    conforms(&options, Image::options);
    conforms(&options, || Image::options().discard_no_unref(true));
}

#[test]
fn images_with_a_data_file_conform() {
    let options = disk().data_file("data");
    conforms(&options, Image::options);
    conforms(&options.data_file_raw(true), Image::options);
}

#[test]
fn images_over_a_shorter_backing_file_conform() {
    let options = disk().backing_file("base", "raw");
    let base = || Arc::new(Memory::with_len((1 << 20) + 7).unwrap());
    conforms(&options, || Image::options().backing(base()));
    let version2 = options.version(Version::V2);
    conforms(&version2, || Image::options().backing(base()));
}

#[test]
fn images_that_ignore_discards_conform() {
    conforms(&disk(), || Image::options().discard(false));
}

#[test]
fn a_length_is_a_whole_number_of_sectors_or_an_error() {
    let image = Image::options().open(in_memory(&disk())).unwrap();
    let error = image.set_len(1000).unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Invalid);
    assert!(error.to_string().contains("multiple of 512"), "{error}");
    assert_eq!(image.len().unwrap(), SIZE);
    image.set_len(1024).unwrap();
    image.write_at(&[1; 24], 1000).unwrap();
    let error = image.write_at(&[1; 2], 1023).unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::OutOfRange);
    image.set_len(4096).unwrap();
    let mut bytes = [9; 2];
    image.read_at(&mut bytes, 1023).unwrap();
    assert_eq!(bytes, [1, 0]);
}

#[test]
fn a_reader_takes_no_change() {
    let memory = in_memory(&disk());
    let before = memory.to_vec().unwrap();
    let image = Image::options().read_only(true).open(memory.clone());
    let image = image.unwrap();
    let results = [
        image.write_at(&[1], 0),
        image.write_zeroes(0..1, ZeroFlags::NONE),
        image.discard(0..65536),
        image.set_len(0),
    ];
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::ReadOnly, "{error}");
    }
    image.flush().unwrap();
    image.close().unwrap();
    assert_eq!(memory.to_vec().unwrap(), before);
}
