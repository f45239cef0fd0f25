//! The long run of a test of `qcow2-check`, which has the damaged images.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::cargo::cargo;

/// Says how many damaged images are left out.
const STEP: &str = "QCOW2_REPAIR_STEP";
const REQUIRE_QEMU: &str = "QCOW2_REQUIRE_QEMU";

/// Repairs one in `step` damaged images.
pub(super) fn run(step: usize) -> Result<ExitCode> {
    let status = cargo()
        .args(["test", "--package", "qcow2-check", "--all-features"])
        .args(["--test", "it", "--", "repair_qemu::beside", "--nocapture"])
        .args(["--test-threads", "1"])
        .env(STEP, step.max(1).to_string())
        .env(REQUIRE_QEMU, "1")
        .status()
        .context("the tests could not start")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
