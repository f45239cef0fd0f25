use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2_io::codec::{Codec, CodecError};
use qcow2_io::{FileOptions, LockMode, Storage};
use tempfile::TempDir;
use zlib_rs::{Deflate, DeflateFlush};

const CODECS: [Codec; 2] = [Codec::Zlib, Codec::Zstd];
/// In an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Pseudo-random numbers, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }

    /// Bytes that repeat themselves more or less.
    fn text(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let newness = 1 + self.below(40);
        while bytes.len() < len {
            if bytes.is_empty() || self.below(50) < newness {
                bytes.push(self.byte());
            } else {
                let distance = 1 + self.below(bytes.len());
                for _ in 0..3 + self.below(60) {
                    bytes.push(bytes[bytes.len() - distance]);
                }
            }
        }
        bytes.truncate(len);
        bytes
    }
}

/// An image file, looked at as far as the place of its compressed clusters.
struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
    cluster_bits: u32,
}

impl Image {
    fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let cluster_bits = u32::from(bytes[23]);
        Self {
            path: path.into(),
            bytes,
            cluster_bits,
        }
    }

    fn number(&self, offset: usize) -> u64 {
        u64::from_be_bytes(self.bytes[offset..offset + 8].try_into().unwrap())
    }

    fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Where the L2 entry of a guest cluster lies.
    fn entry_at(&self, cluster: usize) -> usize {
        let per_table = self.cluster_len() / 8;
        let l1 = usize::try_from(self.number(40)).unwrap();
        let l2 = self.number(l1 + cluster / per_table * 8) & OFFSET_MASK;
        assert_ne!(l2, 0, "the guest cluster has an L2 table");
        usize::try_from(l2).unwrap() + cluster % per_table * 8
    }

    /// The window that holds the stream of a guest cluster, if it is compressed.
    fn window(&self, cluster: usize) -> Option<&[u8]> {
        let entry = self.number(self.entry_at(cluster));
        if entry & COMPRESSED == 0 {
            return None;
        }
        let split = 62 - (self.cluster_bits - 8);
        let offset = usize::try_from(entry & ((1 << split) - 1)).unwrap();
        let sectors = usize::try_from((entry & (COMPRESSED - 1)) >> split).unwrap();
        let end = (sectors + 1) * 512 + offset / 512 * 512;
        Some(&self.bytes[offset..end.min(self.bytes.len())])
    }

    /// Puts a stream at the end of the file and makes a guest cluster of it.
    fn set(&mut self, cluster: usize, stream: &[u8]) {
        let (at, offset) = (self.entry_at(cluster), self.bytes.len());
        assert!(offset.is_multiple_of(512));
        self.bytes.extend(stream);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        let sectors = (self.bytes.len() - offset) / 512 - 1;
        assert!(
            sectors < 2 * self.cluster_len() / 512,
            "the window holds the stream"
        );
        let split = 62 - (self.cluster_bits - 8);
        let entry = COMPRESSED | (sectors as u64) << split | offset as u64;
        self.bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }

    fn save(&self) {
        let options = FileOptions::new()
            .write(true)
            .truncate(true)
            .lock(LockMode::None);
        let file = options.open(&self.path).unwrap();
        file.write_at(&self.bytes, 0).unwrap();
    }

    /// What qemu-io reads of each of the first `count` clusters; `None` where it fails.
    fn read_by_qemu(&self, count: usize) -> Vec<Option<Vec<u8>>> {
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", "qcow2"]);
        let len = self.cluster_len();
        for cluster in 0..count {
            command
                .arg("-c")
                .arg(format!("read -v {} {len}", cluster * len));
        }
        let output = command.arg(&self.path).output().unwrap();
        let mut clusters = Vec::new();
        let mut bytes = Vec::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if line.starts_with("read failed") {
                clusters.push(None);
            } else if line.starts_with("read ") {
                clusters.push(Some(std::mem::take(&mut bytes)));
            } else if line.get(8..11) == Some(":  ") {
                let digits = &line[11..11 + 16 * 3];
                bytes.extend(
                    digits
                        .split_whitespace()
                        .map(|byte| u8::from_str_radix(byte, 16).unwrap()),
                );
            }
        }
        assert_eq!(
            clusters.len(),
            count,
            "qemu-io answers each command: {output:?}"
        );
        clusters
    }
}

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

#[test]
fn what_qemu_compressed_is_decoded() {
    if !crate::qemu_is_here() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    for (codec, bits) in CODECS
        .into_iter()
        .flat_map(|codec| (9..=21).map(move |bits| (codec, bits)))
    {
        let cluster_len: usize = 1 << bits;
        let count = (1 << 20 >> bits).clamp(3, 600);
        let mut random = Random(cluster_len as u64);
        let disk: Vec<u8> = (0..count).flat_map(|_| random.text(cluster_len)).collect();
        // The last cluster is half a cluster, and padded.
        let disk = &disk[..disk.len() - cluster_len / 2];
        fs::write(&raw, disk).unwrap();
        let options = format!("cluster_size={cluster_len},compression_type={codec}");
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to,
        ]);

        let image = Image::open(&image);
        let mut compressed = 0;
        let mut out = vec![0; cluster_len];
        for (cluster, expected) in disk.chunks(cluster_len).enumerate() {
            let Some(window) = image.window(cluster) else {
                continue;
            };
            compressed += 1;
            codec.decompress(window, &mut out).unwrap();
            assert!(
                out.starts_with(expected),
                "{codec}, cluster {cluster} of {cluster_len} bytes"
            );
            assert!(out[expected.len()..].iter().all(|byte| *byte == 0));
        }
        assert!(
            compressed * 4 > count,
            "{codec}: only {compressed} of {count} are compressed"
        );
    }
}

fn deflate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let window = u8::try_from(9 + random.below(7)).unwrap();
    let level = i32::try_from(random.below(10)).unwrap();
    let end = match random.below(8) {
        0 => DeflateFlush::SyncFlush,
        1 => DeflateFlush::PartialFlush,
        _ => DeflateFlush::Finish,
    };
    let mut out = vec![0; 2 * bytes.len() + 100];
    let mut encoder = Deflate::new(level, false, window);
    encoder.compress(bytes, &mut out, end).unwrap();
    out.truncate(usize::try_from(encoder.total_out()).unwrap());
    out
}

fn zstd(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    use zstd_safe::CParameter;
    let mut encoder = zstd_safe::CCtx::create();
    let level = i32::try_from(random.below(12)).unwrap();
    for parameter in [
        CParameter::CompressionLevel(level),
        CParameter::ChecksumFlag(random.below(4) == 0),
        CParameter::ContentSizeFlag(random.below(2) == 0),
        CParameter::WindowLog(u32::try_from(10 + random.below(18)).unwrap()),
    ] {
        encoder.set_parameter(parameter).unwrap();
    }
    let mut out = vec![0; 2 * bytes.len() + 100];
    let len = encoder.compress2(&mut out[..], bytes).unwrap();
    out.truncate(len);
    out
}

/// A stream for a cluster of that length, as it should be or wrong in one of many ways.
fn stream(codec: Codec, cluster_len: usize, random: &mut Random) -> Vec<u8> {
    let content = match random.below(6) {
        0 => random.below(cluster_len),
        1 => cluster_len - 1,
        2 => cluster_len + 1 + random.below(cluster_len),
        _ => cluster_len,
    };
    let bytes = random.text(content);
    let mut stream = match codec {
        Codec::Zlib => deflate(&bytes, random),
        _ if random.below(3) == 0 => {
            // Two frames, something skippable between them.
            let (head, tail) = bytes.split_at(random.below(content + 1));
            let mut frames = zstd(head, random);
            let skipped = random.byte();
            frames.extend([0x50, 0x2a, 0x4d, 0x18, skipped, 0, 0, 0]);
            frames.extend((0..skipped).map(|_| 0x33));
            frames.extend(zstd(tail, random));
            frames
        }
        _ => zstd(&bytes, random),
    };
    match random.below(6) {
        0 => stream.truncate(random.below(stream.len()) + 1),
        1 | 2 => {
            let at = random.below(stream.len());
            stream[at] ^= 1 << random.below(8);
        }
        _ => {}
    }
    if random.below(3) == 0 {
        let tail = random.below(600);
        stream.extend((0..tail).map(|_| random.byte()));
    }
    // A window is two clusters at most.
    stream.truncate(2 * cluster_len);
    stream
}

#[test]
fn streams_good_and_bad_are_judged_as_qemu_does() {
    const COUNT: usize = 512;
    if !crate::qemu_is_here() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    for (seed, codec) in (7..).zip(CODECS) {
        let options = format!("cluster_size=4096,preallocation=metadata,compression_type={codec}");
        let size = (COUNT * 4096).to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            path.to_str().unwrap(),
            &size,
        ]);
        let mut image = Image::open(&path);
        let mut random = Random(seed);
        for cluster in 0..COUNT {
            let stream = stream(codec, 4096, &mut random);
            image.set(cluster, &stream);
        }
        image.save();

        let judged = image.read_by_qemu(COUNT);
        let good = judged.iter().flatten().count();
        assert!(
            good > COUNT / 4 && good < COUNT * 3 / 4,
            "{good} of {COUNT} are good"
        );
        let mut stricter = 0;
        for (cluster, expected) in judged.iter().enumerate() {
            let mut out = vec![0; 4096];
            let window = image.window(cluster).unwrap();
            match (codec.decompress(window, &mut out), expected) {
                (Ok(()), Some(expected)) => assert!(out == *expected, "{codec}, stream {cluster}"),
                (Err(_), None) => {}
                // Each version of the zstd library finds a little more damage, and QEMU's may be older than ours.
                (Err(CodecError::Damaged { .. }), Some(_)) if codec == Codec::Zstd => stricter += 1,
                (found, _) => panic!("{codec}, stream {cluster}: we say {found:?}, QEMU not"),
            }
        }
        assert!(
            stricter * 100 < COUNT,
            "{stricter} of {COUNT} are fine for QEMU only"
        );
    }
}
