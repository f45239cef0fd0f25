//! Cache options: they change nothing that a guest sees, and what makes no sense is refused.

use qcow2_image::create::CreateOptions;
use qcow2_image::{CacheOptions, Image};
use qcow2_io::Storage;

use crate::oracle::{Plain, assert_sound, guest_bytes, in_memory, noise, refusal};

#[test]
fn combinations_that_make_no_sense_are_named() {
    let new = CacheOptions::new;
    let cases = [
        (
            new()
                .total_bytes(3 << 20)
                .l2_bytes(1 << 20)
                .refcount_bytes(1 << 20),
            "cache-size can't be 3145728: l2-cache-size (1048576) and refcount-cache-size are set, too",
        ),
        (
            new().total_bytes(65536).l2_bytes(65537),
            "l2-cache-size can't be 65537: cache-size is 65536",
        ),
        (
            new().total_bytes(65536).refcount_bytes(1 << 20),
            "refcount-cache-size can't be 1048576: cache-size is 65536",
        ),
        (
            new().l2_slice_bytes(256),
            "l2-cache-entry-size can't be 256: it must be a power of two from 512 to the cluster size of 65536",
        ),
        (
            new().l2_slice_bytes(5000),
            "l2-cache-entry-size can't be 5000: it must be a power of two from 512 to the cluster size of 65536",
        ),
        (
            new().l2_slice_bytes(131_072),
            "l2-cache-entry-size can't be 131072: it must be a power of two from 512 to the cluster size of 65536",
        ),
    ];
    let memory = in_memory(&CreateOptions::new(1 << 30));
    let before = memory.to_vec().unwrap();
    for (cache, message) in cases {
        for read_only in [false, true] {
            let options = Image::options().cache(cache).read_only(read_only);
            assert_eq!(refusal(options.open(memory.clone())), message);
        }
    }
    assert_eq!(memory.to_vec().unwrap(), before, "a refusal writes nothing");
}

#[test]
fn any_size_that_makes_sense_works() {
    let new = CacheOptions::new;
    let huge = u64::MAX / 2;
    let caches = [
        new().total_bytes(0),
        new().total_bytes(huge),
        new().l2_bytes(0).refcount_bytes(0),
        new().l2_bytes(huge).refcount_bytes(1),
        new().total_bytes(1 << 20).l2_bytes(1 << 20),
        new().total_bytes(1 << 20).refcount_bytes(1000),
        new().l2_slice_bytes(512).l2_bytes(1025),
        new().l2_slice_bytes(4096),
        new().clean_interval(std::time::Duration::from_nanos(1)),
        new().clean_interval(std::time::Duration::ZERO),
    ];
    for cache in caches {
        let memory = in_memory(&CreateOptions::new(16 << 20).cluster_size(4096));
        let image = Image::options().cache(cache).open(memory.clone()).unwrap();
        let mut plain = Plain::zeros(16 << 20);
        for number in 0..40 {
            let offset = number * 401_234 % (15 << 20);
            plain.write(&image, offset, &noise(9000, number as u64));
            if number % 7 == 0 {
                image.flush().unwrap();
                image.trim_caches();
            }
        }
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        assert_sound(&memory);
        let image = Image::options().cache(cache).open(memory).unwrap();
        plain.assert_is(&guest_bytes(&image));
    }
}
