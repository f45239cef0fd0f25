//! Encrypted images: made by both, read by both, and never opened as plain data.

use std::sync::Arc;

use qcow2_format::header::{CryptMethod, Version};
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::luks::{KeyCost, LuksOptions, WorkLimit};
use qcow2_image::{Image, ImageOptions, ResizeOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::cipher::Secret;
use qcow2_io::codec::Level;
use qcow2_io::{Memory, Op, Storage, ZeroFlags};

use crate::oracle::{
    Folder, Plain, assert_sound, guest_bytes, header_of, in_memory, is_available, noise, refusal,
    words,
};

const LEN: usize = 3 << 20;
const PASSPHRASE: &str = "correct-horse";

fn secret() -> Secret {
    Secret::new(PASSPHRASE.as_bytes().to_vec())
}

fn luks(options: CreateOptions) -> CreateOptions {
    let cost = KeyCost::Iterations(1000);
    options.luks(LuksOptions::new().cost(cost), secret())
}

fn aes(options: CreateOptions) -> CreateOptions {
    options.legacy_aes(secret())
}

fn recipes() -> Vec<(&'static str, CreateOptions)> {
    let new = || CreateOptions::new(LEN as u64);
    vec![
        ("luks", luks(new())),
        ("luks 512", luks(new().cluster_size(512))),
        ("luks 2M", luks(new().cluster_size(2 << 20))),
        ("luks extended", luks(new().extended_l2(true))),
        ("luks old", luks(new().version(Version::V2))),
        ("aes", aes(new())),
        (
            "aes old",
            aes(new().version(Version::V2).cluster_size(4096)),
        ),
        (
            "aes extended",
            aes(new().extended_l2(true).cluster_size(16384)),
        ),
        ("aes lazy", aes(new().lazy_refcounts(true))),
    ]
}

fn options() -> ImageOptions {
    Image::options().secret(secret())
}

/// Has QEMU tell what the guest sees.
fn by_qemu(folder: &Folder, name: &str) -> Vec<u8> {
    folder.img(&format!(
        "convert --object secret,id=s,data={PASSPHRASE} --image-opts \
         driver=qcow2,file.filename={name},encrypt.key-secret=s -O raw {name}.converted"
    ));
    folder.read(&format!("{name}.converted"))
}

fn io_by_qemu(folder: &Folder, name: &str, commands: &[&str]) {
    let object = format!("secret,id=s,data={PASSPHRASE}");
    let image = format!("driver=qcow2,file.filename={name},encrypt.key-secret=s");
    let mut args = vec!["--object", &object, "-d", "unmap"];
    args.extend(commands.iter().flat_map(|command| ["-c", *command]));
    args.extend(["--image-opts", &image]);
    let output = folder.run("qemu-io", &args);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !words.contains("failed"),
        "{commands:?}: {words}"
    );
}

/// Writes, zeroes and discards all over the disk, in parts of sectors, too.
fn work(image: &Image, plain: &mut Plain, salt: usize) {
    let len = plain.0.len();
    for step in 0..120_usize {
        let offset = (step + salt) * 7_919_003 % (len - 90_000);
        let aligned = offset / 512 * 512;
        let range = |at: usize, len: usize| at as u64..(at + len) as u64;
        match step % 8 {
            0 => plain.write(image, offset, &noise(700, step as u64)),
            1 => plain.write(image, aligned, &noise(4096, step as u64)),
            2 => plain.write(image, aligned, &noise(70_144, step as u64)),
            3 => plain.write(image, offset, &noise(3, step as u64)),
            4 => {
                image
                    .write_zeroes(range(offset, 5001), ZeroFlags::NONE)
                    .unwrap();
                plain.clear(offset..offset + 5001);
            }
            5 => {
                image
                    .write_zeroes(range(aligned, 80_384), ZeroFlags::MAY_UNMAP)
                    .unwrap();
                plain.clear(aligned..aligned + 80_384);
            }
            6 => {
                // Version 2 with a backing file can't.
                if image.discard(range(aligned, 65_536)).is_ok() {
                    plain.clear(aligned..aligned + 65_536);
                }
            }
            _ => image.flush().unwrap(),
        }
    }
    for step in 0..50_usize {
        let offset = step * 104_729 % (len - 5000);
        let mut buf = vec![0; [1, 511, 512, 513, 4096][step % 5]];
        image.read_at(&mut buf, offset as u64).unwrap();
        assert!(
            buf == plain.0[offset..offset + buf.len()],
            "{} at {offset}",
            buf.len()
        );
    }
}

/// Asserts that neither checker finds anything.
fn assert_sound_to_both(folder: &Folder, name: &str) {
    folder.assert_sound_here(name);
    folder.img(&format!(
        "check -q --object secret,id=s,data={PASSPHRASE} --image-opts \
         driver=qcow2,file.filename={name},encrypt.key-secret=s"
    ));
}

/// The bytes of a disk that anyone can see must not be those that the guest wrote.
fn assert_hidden(stored: &[u8], plain: &Plain) {
    for sector in plain.0.chunks(512).step_by(61) {
        if sector.iter().any(|byte| *byte != 0) {
            let found = stored.chunks(512).any(|stored| stored == sector);
            assert!(!found, "a sector is stored in clear text");
        }
    }
}

#[test]
fn what_is_encrypted_here_is_read_by_both() {
    if !is_available("encrypted images") {
        return;
    }
    for (name, recipe) in recipes() {
        println!("{name}");
        let folder = Folder::new();
        folder.create("image", &recipe);
        let open = || options().open_path(folder.path("image")).unwrap();
        let mut plain = Plain::zeros(LEN);
        let image = open();
        assert!(image.is_encrypted());
        work(&image, &mut plain, 0);
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        assert_sound_to_both(&folder, "image");
        plain.assert_is(&by_qemu(&folder, "image"));
        assert_hidden(&folder.read("image"), &plain);
        let commands = [
            "write -P 17 64k 200k",
            "write -z 1M 64k",
            "write -P 18 2560 512",
        ];
        io_by_qemu(&folder, "image", &commands);
        plain.0[64 << 10..264 << 10].fill(17);
        plain.clear(1 << 20..(1 << 20) + 65536);
        plain.0[2560..3072].fill(18);
        let image = open();
        plain.assert_is(&guest_bytes(&image));
        work(&image, &mut plain, 7);
        image.close().unwrap();
        assert_sound_to_both(&folder, "image");
        plain.assert_is(&by_qemu(&folder, "image"));
    }
}

#[test]
fn images_encrypted_by_qemu_are_read_and_written() {
    if !is_available("encrypted images") {
        return;
    }
    for format in ["luks", "aes"] {
        for more in ["", ",compat=0.10", ",extended_l2=on,preallocation=full"] {
            let folder = Folder::new();
            let time = if format == "luks" {
                ",encrypt.iter-time=10"
            } else {
                ""
            };
            folder.img(&format!(
                "create -q --object secret,id=s,data={PASSPHRASE} -f qcow2 \
                 -o encrypt.format={format},encrypt.key-secret=s{time}{more} image {LEN}"
            ));
            // What is preallocated there is deciphered zeros.
            io_by_qemu(
                &folder,
                "image",
                &["write -P 5 0 3M", "write -P 6 70000 1000", "write -z 1M 1M"],
            );
            let mut plain = Plain(vec![5; LEN]);
            plain.0[70_000..71_000].fill(6);
            plain.clear(1 << 20..2 << 20);
            let image = options().open_path(folder.path("image")).unwrap();
            plain.assert_is(&guest_bytes(&image));
            work(&image, &mut plain, 3);
            image.close().unwrap();
            assert_sound_to_both(&folder, "image");
            plain.assert_is(&by_qemu(&folder, "image"));
        }
    }
}

#[test]
fn it_is_never_opened_as_plain_data() {
    for (method, recipe) in [
        ("luks", luks(CreateOptions::new(1 << 20))),
        ("aes", aes(CreateOptions::new(1 << 20))),
    ] {
        let memory = in_memory(&recipe);
        let error = refusal(Image::options().open(memory.clone()));
        assert_eq!(
            error,
            format!("the image is encrypted ({method}) and needs a secret")
        );
        assert!(!error.contains(PASSPHRASE));
        let before = memory.to_vec().unwrap();
        let wrong = Image::options().secret(Secret::new(b"wrong".to_vec()));
        let opened = wrong.open(memory.clone());
        if method == "luks" {
            let error = refusal(opened);
            assert!(error.contains("passphrase"), "{error}");
        } else {
            // Nothing in a legacy image tells.
            drop(opened.unwrap());
        }
        assert_eq!(
            memory.to_vec().unwrap(),
            before,
            "a refused image was changed"
        );
    }
    let memory = in_memory(&CreateOptions::new(1 << 20));
    let error = refusal(options().open(memory));
    assert_eq!(error, "a secret was given, but the image is not encrypted");
    let shown = format!("{:?}", options());
    assert!(!shown.contains(PASSPHRASE), "{shown}");
    let shown = format!("{:?}", luks(CreateOptions::new(1)));
    assert!(!shown.contains(PASSPHRASE), "{shown}");
}

#[test]
fn each_layer_has_its_own_key() {
    for overlay in [
        luks(CreateOptions::new(LEN as u64)),
        CreateOptions::new(LEN as u64),
        aes(CreateOptions::new(LEN as u64)),
    ] {
        let folder = Folder::new();
        let below = Secret::new(b"another".to_vec());
        let cost = LuksOptions::new().cost(KeyCost::Iterations(1000));
        let again = Secret::new(b"another".to_vec());
        folder.create("base", &CreateOptions::new(LEN as u64).luks(cost, again));
        let mut plain = Plain::zeros(LEN);
        {
            let again = Secret::new(b"another".to_vec());
            let base = Image::options()
                .secret(again)
                .open_path(folder.path("base"))
                .unwrap();
            work(&base, &mut plain, 1);
        }
        let encrypted = overlay.clone();
        folder.create("top", &overlay.backing_file("base", "qcow2"));
        let header = header_of(&folder.open("top"));
        let mut options = Image::options()
            .references(qcow2_image::References::SameDirectory)
            .layer_secret(1, below);
        if header.crypt_method != CryptMethod::None {
            options = options.secret(secret());
        }
        let image = options.open_path(folder.path("top")).unwrap();
        plain.assert_is(&guest_bytes(&image));
        work(&image, &mut plain, 5);
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        folder.assert_sound_here("top");
        assert!(format!("{encrypted:?}").len() > 10);
    }
}

#[test]
fn data_files_are_encrypted_too() {
    for raw in [false, true] {
        let options = CreateOptions::new(LEN as u64).data_file("data");
        let data = Arc::new(Memory::new());
        let recipe = luks(options.clone().data_file_storage(data.clone()));
        let made = Image::create(&Memory::new(), &recipe.clone().data_file_raw(raw));
        if raw {
            let error = words(&made.unwrap_err());
            assert!(error.contains("data_file_raw"), "{error}");
            continue;
        }
        let memory = Arc::new(Memory::new());
        Image::create(&memory, &recipe).unwrap();
        let image = self::options()
            .data_file(data.clone())
            .open(memory.clone())
            .unwrap();
        let mut plain = Plain::zeros(LEN);
        work(&image, &mut plain, 2);
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        assert_hidden(&data.to_vec().unwrap(), &plain);
        assert_sound(&memory);
    }
}

#[test]
fn what_is_preallocated_reads_as_zeros() {
    for preallocation in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        for (name, recipe) in recipes() {
            let recipe = recipe.preallocation(preallocation);
            let memory = in_memory(&recipe);
            let image = options().open(memory.clone()).unwrap();
            let mut plain = Plain::zeros(LEN);
            plain.assert_is(&guest_bytes(&image));
            work(&image, &mut plain, 2);
            let old = plain.0.len();
            image
                .resize(old as u64 + 512, ResizeOptions::default())
                .unwrap();
            let preallocated = ResizeOptions {
                preallocation,
                shrink: false,
            };
            image.resize(old as u64 + (1 << 20), preallocated).unwrap();
            plain.0.resize(old + (1 << 20), 0);
            plain.assert_is(&guest_bytes(&image));
            work(&image, &mut plain, 4);
            plain.assert_is(&guest_bytes(&image));
            let shrink = ResizeOptions {
                shrink: true,
                ..ResizeOptions::default()
            };
            image.resize(100 * 512, shrink).unwrap();
            image.resize(1 << 20, ResizeOptions::default()).unwrap();
            plain.0.truncate(100 * 512);
            plain.0.resize(1 << 20, 0);
            plain.assert_is(&guest_bytes(&image));
            image.close().unwrap();
            assert_sound(&memory);
            println!("{name}");
        }
    }
}

#[test]
fn threads_write_parts_of_the_same_sectors() {
    let memory = in_memory(&luks(CreateOptions::new(1 << 20)));
    let image = options().open(memory.clone()).unwrap();
    // Each thread has its own bytes of every sector, and one writes whole sectors beside them.
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let image = &image;
            scope.spawn(move || {
                for sector in 0..200_u64 {
                    let at = sector * 1024 + u64::from(thread) * 128;
                    image.write_at(&[thread + 1; 128], at).unwrap();
                    image
                        .write_at(&[9; 128], sector * 1024 + 512 + u64::from(thread) * 128)
                        .unwrap();
                }
            });
        }
        let image = &image;
        scope.spawn(move || {
            for sector in 0..1000_u64 {
                image
                    .write_at(&[7; 512], (400 + sector % 1000) * 512)
                    .unwrap();
            }
        });
    });
    let found = guest_bytes(&image);
    for sector in found[..400 * 512].chunks(1024) {
        for (part, byte) in sector.chunks(128).zip([1, 2, 3, 4, 9, 9, 9, 9]) {
            assert_eq!(part, [byte; 128]);
        }
    }
    assert!(found[400 * 512..1400 * 512].iter().all(|byte| *byte == 7));
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn an_encrypted_image_takes_no_packed_clusters_but_reads_them() {
    let memory = in_memory(&luks(CreateOptions::new(1 << 20)));
    let image = options().open(memory).unwrap();
    let error = image
        .write_compressed(&vec![1; 65536], 0, Level::default())
        .unwrap_err();
    assert!(words(&error).contains("not encrypted"), "{}", words(&error));
    if !is_available("packed clusters in encrypted images") {
        return;
    }
    let folder = Folder::new();
    folder.create("image", &luks(CreateOptions::new(1 << 20)));
    io_by_qemu(
        &folder,
        "image",
        &["write -P 3 0 128k", "write -c -P 66 128k 64k"],
    );
    let image = options().open_path(folder.path("image")).unwrap();
    let mut plain = Plain::zeros(1 << 20);
    plain.0[..128 << 10].fill(3);
    plain.0[128 << 10..192 << 10].fill(66);
    plain.assert_is(&guest_bytes(&image));
    plain.write(&image, (128 << 10) + 1024, &[5; 512]);
    image.close().unwrap();
    plain.assert_is(&by_qemu(&folder, "image"));
}

#[test]
fn passphrases_come_and_go() {
    let memory = in_memory(&luks(CreateOptions::new(1 << 20)));
    let other = || Secret::new(b"another".to_vec());
    {
        let image = options().open(memory.clone()).unwrap();
        image.write_at(&[7; 5000], 100).unwrap();
        let key = image.unlock(&secret(), WorkLimit::default()).unwrap();
        let slots = image.key_slots().unwrap();
        let cost = KeyCost::Iterations(1000);
        assert_eq!(slots.add(&key, &other(), None, cost).unwrap(), 1);
        assert_eq!(slots.erase_matching(&secret()).unwrap(), [0]);
        // The last one stays.
        assert!(slots.erase_matching(&other()).is_err());
        let error = image.unlock(&secret(), WorkLimit::default()).unwrap_err();
        assert!(words(&error).contains("passphrase"), "{}", words(&error));
        image.close().unwrap();
    }
    assert_sound(&memory);
    let error = refusal(options().open(memory.clone()));
    assert!(!error.contains(PASSPHRASE), "{error}");
    let image = Image::options()
        .secret(other())
        .open(memory.clone())
        .unwrap();
    let mut found = [0; 5000];
    image.read_at(&mut found, 100).unwrap();
    assert_eq!(found, [7; 5000]);
    let plain = Image::options()
        .open(in_memory(&CreateOptions::new(1 << 20)))
        .unwrap();
    assert!(plain.key_slots().is_err());
}

#[test]
fn batches_are_encrypted() {
    let memory = in_memory(&luks(CreateOptions::new(1 << 20)));
    let image = options().open(memory.clone()).unwrap();
    image.write_at(&vec![1; 65536], 0).unwrap();
    let (first, second) = (noise(4096, 1), noise(700, 2));
    let mut found = vec![0; 4096];
    let mut ops = [
        Op::write(&first, 8192),
        Op::write(&second, 100),
        Op::read(&mut found, 32768),
    ];
    image.submit(&mut ops);
    for op in &mut ops {
        op.take_result().unwrap().unwrap();
    }
    assert_eq!(found, [1; 4096]);
    let mut plain = Plain::zeros(1 << 20);
    plain.0[..65536].fill(1);
    plain.0[8192..12288].copy_from_slice(&first);
    plain.0[100..800].copy_from_slice(&second);
    plain.assert_is(&guest_bytes(&image));
    assert_hidden(&memory.to_vec().unwrap(), &plain);
}

#[test]
fn data_of_each_algorithm_is_read_by_both() {
    if !is_available("encrypted images of each algorithm") {
        return;
    }
    for (algorithm, mode, vectors, hash) in [
        ("aes-128", "xts", "plain64", "sha1"),
        ("aes-192", "xts", "plain", "sha224"),
        ("aes-256", "cbc", "essiv", "sha512"),
        ("aes-128", "ctr", "plain64", "sha384"),
        ("aes-256", "ecb", "plain64", "ripemd160"),
        ("serpent-256", "xts", "plain64", "sha256"),
        ("serpent-128", "cbc", "plain64", "sha256"),
        ("twofish-256", "xts", "plain64", "sha256"),
        ("twofish-128", "cbc", "plain", "sha256"),
        ("cast5-128", "cbc", "plain64", "sha256"),
    ] {
        let mut choices = LuksOptions::new().cost(KeyCost::Iterations(1000));
        for (key, value) in [
            ("cipher-alg", algorithm),
            ("cipher-mode", mode),
            ("ivgen-alg", vectors),
            ("hash-alg", hash),
        ] {
            choices.set(key, value).unwrap();
        }
        let folder = Folder::new();
        folder.create(
            "image",
            &CreateOptions::new(1 << 20).luks(choices, secret()),
        );
        let image = options().open_path(folder.path("image")).unwrap();
        let mut plain = Plain::zeros(1 << 20);
        plain.write(&image, 3000, &noise(300_000, 1));
        plain.write(&image, 600_000, &noise(70_000, 2));
        image.close().unwrap();
        println!("{algorithm} {mode} {vectors} {hash}");
        plain.assert_is(&by_qemu(&folder, "image"));
        io_by_qemu(&folder, "image", &["write -P 23 1k 90k"]);
        plain.0[1 << 10..91 << 10].fill(23);
        let image = options().open_path(folder.path("image")).unwrap();
        plain.assert_is(&guest_bytes(&image));
    }
}

#[test]
fn snapshots_stay_encrypted() {
    for recipe in [
        luks(CreateOptions::new(LEN as u64)),
        aes(CreateOptions::new(LEN as u64).cluster_size(4096)),
    ] {
        let memory = in_memory(&recipe);
        let image = options().open(memory.clone()).unwrap();
        let mut plain = Plain::zeros(LEN);
        work(&image, &mut plain, 1);
        image.create_snapshot(&SnapshotOptions::new("s")).unwrap();
        let before = plain.clone();
        work(&image, &mut plain, 2);
        plain.assert_is(&guest_bytes(&image));
        let view = options().snapshot(SnapshotKey::any("s"));
        before.assert_is(&guest_bytes(&view.open(memory.clone()).unwrap()));
        image.apply_snapshot(&SnapshotKey::any("s")).unwrap();
        before.assert_is(&guest_bytes(&image));
        image.delete_snapshot(&SnapshotKey::any("s")).unwrap();
        work(&image, &mut before.clone(), 3);
        image.close().unwrap();
        assert_hidden(&memory.to_vec().unwrap(), &before);
        assert_sound(&memory);
    }
}
