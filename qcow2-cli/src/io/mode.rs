//! How a disk is opened: what the command line, `open` and `reopen` say of it.

use crate::node::Access;

/// How a disk is opened.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
pub(super) struct Mode {
    pub(super) format: Option<String>,
    pub(super) image_opts: bool,
    pub(super) read_only: bool,
    snapshot: bool,
    copy_on_read: bool,
    pub(super) force_share: bool,
    direct: bool,
    native: bool,
    write_through: bool,
    unmap: bool,
}

impl Default for Mode {
    fn default() -> Self {
        Self {
            format: None,
            image_opts: false,
            read_only: false,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            direct: false,
            native: false,
            write_through: false,
            unmap: true,
        }
    }
}

impl Mode {
    /// Takes an option of the command line, or of `open`.
    pub(super) fn take(&mut self, code: char, value: &str) -> Result<(), String> {
        match code {
            'f' => self.format = Some(value.to_owned()),
            'r' => self.read_only = true,
            's' => self.snapshot = true,
            'C' => self.copy_on_read = true,
            'U' => self.force_share = true,
            'n' => self.cache("none")?,
            't' => self.cache(value)?,
            'd' => {
                self.unmap = match value {
                    "ignore" | "off" => false,
                    "unmap" | "on" => true,
                    other => return Err(format!("Invalid discard option: {other}")),
                }
            }
            'k' => self.native = true,
            'i' => {
                self.native = match value {
                    "native" => true,
                    "threads" | "io_uring" => false,
                    other => return Err(format!("Invalid aio option: {other}")),
                }
            }
            '\u{2}' => self.image_opts = true,
            _ => {}
        }
        Ok(())
    }

    /// Takes a cache mode.
    pub(super) fn cache(&mut self, name: &str) -> Result<(), String> {
        (self.direct, self.write_through) = match name {
            "none" | "off" => (true, false),
            // Durability is not given up, whoever would allow it.
            "writeback" | "unsafe" => (false, false),
            "directsync" => (true, true),
            "writethrough" => (false, true),
            other => return Err(format!("Invalid cache option: {other}")),
        };
        Ok(())
    }

    /// Whether each write is flushed.
    pub(super) fn writes_through(&self) -> bool {
        self.write_through
    }

    /// Whether discards have an effect.
    pub(super) fn unmaps(&self) -> bool {
        self.unmap
    }

    /// What the tree is opened for.
    pub(super) fn access(&self) -> Access {
        Access {
            write: !self.read_only,
            force_share: self.force_share,
            direct: self.direct,
            unmap: self.unmap,
            native: self.native,
            copy_on_read: self.copy_on_read,
            temporary_overlay: self.snapshot,
            ..Access::read()
        }
    }
}
