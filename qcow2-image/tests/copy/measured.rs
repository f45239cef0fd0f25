use std::fs;
use std::sync::Arc;

use qcow2_format::header::{CompressionType, Version};
use qcow2_image::Image;
use qcow2_image::copy::{CopyOptions, copy};
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::measure::{BitmapSize, MeasureError, MeasureOptions, measure, measure_raw};
use qcow2_io::{Fault, Faulty, File, Memory, Operation, Storage};

use crate::rig::{Folder, content, fill, is_available, memory, new_file, options, sources};

const LEN: usize = (3 << 20) + 1536;

/// Options of an image and the same for `qemu-img`.
struct Recipe {
    options: CreateOptions,
    by_qemu: String,
    is_encrypted: bool,
    has_data_file: bool,
}

/// Every combination that the format allows of a handful of values of each option.
fn recipes() -> Vec<Recipe> {
    let mut all = Vec::new();
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        for version in [Version::V2, Version::V3] {
            let refcount_bits: &[u64] = match version {
                Version::V2 => &[16],
                Version::V3 => &[1, 16, 64],
            };
            for refcount_bits in refcount_bits {
                for preallocation in [
                    Preallocation::Off,
                    Preallocation::Metadata,
                    Preallocation::Falloc,
                    Preallocation::Full,
                ] {
                    for extended in [false, true] {
                        if extended && (version == Version::V2 || cluster_size < 16384) {
                            continue;
                        }
                        let compat = if version == Version::V2 {
                            "0.10"
                        } else {
                            "1.1"
                        };
                        let options = CreateOptions::default()
                            .version(version)
                            .cluster_size(cluster_size)
                            .refcount_bits(*refcount_bits)
                            .preallocation(preallocation)
                            .extended_l2(extended);
                        let by_qemu = format!(
                            "compat={compat},cluster_size={cluster_size},refcount_bits={refcount_bits},\
                             preallocation={preallocation},extended_l2={}",
                            if extended { "on" } else { "off" }
                        );
                        all.push(Recipe {
                            options,
                            by_qemu,
                            is_encrypted: false,
                            has_data_file: false,
                        });
                    }
                }
            }
        }
    }
    let plain = CreateOptions::default;
    for (options, by_qemu) in [
        (plain().lazy_refcounts(true), "lazy_refcounts=on"),
        (
            plain().compression_type(CompressionType::Zstd),
            "compression_type=zstd",
        ),
    ] {
        all.push(Recipe {
            options,
            by_qemu: by_qemu.to_owned(),
            is_encrypted: false,
            has_data_file: false,
        });
    }
    for (raw, preallocation) in [
        (false, Preallocation::Off),
        (false, Preallocation::Metadata),
        (true, Preallocation::Off),
        (true, Preallocation::Full),
    ] {
        let options = plain().data_file("data").data_file_raw(raw);
        all.push(Recipe {
            options: options.preallocation(preallocation),
            by_qemu: String::new(),
            is_encrypted: false,
            has_data_file: true,
        });
    }
    #[cfg(feature = "encryption")]
    for preallocation in [Preallocation::Off, Preallocation::Metadata] {
        all.push(Recipe {
            options: crate::rig::luks(plain().preallocation(preallocation)),
            by_qemu: format!(
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation={preallocation}"
            ),
            is_encrypted: true,
            has_data_file: false,
        });
    }
    all
}

/// Creates an image, copies into it, and tells the lengths of its files.
fn real_len(
    recipe: &Recipe,
    create: CreateOptions,
    source: &dyn Storage,
    threads: usize,
) -> (u64, u64, u32) {
    let file = Arc::new(Memory::new());
    let data = Arc::new(Memory::new());
    let create = if recipe.has_data_file {
        create.data_file_storage(data.clone())
    } else {
        create
    };
    Image::create(&file, &create).unwrap();
    let mut open = options();
    if recipe.has_data_file {
        open = open.data_file(data.clone());
    }
    #[cfg(feature = "encryption")]
    if recipe.is_encrypted {
        open = open.secret(crate::rig::secret());
    }
    let image = open.open(file.clone()).unwrap();
    let copying = CopyOptions::new().threads(threads).chunk(100_000);
    copy(source, &image, &copying).unwrap();
    let table = image.header().refcount_table_clusters;
    image.close().unwrap();
    (file.len().unwrap(), data.len().unwrap(), table)
}

#[test]
fn files_become_as_long_as_was_told_whatever_the_options() {
    let bytes = content(LEN, 21);
    let source = memory(&bytes);
    let full = Memory::from(vec![7; LEN]);
    let mut long_tables = 0;
    for (number, recipe) in recipes().iter().enumerate() {
        let threads = [1, 4][number % 2];
        let what = &recipe.by_qemu;
        let asked = MeasureOptions::new();
        let create = recipe.options.clone().size(LEN as u64);

        let measured = measure(&create, &asked.source(&source)).unwrap();
        let roomy = create.clone().room_for(measured.required);
        let found = real_len(recipe, roomy, &source, threads);
        assert_eq!(found.0, measured.required, "{what}");
        assert_eq!(measured.data_file.unwrap_or(0), found.1, "{what}");

        // The same with the length from the source, and every cluster written.
        let found = measure(&recipe.options, &asked.source(&full)).unwrap();
        assert_eq!(found.required, found.fully_allocated, "{what}");
        assert_eq!(found.fully_allocated, measured.fully_allocated, "{what}");
        let roomy = create.clone().room_for(found.required);
        let written = real_len(recipe, roomy, &full, threads);
        assert_eq!(written.0, found.required, "{what}");
        long_tables += u64::from(written.2 > 1);

        let empty = measure(&create, &asked).unwrap();
        let nothing = real_len(recipe, create, &Memory::new(), 1);
        assert_eq!(nothing.0, empty.required, "{what}");
    }
    // Some would have had to move without the room.
    assert!(long_tables > 0);
}

#[test]
fn what_is_zero_among_data_is_found_by_looking() {
    let bytes = content(LEN, 22);
    for recipe in recipes().iter().step_by(5) {
        for (name, source) in sources(&bytes) {
            let what = format!("{name} to {}", recipe.by_qemu);
            let asked = MeasureOptions::new().source(&*source);
            let told = measure(&recipe.options, &asked).unwrap().required;
            let looked = measure(&recipe.options, &asked.look(true))
                .unwrap()
                .required;
            assert!(looked <= told, "{what}");
            let create = recipe.options.clone().size(LEN as u64).room_for(looked);
            assert_eq!(real_len(recipe, create, &*source, 2).0, looked, "{what}");
        }
    }
}

/// A number of the JSON that `qemu-img measure` gives.
fn number(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.split_once(&format!("\"{key}\": "))?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
    Some(rest[..digits].parse().unwrap())
}

#[test]
fn qemu_tells_the_same_of_what_it_would_write() {
    if !is_available("figures of qemu-img measure") {
        return;
    }
    let folder = Folder::new();
    let bytes = content(LEN, 23);
    fill(&new_file(&folder, "disk"), &bytes);
    fs::File::options()
        .write(true)
        .open(folder.path("disk"))
        .unwrap()
        .set_len(LEN as u64)
        .unwrap();
    let source = File::open(folder.path("disk")).unwrap();
    for (number_of, recipe) in recipes().iter().enumerate() {
        // QEMU knows nothing of data files here, and makes keys for encrypted images, which takes seconds.
        let makes_keys = recipe.is_encrypted && !recipe.by_qemu.contains("=off");
        if recipe.has_data_file || makes_keys {
            continue;
        }
        let what = &recipe.by_qemu;
        let asked = MeasureOptions::new();
        let json = folder.img(&format!(
            "measure --output=json -f raw -O qcow2 -o {what} disk"
        ));
        let ours = measure(&recipe.options, &asked.source(&source)).unwrap();
        assert_eq!(
            number(&json, "required"),
            Some(ours.by_qemu.required),
            "{what}"
        );
        assert_eq!(
            number(&json, "fully-allocated"),
            Some(ours.by_qemu.fully_allocated),
            "{what}"
        );
        // A file of which most is holes is as long as a full one; QEMU leaves the holes out.
        if !what.contains("preallocation=metadata") {
            assert!(ours.required <= ours.by_qemu.required, "{what}");
        }

        // Large and odd sizes.
        let size = [(1_u64 << 40) + 512, 12_345 * 512, 0, 5 << 30][number_of % 4];
        if recipe.is_encrypted
            || what.contains("preallocation=f")
            || what.contains("cluster_size=512") && size > 1 << 35
        {
            continue;
        }
        let create = recipe.options.clone().size(size);
        let json = folder.img(&format!(
            "measure --output=json -O qcow2 -o {what} --size {size}"
        ));
        let Ok(ours) = measure(&create, &asked) else {
            panic!("{what}: {size}");
        };
        assert_eq!(
            number(&json, "required"),
            Some(ours.by_qemu.required),
            "{what} {size}"
        );
        assert_eq!(
            number(&json, "fully-allocated"),
            Some(ours.by_qemu.fully_allocated),
            "{what} {size}"
        );
    }
    let json = folder.img("measure --output=json -f raw -O raw disk");
    let ours = measure_raw(&source).unwrap();
    assert_eq!(number(&json, "required"), Some(ours.by_qemu.required));
    assert_eq!(ours.required, LEN as u64);
}

#[test]
fn snapshots_bitmaps_and_preallocated_sources_are_measured_as_qemu_does() {
    if !is_available("figures of qemu-img measure for images") {
        return;
    }
    let folder = Folder::new();
    folder.img("create -q -f qcow2 -o preallocation=metadata image 64M");
    folder.io(&["write -q -P 5 1M 3M"], "image");
    folder.img("snapshot -q -c before image");
    folder.io(&["write -q -P 6 20M 2M"], "image");
    folder.img("bitmap --add -g 65536 image first");
    folder.img("bitmap --add -g 512 image the-second-of-them");
    let open = options().read_only(true);
    for (snapshot, line) in [
        (None, "measure --output=json -f qcow2 -O qcow2 image"),
        (
            Some("before"),
            "measure --output=json -f qcow2 -l before -O qcow2 image",
        ),
    ] {
        let open = match snapshot {
            Some(name) => open
                .clone()
                .snapshot(qcow2_image::SnapshotKey::Name(name.into())),
            None => open.clone(),
        };
        let image = open.open_path(folder.path("image")).unwrap();
        let bitmaps: Vec<_> = image
            .bitmaps()
            .unwrap()
            .iter()
            .map(BitmapSize::from)
            .collect();
        assert_eq!(bitmaps.len(), 2);
        let asked = MeasureOptions::new().source(&image).bitmaps(&bitmaps);
        let ours = measure(&CreateOptions::default(), &asked).unwrap();
        let json = folder.img(line);
        assert_eq!(
            number(&json, "required"),
            Some(ours.by_qemu.required),
            "{line}"
        );
        assert_eq!(number(&json, "bitmaps"), ours.by_qemu.bitmaps, "{line}");
        // Most of it is mapped to a hole.
        assert!(ours.required < 8 << 20, "{ours:?}");
    }
}

#[test]
fn the_upper_layers_can_be_measured_alone() {
    let bytes = content(LEN, 24);
    let (_, chain) = sources(&bytes)
        .into_iter()
        .find(|(name, _)| *name == "chain")
        .unwrap();
    let create = CreateOptions::default().backing_file("below", "qcow2");
    let asked = MeasureOptions::new().source(&*chain);
    let whole = measure(&create, &asked).unwrap();
    assert_eq!(whole.required, whole.fully_allocated);
    let top = measure(&create, &asked.layers(1)).unwrap();
    let both = measure(&create, &asked.layers(2)).unwrap();
    assert!(top.required < both.required && both.required < whole.required);
}

#[test]
fn what_can_not_be_measured_is_told() {
    let source = Faulty::new(Memory::from(vec![1; 1 << 20]));
    let create = CreateOptions::new(1 << 19);
    let error = measure(&create, &MeasureOptions::new().source(&source)).unwrap_err();
    assert!(
        matches!(error, MeasureError::TooSmall { size: 524288, .. }),
        "{error}"
    );
    source.add(Fault::on(Operation::Extents));
    let error = measure(
        &CreateOptions::default(),
        &MeasureOptions::new().source(&source),
    );
    let error = error.unwrap_err();
    assert_eq!(error.to_string(), "the source fails at offset 0x0");
    let error = measure(&CreateOptions::default(), &MeasureOptions::new()).unwrap_err();
    assert!(matches!(error, MeasureError::Create(_)), "{error}");
    source.clear();
    source.add(Fault::on(Operation::Read));
    let asked = MeasureOptions::new().source(&source).look(true);
    let error = measure(&CreateOptions::default(), &asked).unwrap_err();
    assert!(matches!(error, MeasureError::Look(_)), "{error}");
}
