//! Random chains in memory, and beside each layer the bytes that its disk holds.

use std::sync::Arc;

use qcow2_check::{Code, Options, Severity, check};
use qcow2_format::header::Version;
use qcow2_image::chain::BackingFile;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Memory, Storage, ZeroFlags};

/// What a layer is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) raw: bool,
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    pub(crate) extended: bool,
    pub(crate) old: bool,
    pub(crate) lazy: bool,
}

impl Spec {
    /// Anything; `bottom` may be raw.
    pub(crate) fn random(random: &mut Random, bottom: bool) -> Self {
        let extended = random.one_in(4);
        let old = !extended && random.one_in(5);
        Self {
            raw: bottom && random.one_in(2),
            size: random.within(150..500) << 10 | if random.one_in(3) { 512 } else { 0 },
            cluster: if extended {
                random.pick(&[16384, 32768, 65536])
            } else {
                random.pick(&[512, 2048, 4096, 4096, 16384, 65536])
            },
            extended,
            old,
            lazy: !old && random.one_in(5),
        }
    }

    pub(crate) fn format(&self) -> &'static str {
        if self.raw { "raw" } else { "qcow2" }
    }

    pub(crate) fn options(&self, backing: Option<(&str, &str)>) -> CreateOptions {
        let mut options = CreateOptions::new(self.size)
            .cluster_size(self.cluster)
            .extended_l2(self.extended)
            .lazy_refcounts(self.lazy);
        if self.old {
            options = options.version(Version::V2);
        }
        match backing {
            Some((name, format)) => options.backing_file(name, format),
            None => options,
        }
    }
}

/// A layer, and what its disk holds.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) spec: Spec,
    pub(crate) file: Arc<dyn Storage>,
    pub(crate) view: Vec<u8>,
}

/// A chain, the bottom first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pile {
    pub(crate) layers: Vec<Layer>,
}

impl Pile {
    /// `count` layers with something in each, whose names begin with `prefix`.
    pub(crate) fn random(random: &mut Random, count: usize, prefix: &str) -> Self {
        let mut pile = Self::default();
        for number in 0..count {
            let spec = Spec::random(random, number == 0);
            pile.add(format!("{prefix}{number}"), spec);
            pile.fill(random);
        }
        pile
    }

    /// Puts an empty layer on top.
    pub(crate) fn add(&mut self, name: String, spec: Spec) {
        let file = Arc::new(Memory::new());
        let below = self.layers.last();
        let mut view = below.map_or_else(Vec::new, |below| below.view.clone());
        view.resize(usize::try_from(spec.size).unwrap(), 0);
        if spec.raw {
            file.set_len(spec.size).unwrap();
        } else {
            let backing = below.map(|below| (&*below.name, below.spec.format()));
            Image::create(&file, &spec.options(backing)).unwrap();
        }
        self.layers.push(Layer {
            name,
            spec,
            file,
            view,
        });
    }

    /// Writes something to the top layer.
    pub(crate) fn fill(&mut self, random: &mut Random) {
        let count = self.layers.len();
        let top = self.layers.last().unwrap().clone();
        if top.spec.raw {
            self.write(&*top.file, None, random);
            return;
        }
        let image = self.open(count, &[count - 1]);
        if random.one_in(3) && !top.spec.raw {
            self.write(&image, Some(&image), random);
            image
                .create_snapshot(&SnapshotOptions::new("kept"))
                .unwrap();
        }
        self.write(&image, Some(&image), random);
        image.close().unwrap();
    }

    fn write(&mut self, disk: &dyn Storage, image: Option<&Image>, random: &mut Random) {
        let Layer { view, spec, .. } = self.layers.last_mut().unwrap();
        for _ in 0..random.within(1..9) {
            let len = view.len() as u64;
            let start = random.below(len);
            let end = (start + random.within(1..len / 4)).min(len);
            let (start, end) = if random.one_in(2) {
                let unit = spec.cluster;
                (start / unit * unit, end.next_multiple_of(unit).min(len))
            } else {
                (start, end)
            };
            let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
            match random.below(6) {
                0 => {
                    disk.write_zeroes(start..end, ZeroFlags::MAY_UNMAP).unwrap();
                    view[range].fill(0);
                }
                1 if image.is_some_and(|_| start % spec.cluster == 0) => {
                    let whole = (end - start) / spec.cluster * spec.cluster;
                    let bytes = content(random, whole);
                    let image = image.unwrap();
                    image
                        .write_compressed(&bytes, start, Level::default())
                        .unwrap();
                    view[range.start..range.start + bytes.len()].copy_from_slice(&bytes);
                }
                // The same once more, where nobody would see it.
                2 => disk.write_at(&view[range], start).unwrap(),
                _ => {
                    let bytes = content(random, end - start);
                    disk.write_at(&bytes, start).unwrap();
                    view[range].copy_from_slice(&bytes);
                }
            }
        }
    }

    /// The chain of the first `count` layers, whose top is an image; those in `writable` are open for writing.
    pub(crate) fn open(&self, count: usize, writable: &[usize]) -> Image {
        let mut below: Option<BackingFile> = None;
        for (number, layer) in self.layers.iter().enumerate().take(count) {
            if layer.spec.raw {
                below = Some(BackingFile::raw(&*layer.name, Arc::clone(&layer.file)));
                continue;
            }
            let options = Image::options().read_only(!writable.contains(&number));
            let options = match below.take() {
                Some(below) => options.backing_file(&below),
                None => options,
            };
            let image = options.open(Arc::clone(&layer.file)).unwrap();
            if number + 1 == count {
                return image;
            }
            below = Some(BackingFile::image(&*layer.name, Arc::new(image)));
        }
        panic!("the top of the chain is no image");
    }

    /// The first `count` layers, as a backing file.
    pub(crate) fn backing(&self, count: usize) -> BackingFile {
        let layer = &self.layers[count - 1];
        if layer.spec.raw {
            BackingFile::raw(&*layer.name, Arc::clone(&layer.file))
        } else {
            BackingFile::image(&*layer.name, Arc::new(self.open(count, &[])))
        }
    }

    pub(crate) fn top(&self) -> &Layer {
        self.layers.last().unwrap()
    }
}

/// Bytes of some kinds: zeros, few, many.
pub(crate) fn content(random: &mut Random, len: u64) -> Vec<u8> {
    let len = usize::try_from(len).unwrap();
    let kind = random.below(5);
    let mut bytes = Vec::with_capacity(len + 4096);
    while bytes.len() < len {
        let word = random.draw();
        match kind {
            0 => bytes.resize(len, u8::try_from(word % 3).unwrap()),
            1 if word.is_multiple_of(2) => bytes.resize(bytes.len() + 3000, 0),
            _ => bytes.extend(word.to_be_bytes().repeat(20)),
        }
    }
    bytes.truncate(len);
    bytes
}

pub(crate) fn read(disk: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.len().unwrap()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Where two disks first differ.
pub(crate) fn difference(one: &[u8], two: &[u8]) -> Option<(usize, usize, usize)> {
    let at = one.iter().zip(two).position(|(one, two)| one != two);
    match at {
        Some(at) => Some((at, one.len(), two.len())),
        None if one.len() == two.len() => None,
        None => Some((one.len().min(two.len()), one.len(), two.len())),
    }
}

/// What is wrong with an image that was closed; leaks count.
pub(crate) fn flaws(storage: &dyn Storage) -> Vec<(Code, u64)> {
    let report = check(storage, &Options::default());
    let totals = report.totals.iter().copied();
    totals
        .filter(|(code, count)| {
            use Severity::{Corruption, Error, Leak};
            *count > 0 && matches!(code.severity(), Corruption | Error | Leak)
        })
        .collect()
}
