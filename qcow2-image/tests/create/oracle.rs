//! `qemu-img`, run in a directory of its own, and beside it a directory for the images made here.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use qcow2_check::{Options, Verdict, check};
use qcow2_image::create::{CreateError, CreateOptions, write_image};
use qcow2_io::{File, FileOptions, LockMode, Storage};
use tempfile::TempDir;

/// Name of every image.
pub(crate) const IMAGE: &str = "a.qcow2";
/// Name of every external data file.
pub(crate) const DATA: &str = "d.raw";

/// Whether `qemu-img` is there. If not, says how many cases of a test that leaves out; where it is required, fails.
pub(crate) fn is_available(cases: usize, what: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "qemu-img not found, but required by the environment"
    );
    eprintln!("skipped {cases} {what}: qemu-img not found");
    false
}

/// An image to be made twice: the size as on a command line, and options as after `-o`.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) size: String,
    pub(crate) options: Vec<(&'static str, String)>,
}

impl Recipe {
    pub(crate) fn new(size: impl Display + Copy, options: &str) -> Self {
        let mut recipe = Self {
            size: size.to_string(),
            options: Vec::new(),
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap();
            recipe = recipe.with(key, value);
        }
        recipe
    }

    pub(crate) fn with(mut self, key: &str, value: impl Display + Copy) -> Self {
        const KEYS: [&str; 12] = [
            "size",
            "compat",
            "cluster_size",
            "refcount_bits",
            "preallocation",
            "lazy_refcounts",
            "extended_l2",
            "compression_type",
            "backing_file",
            "backing_fmt",
            "data_file",
            "data_file_raw",
        ];
        let key = KEYS.into_iter().find(|known| *known == key);
        self.options
            .push((key.unwrap_or("unknown"), value.to_string()));
        self
    }

    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        let found = self.options.iter().rev().find(|(k, _)| *k == key);
        found.map(|(_, value)| value.as_str())
    }

    /// The options as this crate takes them.
    pub(crate) fn parse(&self) -> Result<CreateOptions, CreateError> {
        let mut options = CreateOptions::default();
        options.set("size", &self.size)?;
        for (key, value) in &self.options {
            options.set(key, value)?;
        }
        Ok(options)
    }
}

/// Two directories for the same image.
#[derive(Debug)]
pub(crate) struct Pair {
    dir: TempDir,
}

impl Pair {
    /// Empty ones, in memory where the system has a place for that.
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("qcow2-create-")
            .tempdir_in("/dev/shm");
        let dir = dir.or_else(|_| tempfile::tempdir()).unwrap();
        for name in ["theirs", "ours"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    pub(crate) fn theirs(&self) -> PathBuf {
        self.dir.path().join("theirs")
    }

    pub(crate) fn ours(&self) -> PathBuf {
        self.dir.path().join("ours")
    }

    /// Makes the image with QEMU. A backing file needn't exist.
    pub(crate) fn make_theirs(&self, recipe: &Recipe) -> Result<(), String> {
        let mut args: Vec<_> = ["create", "-q", "-u", "-f", "qcow2"]
            .map(str::to_owned)
            .into();
        for (key, value) in &recipe.options {
            let value = value.replace(',', ",,");
            args.extend(["-o".to_owned(), format!("{key}={value}")]);
        }
        // As an option, so that the same parser reads it as reads the others.
        args.extend(["-o".to_owned(), format!("size={}", recipe.size)]);
        args.push(IMAGE.to_owned());
        qemu_img(&self.theirs(), &args).map(|_| ())
    }

    /// Makes the image here.
    pub(crate) fn make_ours(&self, recipe: &Recipe) -> Result<(), CreateError> {
        let options = recipe.parse()?;
        let data = recipe.value("data_file").map(|_| self.new_file(DATA));
        let data = data.as_ref().map(|file| -> &dyn Storage { file });
        write_image(&self.new_file(IMAGE), data, &options)
    }

    /// Makes the image in both directories; says whether it could be made.
    ///
    /// # Panics
    ///
    /// When one refuses what the other doesn't.
    pub(crate) fn make_both(&self, recipe: &Recipe) -> bool {
        match (self.make_theirs(recipe), self.make_ours(recipe)) {
            (Ok(()), Ok(())) => true,
            (Err(_), Err(_)) => false,
            (theirs, ours) => panic!("{recipe:?}: QEMU says {theirs:?}, here it is {ours:?}"),
        }
    }

    fn new_file(&self, name: &str) -> File {
        self.open(FileOptions::new().write(true).create(true), name)
    }

    /// Without locks: the processes that other threads start hold them, too, until they become `qemu-img`.
    fn open(&self, options: FileOptions, name: &str) -> File {
        let path = self.ours().join(name);
        options.lock(LockMode::None).open(path).unwrap()
    }

    /// Asserts that both checkers call the image made here sound.
    pub(crate) fn assert_sound(&self, recipe: &Recipe) {
        self.assert_sound_here(recipe);
        // Without the backing file, which need not be there.
        let image = format!(
            r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{IMAGE}"}}}}"#
        );
        let args = ["check", "-q", &image].map(str::to_owned);
        if let Err(words) = qemu_img(&self.ours(), &args) {
            panic!("{recipe:?}: {words}");
        }
    }

    /// Asserts that this workspace's checker calls the image made here sound.
    pub(crate) fn assert_sound_here(&self, recipe: &Recipe) {
        let file = self.open(FileOptions::new(), IMAGE);
        let report = check(&file, &Options::default());
        assert_eq!(
            report.verdict(),
            Verdict::Sound,
            "{recipe:?}: {:?}",
            report.findings
        );
    }

    /// Asserts that QEMU says the same of both images, except how long the files are.
    pub(crate) fn assert_same_info(&self, recipe: &Recipe) {
        let info = |dir: &Path| {
            let args = ["info", "--output=json", "-f", "qcow2", IMAGE].map(str::to_owned);
            let text = qemu_img(dir, &args).unwrap();
            let start = text.rfind("\"virtual-size\"").unwrap();
            let lines = text[start..].lines();
            let lines = lines.filter(|line| !line.contains("\"actual-size\""));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let ours = info(&self.ours());
        assert!(ours.iter().any(|line| line.contains("\"refcount-bits\"")));
        assert_eq!(ours, info(&self.theirs()), "{recipe:?}");
    }
}

/// What QEMU prints, or its complaint.
pub(crate) fn qemu_img(dir: &Path, args: &[String]) -> Result<String, String> {
    let output = Command::new("qemu-img")
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap());
    }
    let words = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&words).into_owned())
}

/// Calls `work` for each item, on all cores.
pub(crate) fn on_all_cores<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, Into::into) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}
