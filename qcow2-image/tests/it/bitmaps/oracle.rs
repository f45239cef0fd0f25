use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// QEMU's tools on one image.
pub(super) struct Tools {
    pub(super) image: PathBuf,
    served: AtomicUsize,
}

impl Tools {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            image: folder.join("image.qcow2"),
            served: AtomicUsize::new(0),
        }
    }

    pub(super) fn run(&self, tool: &str, args: &[&str]) -> String {
        let output = Command::new(tool)
            .args(args)
            .arg(&self.image)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{tool} {args:?}: {told}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(super) fn create(&self, options: &str, size: &str) {
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", options])
            .args([self.image.as_os_str(), size.as_ref()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Does something to a bitmap, as `--add` with what belongs to it.
    pub(super) fn bitmap(&self, args: &[&str], name: &str) {
        let output = Command::new("qemu-img")
            .arg("bitmap")
            .args(args)
            .args([self.image.as_os_str(), name.as_ref()])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?} {name}: {told}");
    }

    pub(super) fn io(&self, commands: &[&str]) {
        let args: Vec<&str> = commands.iter().flat_map(|one| ["-c", *one]).collect();
        self.run("qemu-io", &args);
    }

    pub(super) fn check(&self) {
        self.run("qemu-img", &["check", "-q"]);
    }

    /// The ranges that QEMU has as dirty.
    pub(super) fn dirty(&self, name: &str) -> Vec<Range<u64>> {
        // Of a copy: the server ends when it likes, and until then it keeps others out.
        let served_before = self.served.fetch_add(1, Ordering::Relaxed);
        let copy = self.image.with_extension(format!("copy{served_before}"));
        let socket = copy.with_extension(format!("socket{served_before}"));
        std::fs::copy(&self.image, &copy).unwrap();
        // It goes to the background once it listens, and ends with the first client.
        let served = Command::new("qemu-nbd")
            .args(["--fork", "-r", "-f", "qcow2", "-B", name, "-k"])
            .args([socket.as_os_str(), copy.as_os_str()])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&served.stderr);
        assert!(served.status.success(), "{told}");
        let path = socket.to_str().unwrap();
        let server = format!("driver=nbd,server.type=unix,server.path={path}");
        let context = format!("{server},x-dirty-bitmap=qemu:dirty-bitmap:{name}");
        let output = Command::new("qemu-img")
            .args(["map", "--output=json", "--image-opts", &context])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let mut dirty: Vec<Range<u64>> = Vec::new();
        let text = String::from_utf8(output.stdout).unwrap();
        for line in text.lines().filter(|line| line.contains("\"start\"")) {
            let start = number(line, "\"start\": ");
            let end = start + number(line, "\"length\": ");
            if line.contains("\"data\": true") {
                continue;
            }
            match dirty.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => dirty.push(start..end),
            }
        }
        dirty
    }
}

fn number(line: &str, key: &str) -> u64 {
    let at = line.find(key).unwrap() + key.len();
    let rest = &line[at..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
    rest[..end].parse().unwrap()
}
