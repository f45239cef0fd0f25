//! The reference program: `qemu-img` and `qemu-io`, run in a directory of their own.
//!
//! Nothing here shares code with the checker that it judges, except the type of the counts.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use qcow2_check::Counts;
use tempfile::TempDir;

/// After this a check by QEMU counts as one that never ends. On an idle machine the longest takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes kept of what QEMU says to stderr; it can be as much as the image is large.
const MESSAGE_BYTES: u64 = 4096;
/// Passphrase of every encrypted image.
const SECRET: &str = "secret,id=s0,data=hello";

/// Whether the tools are there. If not, says how many cases of a test that leaves out; where QEMU is required, fails.
pub(crate) fn is_available(cases: usize, what: &str) -> bool {
    let missing: Vec<_> = ["qemu-img", "qemu-io"]
        .into_iter()
        .filter(|tool| Command::new(tool).arg("--version").output().is_err())
        .collect();
    if missing.is_empty() {
        return true;
    }
    let missing = missing.join(", ");
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "{missing} not found, but required by the environment"
    );
    eprintln!("skipped {cases} {what}: {missing} not found");
    false
}

/// What `qemu-img check` says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    /// Exit code; `None` when it was ended by a signal, or did not end by itself.
    pub(crate) exit: Option<i32>,
    /// The counts, if it came so far as to print some.
    pub(crate) counts: Option<Counts>,
    /// The first bytes of its messages.
    pub(crate) message: String,
}

/// How the tools must be told of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// By its name.
    Plain,
    /// By its name, with the passphrase.
    WithSecret,
}

/// A directory with images, and the tools to work on them.
#[derive(Debug)]
pub(crate) struct Workshop {
    dir: TempDir,
}

impl Workshop {
    /// An empty one, in memory where the system has a place for that.
    pub(crate) fn new() -> Self {
        let shared = Path::new("/dev/shm");
        let dir = tempfile::Builder::new()
            .prefix("qcow2-check-")
            .tempdir_in(shared);
        Self {
            dir: dir.or_else(|_| tempfile::tempdir()).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// The beginning of a file, at most `limit` bytes.
    pub(crate) fn read_start(&self, name: &str, limit: u64) -> Vec<u8> {
        let file = fs::File::open(self.path(name)).unwrap();
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Runs `tool` in the directory. A failure is told with the command and the tool's words.
    pub(crate) fn run(&self, tool: &str, args: &[String]) -> Result<(), String> {
        let output = Command::new(tool)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{tool}: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "{tool} {}: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        ))
    }

    /// Makes an image with `qemu-img create`; `options` as after `-o`, `more` as it is.
    pub(crate) fn create(
        &self,
        name: &str,
        size: &str,
        options: &str,
        more: &[&str],
    ) -> Result<(), String> {
        let mut args = words("create -q -f qcow2 --object");
        args.push(SECRET.to_owned());
        if !options.is_empty() {
            args.extend(["-o".to_owned(), options.to_owned()]);
        }
        args.extend(more.iter().map(ToString::to_string));
        args.extend([name.to_owned(), size.to_owned()]);
        self.run("qemu-img", &args)
    }

    /// Asks QEMU for its judgement on an image.
    pub(crate) fn check(&self, name: &str, access: Access) -> Judgement {
        self.judge(name, access, "check --output=json")
    }

    /// Lets QEMU repair an image as far as it goes; what it says of that.
    pub(crate) fn repair(&self, name: &str, access: Access) -> Judgement {
        self.judge(name, access, "check -r all --output=json")
    }

    /// Runs a command of `qemu-img` on an image.
    fn judge(&self, name: &str, access: Access, command: &str) -> Judgement {
        let mut args = words(command);
        match access {
            Access::Plain => args.extend(["-f", "qcow2", name].map(str::to_owned)),
            Access::WithSecret => {
                args.extend(secret_args());
                args.push(target(name, access));
            }
        }
        self.ask("qemu-img", &args)
    }

    /// Runs `tool` in the directory, and ends it when it takes too long.
    pub(crate) fn ask(&self, tool: &str, args: &[String]) -> Judgement {
        let messages = self.path("messages");
        let child = Command::new(tool)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&messages).unwrap())
            .spawn()
            .unwrap();
        let (exit, stdout) = wait(child);
        let mut message = Vec::new();
        fs::File::open(&messages)
            .unwrap()
            .take(MESSAGE_BYTES)
            .read_to_end(&mut message)
            .unwrap();
        Judgement {
            exit,
            counts: counts(&stdout),
            message: String::from_utf8_lossy(&message).into_owned(),
        }
    }
}

/// The arguments that hand over the passphrase.
pub(crate) fn secret_args() -> [String; 3] {
    ["--object", SECRET, "--image-opts"].map(str::to_owned)
}

/// What names the image on a command line.
pub(crate) fn target(name: &str, access: Access) -> String {
    match access {
        Access::Plain => name.to_owned(),
        Access::WithSecret => {
            format!("driver=qcow2,file.filename={name},encrypt.key-secret=s0")
        }
    }
}

/// The words of a command line.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Exit code and output of a process, which is killed when it takes too long.
fn wait(mut child: std::process::Child) -> (Option<i32>, Vec<u8>) {
    let mut pipe = child.stdout.take().unwrap();
    let child = Mutex::new(child);
    let (done, is_done) = mpsc::channel::<()>();
    let mut stdout = Vec::new();
    let shared = &child;
    thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                shared
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .kill()
                    .unwrap();
            }
        });
        pipe.read_to_end(&mut stdout).unwrap();
        drop(done);
    });
    let status = child.into_inner().unwrap().wait().unwrap();
    (status.code(), stdout)
}

/// The counts in the output of `qemu-img check --output=json`.
fn counts(json: &[u8]) -> Option<Counts> {
    let json: serde_json::Value = serde_json::from_slice(json).ok()?;
    let field = |name: &str| json.get(name).map_or(0, |n| n.as_u64().unwrap());
    Some(Counts {
        check_errors: field("check-errors"),
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        image_end_offset: field("image-end-offset"),
        total_clusters: field("total-clusters"),
        allocated_clusters: field("allocated-clusters"),
        fragmented_clusters: field("fragmented-clusters"),
        compressed_clusters: field("compressed-clusters"),
    })
}

/// Calls `work` for each item, on all cores. The results are in the items' order.
pub(crate) fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, Into::into) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = work(item);
                    results.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The most memory this process has had at once, in KiB; `None` where the system does not tell.
pub(crate) fn peak_memory_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.trim().trim_end_matches(" kB").parse().ok()
}
