use qcow2_image::luks::{KeyCost, LuksOptions, create, info};
use qcow2_io::Storage;
use qcow2_io::cipher::{Algorithm, Hash, IvGenerator, Mode};

use crate::area::{secret, unlock};
use crate::oracle::{Folder, area_of, first_cluster, is_available, on_all_cores};

/// Every algorithm with every mode that QEMU has for it.
fn ciphers() -> Vec<(Algorithm, Mode)> {
    let all = Algorithm::ALL
        .into_iter()
        .flat_map(|algorithm| Mode::ALL.map(|mode| (algorithm, mode)));
    all.filter(|(algorithm, mode)| {
        (algorithm.key_len() != 24 || *mode == Mode::Xts)
            && (*algorithm != Algorithm::Cast5 || *mode != Mode::Xts)
    })
    .collect()
}

/// The generators of vectors that QEMU has for an algorithm.
fn generators(algorithm: Algorithm) -> Vec<IvGenerator> {
    let essiv: &[_] = match algorithm {
        Algorithm::Cast5 => &[Hash::Md5],
        _ => &[Hash::Md5, Hash::Sha256, Hash::Sm3],
    };
    let essiv = essiv.iter().copied().map(IvGenerator::Essiv);
    [IvGenerator::Plain, IvGenerator::Plain64]
        .into_iter()
        .chain(essiv)
        .collect()
}

#[test]
fn all_that_qemu_makes_opens_here() {
    let ciphers = ciphers();
    assert_eq!(ciphers.len(), 30);
    if !is_available(ciphers.len(), "algorithms made by QEMU") {
        return;
    }
    let folder = Folder::new();
    let cases: Vec<_> = ciphers.into_iter().enumerate().collect();
    on_all_cores(&cases, |(number, (algorithm, mode))| {
        let generators = generators(*algorithm);
        let generator = generators[number % generators.len()];
        let hash = Hash::ALL[number % Hash::ALL.len()];
        let name = format!("{number}.qcow2");
        let generator_text = generator.to_string();
        let (vectors, vectors_hash) = generator_text
            .split_once(':')
            .unwrap_or((&generator_text, "sha1"));
        let texts = [algorithm.to_string(), mode.to_string(), hash.to_string()];
        let options = [
            ("cipher-alg", &*texts[0]),
            ("cipher-mode", &texts[1]),
            ("ivgen-alg", vectors),
            ("ivgen-hash-alg", vectors_hash),
            ("hash-alg", &texts[2]),
            ("iter-time", "10"),
        ];
        folder.create(&name, "right", &options).unwrap();
        let file = folder.open(&name);
        let area = area_of(&file);
        assert_eq!(
            unlock(&file, area, "right").unwrap().slot(),
            0,
            "{options:?}"
        );
        let wrong = unlock(&file, area, "wrong").unwrap_err();
        assert_eq!(wrong.to_string(), "the passphrase opens no key slot");

        let mut parsed = LuksOptions::new();
        for (key, value) in options {
            parsed.set(key, value).unwrap();
        }
        assert_eq!(parsed.area_len().unwrap(), area.len);
        let info = info(&file, area).unwrap();
        assert_eq!(info.algorithm, *algorithm);
        assert_eq!(info.mode, *mode);
        assert_eq!(info.iv_generator, generator);
        assert_eq!(info.hash, hash);
        let theirs = folder.info(&name);
        for fact in [
            format!(r#""uuid": "{}""#, info.uuid),
            format!(r#""payload-offset": {}"#, info.payload_offset),
            format!(r#""master-key-iters": {}"#, info.master_key_iterations),
            format!(r#""iters": {}"#, info.slots[0].iterations),
            format!(r#""key-offset": {}"#, info.slots[7].key_offset),
            format!(r#""stripes": {}"#, info.slots[0].stripes),
        ] {
            assert!(theirs.contains(&fact), "{fact} is not in {theirs}");
        }
    });
}

#[test]
fn all_that_is_made_here_opens_in_qemu_and_encrypts_the_same() {
    let cases: Vec<_> = ciphers()
        .into_iter()
        .flat_map(|(algorithm, mode)| {
            let generators = generators(algorithm).into_iter();
            generators.map(move |generator| (algorithm, mode, generator))
        })
        .zip(Hash::ALL.into_iter().cycle())
        .enumerate()
        .collect();
    if !is_available(cases.len(), "algorithms made here") {
        return;
    }
    let folder = Folder::new();
    // Areas of the same length are exchangeable.
    let lengths = [
        (16, "aes-128", "cbc"),
        (32, "aes-256", "cbc"),
        (48, "aes-192", "xts"),
        (64, "aes-256", "xts"),
    ];
    on_all_cores(&lengths, |(key_len, algorithm, mode)| {
        let options = [
            ("cipher-alg", *algorithm),
            ("cipher-mode", mode),
            ("iter-time", "10"),
        ];
        let name = format!("template-{key_len}");
        folder.create(&name, "theirs", &options).unwrap();
    });
    on_all_cores(&cases, |(number, ((algorithm, mode, generator), hash))| {
        let name = format!("{number}.qcow2");
        let template = format!("template-{}", mode.key_len(*algorithm));
        folder.copy(&template, &name);
        let file = folder.open(&name);
        let area = area_of(&file);
        let options = LuksOptions::new()
            .algorithm(*algorithm)
            .mode(*mode)
            .iv_generator(*generator)
            .hash(*hash)
            .cost(KeyCost::Iterations(1000));
        assert_eq!(options.area_len().unwrap(), area.len);
        create(&file, area.offset, &options, &secret("ours")).unwrap();

        folder.io(&name, "ours", "write -P 0x5a 0 64k").unwrap();
        assert!(!folder.opens(&name, "theirs"), "{options:?}");
        let unlocked = unlock(&file, area, "ours").unwrap();
        let at = first_cluster(&file);
        let mut data = vec![0; 65536];
        file.read_at(&mut data, at).unwrap();
        assert!(data.iter().any(|byte| *byte != 0x5a));
        unlocked.cipher().decrypt(at / 512, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == 0x5a), "{options:?}");
        std::fs::remove_file(folder.path(&name)).unwrap();
    });
}

/// Options that nobody can have.
const REFUSED: [&[(&str, &str)]; 18] = [
    &[("cipher-alg", "des")],
    &[("cipher-alg", "3des")],
    &[("cipher-alg", "sm4")],
    &[("cipher-alg", "aes-257")],
    &[("cipher-mode", "gcm")],
    &[("ivgen-alg", "benbi")],
    &[("ivgen-hash-alg", "sha3")],
    &[("hash-alg", "whirlpool")],
    &[("iter-time", "-1")],
    &[("iter-time", "10k")],
    &[("iter-time", "99999999999999999999")],
    &[("cipher-alg", "cast5-128")],
    &[("ivgen-alg", "essiv"), ("ivgen-hash-alg", "sha1")],
    &[("ivgen-alg", "essiv"), ("ivgen-hash-alg", "sha224")],
    &[("ivgen-alg", "essiv"), ("ivgen-hash-alg", "sha512")],
    &[("cipher-alg", "aes-192"), ("cipher-mode", "cbc")],
    &[("cipher-alg", "serpent-192"), ("cipher-mode", "ctr")],
    &[
        ("cipher-alg", "cast5-128"),
        ("cipher-mode", "cbc"),
        ("ivgen-alg", "essiv"),
    ],
];

#[test]
fn what_qemu_refuses_or_aborts_on_is_refused() {
    let here = |options: &[(&str, &str)]| {
        let mut parsed = LuksOptions::new();
        for (key, value) in options {
            parsed.set(key, value)?;
        }
        parsed.area_len()
    };
    for options in REFUSED {
        let error = here(options).unwrap_err();
        assert!(!error.to_string().is_empty(), "{options:?}");
    }
    if !is_available(REFUSED.len(), "options that QEMU refuses") {
        return;
    }
    let folder = Folder::new();
    on_all_cores(&REFUSED, |options| {
        let name = format!("{options:?}").replace(|c: char| !c.is_alphanumeric(), "");
        let all: Vec<_> = [options, [("iter-time", "10")].as_slice()].concat();
        let all = if options[0].0 == "iter-time" {
            options.to_vec()
        } else {
            all
        };
        assert!(folder.create(&name, "key", &all).is_err(), "{options:?}");
    });
}

#[test]
fn times_are_measured_and_never_below_a_thousand_iterations() {
    let disk = qcow2_io::Memory::new();
    let mut options = crate::area::small();
    options.set("iter-time", "0").unwrap();
    create(&disk, 0, &options, &secret("key")).unwrap();
    let area = qcow2_image::luks::LuksArea {
        offset: 0,
        len: options.area_len().unwrap(),
    };
    let told = info(&disk, area).unwrap();
    assert_eq!(told.slots[0].iterations, 1000);
    assert_eq!(told.master_key_iterations, 1000);
    assert_eq!(told.work, 2000);

    options.set("iter-time", "0xffffffffffffffff").unwrap();
    let error = create(&disk, 0, &options, &secret("key")).unwrap_err();
    assert!(error.to_string().contains("more iterations than"));
}
