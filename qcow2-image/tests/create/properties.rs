use proptest::prelude::*;
use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::{CompressionType, Version};
use qcow2_image::create::{CreateErrorKind, CreateOptions, Preallocation, write_image};
use qcow2_io::{Memory, Storage};

fn preallocation() -> impl Strategy<Value = Preallocation> {
    prop_oneof![
        3 => Just(Preallocation::Off),
        2 => Just(Preallocation::Metadata),
        1 => Just(Preallocation::Falloc),
        1 => Just(Preallocation::Full),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::collection::vec(1_u8.., 1..20),
        1 => prop::collection::vec(any::<u8>(), 0..1200),
    ]
}

/// Options of all kinds, most of them possible ones.
fn options() -> impl Strategy<Value = (CreateOptions, bool)> {
    let shape = (
        prop_oneof![20 => 9_u32..=21, 1 => 0_u32..64],
        prop_oneof![10 => (0_u32..=6).prop_map(|order| 1 << order), 1 => any::<u64>()],
        any::<u64>(),
        0_u32..64,
        preallocation(),
    );
    let features = (
        prop::bool::weighted(0.8),
        any::<bool>(),
        prop::bool::weighted(0.3),
        any::<bool>(),
    );
    let files = (
        prop::option::weighted(0.3, (name(), name())),
        prop::option::weighted(0.3, name()),
        prop::bool::weighted(0.2),
    );
    (shape, features, files).prop_map(|(shape, features, files)| {
        let (cluster_bits, refcount_bits, size, size_shift, preallocation) = shape;
        let cluster_size = 1_u64 << cluster_bits;
        let mut size = size >> size_shift;
        let (v3, lazy, extended, zstd) = features;
        let (backing, data_file, raw) = files;
        if preallocation != Preallocation::Off || raw {
            // What is laid out lies in memory here.
            size %= (cluster_size.min(2 << 20) * 300).min(16 << 20);
        }
        let version = if v3 { Version::V3 } else { Version::V2 };
        let compression = if zstd && v3 {
            CompressionType::Zstd
        } else {
            CompressionType::Zlib
        };
        let mut options = CreateOptions::new(size)
            .version(version)
            .cluster_size(cluster_size)
            .refcount_bits(if v3 { refcount_bits } else { 16 })
            .preallocation(preallocation)
            .lazy_refcounts(lazy && v3)
            .extended_l2(extended)
            .compression_type(compression)
            .data_file_raw(raw);
        if let Some((name, format)) = backing {
            options = options.backing_file(name, format);
        }
        let external = data_file.is_some();
        if let Some(name) = data_file {
            options = options.data_file(name);
        }
        (options, external)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_options_give_a_sound_image_or_a_clear_refusal((options, external) in options()) {
        let image = Memory::from(vec![0x51; 100]);
        let data = Memory::from(vec![0x51; 100]);
        let data_file: Option<&dyn Storage> = external.then_some(&data);
        match write_image(&image, data_file, &options) {
            Ok(()) => {
                let report = check(&image, &Options::default());
                prop_assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
                if external {
                    let size = options.chosen_size().unwrap().next_multiple_of(512);
                    prop_assert_eq!(data.len().unwrap(), size);
                }
            }
            Err(error) => {
                prop_assert_ne!(error.kind(), CreateErrorKind::Storage, "{}", error);
                prop_assert!(!error.to_string().is_empty());
                prop_assert_eq!(image.to_vec().unwrap(), vec![0x51; 100]);
                prop_assert_eq!(data.to_vec().unwrap(), vec![0x51; 100]);
            }
        }
    }
}
