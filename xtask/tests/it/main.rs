//! The commands as a user meets them: the program is run, its output and exit code are looked at.

/// A folder with images, and the program run in it.
#[cfg(test)]
mod workbench;

/// `check-image` on images made here.
#[cfg(test)]
mod check_image;

/// `check-image` on images made by QEMU, beside its own check.
#[cfg(test)]
mod check_image_qemu;

/// `check-image --repair` and what goes with it.
#[cfg(test)]
mod check_image_repair;
