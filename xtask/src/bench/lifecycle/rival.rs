//! The other side.

use std::process::Command;

use super::row::{Rival, Step};
use super::scene::Scene;

/// What does the same.
pub(super) fn command(rival: Rival, step: Step, scene: &Scene) -> Command {
    match rival {
        Rival::Cp => {
            let mut command = Command::new("cp");
            command.args(["--sparse=auto", "--reflink=never"]);
            // Both directions move the same data.
            command.args([scene.raw(), scene.target()]);
            command
        }
        Rival::QemuImg => qemu_img(step, scene),
    }
}

fn qemu_img(step: Step, scene: &Scene) -> Command {
    let mut command = Command::new("qemu-img");
    let image = scene.image();
    match step {
        Step::Create => {
            let size = scene.sizes.metadata.to_string();
            command.args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "preallocation=metadata",
            ]);
            command.arg(image).arg(size)
        }
        Step::SnapshotCreate => command.args(["snapshot", "-q", "-c", "s"]).arg(image),
        Step::SnapshotApply => command.args(["snapshot", "-q", "-a", "s"]).arg(image),
        Step::SnapshotDelete => command.args(["snapshot", "-q", "-d", "s"]).arg(image),
        Step::Shrink => {
            let size = (scene.sizes.shrink / 4).to_string();
            command.args(["resize", "-q", "--shrink", "-f", "qcow2"]);
            command.arg(image).arg(size)
        }
        Step::Map => command
            .args(["map", "--output=json", "-f", "qcow2"])
            .arg(image),
        Step::Measure => command
            .args(["measure", "--output=json", "-f", "qcow2", "-O", "qcow2"])
            .arg(image),
        Step::Compare => command
            .args(["compare", "-q", "-f", "qcow2", "-F", "raw"])
            .args([image, scene.raw()]),
        Step::CompareSparse => command
            .args(["compare", "-q", "-f", "qcow2", "-F", "qcow2"])
            .args([image, scene.other()]),
        Step::ToImage => command
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([scene.raw(), scene.target()]),
        Step::ToRaw => command
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([image, scene.target()]),
        Step::Commit => command.args(["commit", "-q", "-f", "qcow2"]).arg(image),
        Step::Rebase => command
            .args(["rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([scene.other(), image]),
    };
    command
}
