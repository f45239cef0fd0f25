//! Deeds done by QEMU's tools.

use std::path::Path;
use std::process::{Command, Stdio};

use qcow2_format::header::Version;

use super::super::failure::{Failure, OrFail};
use super::deed::Deed;
use super::model::Model;
use super::{BASES, IMAGE};

/// Runs a tool in the folder; gives what it says.
pub(super) fn run(tool: &str, args: &[&str], folder: &Path) -> Result<String, Failure> {
    let output = Command::new(tool)
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .or_fail(tool)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // qemu-io goes on after a command that failed.
    if output.status.success() && !(tool == "qemu-io" && said.contains("failed")) {
        return Ok(said);
    }
    Err(Failure::new(format!("{tool} {}: {said}", args.join(" "))))
}

pub(super) fn work(deed: &Deed, model: &Model, folder: &Path) -> Result<(), Failure> {
    let img = |args: &[&str]| run("qemu-img", args, folder).map(drop);
    let io = |command: String| {
        let args = ["-d", "unmap", "-f", "qcow2", "-c", &command, IMAGE];
        run("qemu-io", &args, folder).map(drop)
    };
    let bitmap = |args: &[&str], name: &str| {
        let mut all = vec!["bitmap"];
        all.extend_from_slice(args);
        all.extend(["-f", "qcow2", IMAGE, name]);
        img(&all)
    };
    let amend = |option: String| img(&["amend", "-f", "qcow2", "-o", &option, IMAGE]);
    match deed {
        Deed::Write { offset, len, byte } => io(format!("write -q -P {byte} {offset} {len}")),
        Deed::Zero { offset, len, unmap } => {
            let unmap = if *unmap { "-u " } else { "" };
            io(format!("write -q -z {unmap}{offset} {len}"))
        }
        Deed::Resize { size } => {
            let size_text = size.to_string();
            let mut args = vec!["resize", "-q", "-f", "qcow2"];
            args.extend((*size < model.size()).then_some("--shrink"));
            args.extend([IMAGE, &size_text]);
            img(&args)
        }
        Deed::TakeSnapshot { name } => img(&["snapshot", "-q", "-c", name, IMAGE]),
        Deed::ApplySnapshot { name } => img(&["snapshot", "-q", "-a", name, IMAGE]),
        Deed::DeleteSnapshot { name } => img(&["snapshot", "-q", "-d", name, IMAGE]),
        Deed::AddBitmap {
            name,
            granularity,
            enabled,
        } => {
            let granularity = granularity.to_string();
            let mut args = vec!["--add", "-g", &granularity];
            args.extend((!enabled).then_some("--disable"));
            bitmap(&args, name)
        }
        Deed::RemoveBitmap { name } => bitmap(&["--remove"], name),
        Deed::ClearBitmap { name } => bitmap(&["--clear"], name),
        Deed::EnableBitmap { name } => bitmap(&["--enable"], name),
        Deed::DisableBitmap { name } => bitmap(&["--disable"], name),
        Deed::MergeBitmap { into, from } => bitmap(&["--merge", from], into),
        Deed::Rebase { to: None } => img(&["rebase", "-f", "qcow2", "-b", "", IMAGE]),
        Deed::Rebase { to: Some(number) } => img(&[
            "rebase",
            "-f",
            "qcow2",
            "-b",
            BASES[*number],
            "-F",
            "raw",
            IMAGE,
        ]),
        Deed::Commit => img(&["commit", "-q", "-f", "qcow2", IMAGE]),
        Deed::AmendVersion { version } => {
            // Lazy refcounts have to go before.
            if model.lazy_refcounts {
                amend("lazy_refcounts=off".to_owned())?;
            }
            let old = *version == Version::V2;
            amend(format!("compat={}", if old { "0.10" } else { "1.1" }))
        }
        Deed::AmendRefcountBits { bits } => amend(format!("refcount_bits={bits}")),
        Deed::AmendLazyRefcounts { on } => {
            amend(format!("lazy_refcounts={}", if *on { "on" } else { "off" }))
        }
        Deed::Compact { .. } => Err(Failure::new("QEMU can't compact")),
    }
}
