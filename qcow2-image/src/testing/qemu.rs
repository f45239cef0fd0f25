//! QEMU's tools: the reference. They make images, play programs and read what the engine wrote.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::create::Preallocation;

use super::action::{Action, Program};
use super::content::Content;
use super::failure::{Failure, OrFail};
use super::files::{DATA_NAME, IMAGE_NAME, layer_format, layer_name};
use super::shape::{DataFile, Encryption, PASSPHRASE, Shape, Step};

/// Whether `qemu-img` and `qemu-io` are there.
pub fn is_available() -> bool {
    ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok())
}

/// A folder with the files of an image, and the tools to work on them. No other program may have the image open.
#[derive(Clone, Debug)]
pub struct Qemu {
    folder: PathBuf,
    encryption: Encryption,
}

impl Qemu {
    /// Tools for the files of a folder.
    pub fn new(folder: &Path, encryption: Encryption) -> Self {
        Self {
            folder: folder.to_owned(),
            encryption,
        }
    }

    /// How a tool is told which image: by name, or with its secret.
    fn image(&self, by_name: &[&str]) -> Vec<String> {
        if self.encryption == Encryption::None {
            let args = by_name.iter().chain(&[IMAGE_NAME]);
            return args.map(ToString::to_string).collect();
        }
        vec![
            "--object".to_owned(),
            format!("secret,id=s,data={PASSPHRASE}"),
            "--image-opts".to_owned(),
            format!("driver=qcow2,file.filename={IMAGE_NAME},encrypt.key-secret=s"),
        ]
    }

    /// Makes the image of a shape, over a chain that is there.
    ///
    /// # Errors
    ///
    /// What the tools say.
    pub fn create(&self, shape: &Shape, steps: &[Step]) -> Result<(), Failure> {
        let format = &shape.format;
        let mut options = vec![
            format!(
                "compat={}",
                if format.version == 2 { "0.10" } else { "1.1" }
            ),
            format!("cluster_size={}", format.cluster_size()),
            format!("refcount_bits={}", 1 << format.refcount_order),
            format!("preallocation={}", shape.preallocation.name()),
        ];
        let on = |name: &str| format!("{name}=on");
        options.extend(format.lazy_refcounts.then(|| on("lazy_refcounts")));
        options.extend(format.extended_l2.then(|| on("extended_l2")));
        options.extend(format.zstd.then(|| "compression_type=zstd".to_owned()));
        match shape.data_file {
            DataFile::None => {}
            DataFile::External => options.push(format!("data_file={DATA_NAME}")),
            DataFile::Raw => {
                options.push(format!("data_file={DATA_NAME},data_file_raw=on"));
            }
        }
        if let Some(layer) = shape.backing.first() {
            options.push(format!("backing_file={}", layer_name(0)));
            options.push(format!("backing_fmt={}", layer_format(layer)));
        }
        let secret = format!("secret,id=s,data={PASSPHRASE}");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if shape.encryption != Encryption::None {
            args.extend(["--object", &secret]);
            options.push("encrypt.key-secret=s".to_owned());
        }
        match shape.encryption {
            Encryption::None => {}
            Encryption::Aes => options.push("encrypt.format=aes".to_owned()),
            Encryption::Luks => {
                options.push("encrypt.format=luks,encrypt.iter-time=1".to_owned());
            }
        }
        let options = options.join(",");
        let size = format.size.to_string();
        args.extend(["-o", &options, IMAGE_NAME, &size]);
        self.img(&args)?;
        let mut commands = Vec::new();
        let mut snapshots = 0;
        for step in steps {
            if *step == Step::Snapshot {
                snapshots += 1;
                self.io(&std::mem::take(&mut commands))?;
                let name = format!("s{snapshots}");
                self.img_on_image(&["snapshot", "-q", "-c", &name], &[])?;
            } else {
                commands.push(step_command(shape, step));
            }
        }
        self.io(&commands)
    }

    /// Plays the actions of a program whose image is there; what only we can do is left out.
    ///
    /// # Errors
    ///
    /// What the tools say.
    pub fn play(&self, program: &Program) -> Result<(), Failure> {
        let mut size = program.shape.format.size;
        let commands: Vec<String> = program
            .actions
            .iter()
            .flat_map(|action| action_commands(action, &mut size))
            .collect();
        self.io(&commands)
    }

    /// What the guest sees of the image, or of one of its snapshots.
    ///
    /// # Errors
    ///
    /// What the tools say.
    pub fn read(&self, snapshot: Option<&str>) -> Result<Vec<u8>, Failure> {
        let mut args: Vec<String> = ["convert", "-O", "raw"].map(str::to_owned).to_vec();
        let by_name: &[&str] = match snapshot {
            Some(name) => &["-l", name],
            None => &["-f", "qcow2"],
        };
        if let (Some(name), true) = (snapshot, self.encryption != Encryption::None) {
            args.extend(["-l".to_owned(), name.to_owned()]);
        }
        args.extend(self.image(by_name));
        args.push("converted.raw".to_owned());
        self.run("qemu-img", args.iter())?;
        fs::read(self.folder.join("converted.raw")).or_fail("reading what was converted")
    }

    /// Has the image checked: neither errors nor leaks may be there.
    ///
    /// # Errors
    ///
    /// What the tools say.
    pub fn check(&self) -> Result<(), Failure> {
        self.img_on_image(&["check"], &["-f", "qcow2"])
    }

    /// Runs `qemu-img` on the image; `by_name` are options that only go with its name.
    fn img_on_image(&self, args: &[&str], by_name: &[&str]) -> Result<(), Failure> {
        let mut all: Vec<String> = args.iter().map(ToString::to_string).collect();
        all.extend(self.image(by_name));
        self.run("qemu-img", all.iter())
    }

    fn img(&self, args: &[&str]) -> Result<(), Failure> {
        self.run("qemu-img", args.iter())
    }

    fn io(&self, commands: &[String]) -> Result<(), Failure> {
        if commands.is_empty() {
            return Ok(());
        }
        let mut args: Vec<String> = ["-d", "unmap", "-t", "writeback"]
            .map(str::to_owned)
            .to_vec();
        for command in commands {
            args.extend(["-c".to_owned(), command.clone()]);
        }
        args.extend(self.image(&["-f", "qcow2"]));
        self.run("qemu-io", args.iter())
    }

    fn run<S: AsRef<OsStr>>(
        &self,
        tool: &str,
        args: impl Iterator<Item = S> + Clone,
    ) -> Result<(), Failure> {
        let output = Command::new(tool)
            .args(args.clone())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output()
            .or_fail(tool)?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        // qemu-io goes on after a command that failed.
        let failed = !output.status.success() || said.contains("failed");
        if !failed {
            return Ok(());
        }
        let args: Vec<String> = args
            .map(|arg| arg.as_ref().to_string_lossy().into_owned())
            .collect();
        Err(Failure::new(format!("{tool} {}: {said}", args.join(" "))))
    }
}

fn byte_of(content: Content) -> u8 {
    match content {
        Content::Zeros => 0,
        Content::Byte(byte) => byte,
        Content::Tagged(tag) => tag as u8,
    }
}

fn step_command(shape: &Shape, step: &Step) -> String {
    let cluster_size = shape.format.cluster_size();
    let range = |cluster: u64| {
        let offset = cluster * cluster_size;
        format!("{offset} {}", cluster_size.min(shape.format.size - offset))
    };
    match *step {
        Step::Data { cluster, content }
        | Step::Subclusters {
            cluster, content, ..
        } => format!("write -q -P {} {}", byte_of(content), range(cluster)),
        Step::Zero { cluster, allocated } => {
            let unmap = if allocated { "" } else { "-u " };
            format!("write -q -z {unmap}{}", range(cluster))
        }
        Step::Compressed { cluster, byte } => format!("write -q -c -P {byte} {}", range(cluster)),
        Step::Snapshot => "flush".to_owned(),
    }
}

fn action_commands(action: &Action, size: &mut u64) -> Vec<String> {
    let cut = |range: &std::ops::Range<u64>| {
        let start = range.start.min(*size);
        let len = range.end.clamp(start, *size) - start;
        (len > 0).then(|| format!("{start} {len}"))
    };
    let command = match action {
        // QEMU compresses nothing into a cluster that has data.
        Action::Write { range, content, .. } | Action::Pack { range, content } => {
            cut(range).map(|range| format!("write -q -P {} {range}", byte_of(*content)))
        }
        Action::Zero { range, unmap } => {
            let unmap = if *unmap { "-u " } else { "" };
            cut(range).map(|range| format!("write -q -z {unmap}{range}"))
        }
        Action::DiscardWhole { range } => cut(range).map(|range| format!("discard -q {range}")),
        Action::Flush => Some("flush".to_owned()),
        Action::Resize {
            size: new,
            preallocation,
        } => {
            let grows = *new > *size;
            *size = *new;
            // With metadata alone the new part does not always read as zeros in QEMU 10.0: it may get clusters that held tables.
            let written = [Preallocation::Falloc, Preallocation::Full];
            let mode = if grows && written.contains(preallocation) {
                format!("-m {} ", preallocation.name())
            } else {
                String::new()
            };
            Some(format!("truncate {mode}{new}"))
        }
        Action::Batch(actions) => {
            return actions
                .iter()
                .flat_map(|action| action_commands(action, size))
                .collect();
        }
        Action::Discard { .. }
        | Action::Read { .. }
        | Action::Reopen
        | Action::Kill
        | Action::Extents { .. }
        | Action::WriteBeyond { .. } => None,
    };
    command.into_iter().collect()
}
