use qcow2_format::header::CompressionType;
use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Memory, Storage};

use crate::rig::{
    Folder, assert_reads, assert_sound, content, create, fill, is_available, memory, new_file,
    open, options, sources,
};

const LEN: usize = (5 << 20) + 1536;

/// An image, and whether it is to be compressed.
struct Recipe {
    name: &'static str,
    options: CreateOptions,
    /// The same for `qemu-img convert`.
    by_qemu: &'static str,
    compress: bool,
    is_encrypted: bool,
}

fn recipes() -> Vec<Recipe> {
    let new = || CreateOptions::new(LEN as u64);
    let zstd = || new().compression_type(CompressionType::Zstd);
    let recipe = |name, options, by_qemu, compress| Recipe {
        name,
        options,
        by_qemu,
        compress,
        is_encrypted: false,
    };
    let mut recipes = vec![
        recipe("plain", new(), "cluster_size=64k", false),
        recipe(
            "plain 4k",
            new().cluster_size(4096),
            "cluster_size=4k",
            false,
        ),
        recipe(
            "extended",
            new().extended_l2(true),
            "extended_l2=on,cluster_size=64k",
            false,
        ),
    ];
    if Codec::Zlib.is_available() {
        recipes.extend([
            recipe("zlib", new(), "cluster_size=64k", true),
            recipe(
                "zlib 512",
                new().cluster_size(512),
                "cluster_size=512",
                true,
            ),
            recipe(
                "zlib 2M",
                new().cluster_size(2 << 20),
                "cluster_size=2M",
                true,
            ),
        ]);
    }
    if Codec::Zstd.is_available() {
        recipes.extend([
            recipe("zstd", zstd(), "compression_type=zstd", true),
            recipe(
                "zstd extended",
                zstd().extended_l2(true),
                "compression_type=zstd,extended_l2=on",
                true,
            ),
        ]);
    }
    #[cfg(feature = "encryption")]
    recipes.push(Recipe {
        name: "luks",
        options: crate::rig::luks(new()),
        by_qemu: "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        compress: false,
        is_encrypted: true,
    });
    recipes
}

fn copy_options(recipe: &Recipe, threads: usize) -> CopyOptions<'static> {
    let options = CopyOptions::new().threads(threads).chunk(200_000);
    if recipe.compress {
        options.compress(Level::default())
    } else {
        options
    }
}

/// Copies into a new file of the folder.
fn convert(folder: &Folder, recipe: &Recipe, source: &dyn Storage, threads: usize) -> Vec<u8> {
    let file = new_file(folder, "ours");
    qcow2_image::Image::create(&file, &recipe.options).unwrap();
    let open = options();
    #[cfg(feature = "encryption")]
    let open = if recipe.is_encrypted {
        open.secret(crate::rig::secret())
    } else {
        open
    };
    let image = open.open_file(file).unwrap();
    copy(source, &image, &copy_options(recipe, threads)).unwrap();
    let mut bytes = vec![0; LEN];
    image.read_at(&mut bytes, 0).unwrap();
    image.close().unwrap();
    bytes
}

#[test]
fn every_source_is_copied_to_plain_bytes() {
    for (seed, threads) in [(1, 1), (2, 4)] {
        let bytes = content(LEN, seed);
        for (name, source) in sources(&bytes) {
            for sparse in [0, 512, 4096, 65536] {
                let target = Memory::new();
                let options = CopyOptions::new().threads(threads).sparse(sparse);
                let options = options.chunk(300_000);
                let report = copy(&*source, Target::Storage(&target), &options).unwrap();
                assert_eq!(target.len().unwrap(), LEN as u64);
                assert_reads(&target, &bytes, name);
                assert_eq!(report.len_bytes, LEN as u64);
                let all = report.stored_bytes == LEN as u64;
                assert_eq!(all, sparse == 0, "{name}: {report:?}");
            }
        }
    }
}

#[test]
fn every_source_is_copied_to_images_that_both_checkers_and_qemu_accept() {
    if !is_available("copies to images") {
        return;
    }
    for (seed, recipe) in (0..).zip(recipes()) {
        let folder = Folder::new();
        let bytes = content(LEN, seed);
        folder.save("disk", &memory(&bytes));
        let qemu = if recipe.compress { "-c -W" } else { "-W" };
        folder.img(&format!(
            "convert {qemu} -m 1 -f raw -O qcow2 -o {} disk theirs",
            recipe.by_qemu
        ));
        for (number, (name, source)) in (0..).zip(sources(&bytes)) {
            let threads = [1, 2, 4][number % 3];
            let what = format!("{name} to {}", recipe.name);
            let found = convert(&folder, &recipe, &*source, threads);
            assert!(found == bytes, "{what}");
            assert_sound(&new_reader(&folder), &what);
            let (secret, checked) = if recipe.is_encrypted {
                let image = "driver=qcow2,encrypt.key-secret=s,file.filename=ours";
                (format!("--image-opts {image}"), image)
            } else {
                (
                    "-f qcow2 ours".to_owned(),
                    "driver=qcow2,file.filename=ours",
                )
            };
            folder.img(&format!("check -q {secret}"));
            let raw = "driver=raw,file.filename=disk";
            folder.img(&format!("compare -q --image-opts {checked} {raw}"));
            let (ours, theirs) = (folder.len("ours"), folder.len("theirs"));
            assert!(
                ours <= theirs.next_multiple_of(1 << 16),
                "{what}: {ours}, {theirs}"
            );
        }
    }
}

fn new_reader(folder: &Folder) -> qcow2_io::File {
    qcow2_io::File::open(folder.path("ours")).unwrap()
}

#[test]
fn what_was_in_a_target_before_is_gone() {
    for threads in [1, 4] {
        let bytes = content(LEN, 7);
        let source = memory(&bytes);
        let longer = LEN + (3 << 20);
        let options = CopyOptions::new().threads(threads);

        let target = Memory::from(vec![9; longer]);
        copy(&source, Target::Storage(&target), &options).unwrap();
        assert_reads(&target, &bytes, "memory");

        for compress in [false, true] {
            if compress && !Codec::Zlib.is_available() {
                continue;
            }
            let file = create(&CreateOptions::new(longer as u64));
            let image = open(&file);
            fill(&image, &vec![9; longer]);
            let options = if compress {
                options.compress(Level::default())
            } else {
                options
            };
            copy(&source, &image, &options).unwrap();
            assert_reads(&image, &bytes, "image");
            image.close().unwrap();
            assert_sound(&file, "image");
        }
    }
}

#[test]
fn the_rest_of_a_target_can_be_kept() {
    let target = Memory::from(vec![9; 3000]);
    let options = CopyOptions::new().zero_rest(false);
    copy(
        &Memory::from(vec![1; 1000]),
        Target::Storage(&target),
        &options,
    )
    .unwrap();
    let expected = [vec![1; 1000], vec![9; 2000]].concat();
    assert_eq!(target.to_vec().unwrap(), expected);
}

#[test]
fn a_file_becomes_as_long_as_its_source() {
    let folder = Folder::new();
    for len in [0, 1, 511, 4097, 1_234_567] {
        let mut bytes = content(len, 3);
        // Zeros at the end count.
        bytes.splice(len / 2.., vec![0; len - len / 2]);
        let file = new_file(&folder, "target");
        let options = CopyOptions::new();
        copy(&memory(&bytes), Target::Storage(&file), &options).unwrap();
        assert!(
            std::fs::read(folder.path("target")).unwrap() == bytes,
            "{len}"
        );
    }
}

#[test]
fn compressed_files_are_the_same_however_many_threads_there_are() {
    let bytes = content(LEN, 12);
    for recipe in recipes().iter().filter(|recipe| recipe.compress) {
        for (name, source) in sources(&bytes).into_iter().take(4) {
            let files = [1, 2, 4].map(|threads| {
                let file = create(&recipe.options);
                let image = open(&file);
                copy(&*source, &image, &copy_options(recipe, threads)).unwrap();
                image.close().unwrap();
                file.to_vec().unwrap()
            });
            assert!(files[0] == files[1], "{name} to {}", recipe.name);
            assert!(files[0] == files[2], "{name} to {}", recipe.name);
        }
    }
}
