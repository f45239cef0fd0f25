//! What can be changed about an image that is there.

use std::fmt;

use qcow2_format::header::Version;

use super::AmendError;
use crate::copy::Monitor;
use crate::create::parse;

#[cfg(feature = "encryption")]
pub use keys::{KeyChange, KeySlot};

/// Options that are decided at creation.
const FIXED: &[(&str, &str)] = &[
    (
        "cluster_size",
        "all of the image is made of clusters of that size; copy it into a new one",
    ),
    (
        "extended_l2",
        "all L2 tables are made of such entries; copy the image into a new one",
    ),
    (
        "compression_type",
        "compressed clusters would have to be compressed anew; copy the image into a new one",
    ),
    (
        "preallocation",
        "it says what is done when an image is made; copy it into a new one, or resize it",
    ),
    (
        "encryption",
        "guest data would have to be encrypted anew; copy the image into a new one",
    ),
    (
        "encrypt.format",
        "guest data would have to be encrypted anew; copy the image into a new one",
    ),
];

/// Which options of an image change; those that are not named stay. Made by [`new`](Self::new) and the methods that follow, or by
/// [`set`](Self::set) from text.
#[derive(Clone, Default)]
#[must_use]
pub struct AmendOptions<'a> {
    pub(super) version: Option<Version>,
    pub(super) size: Option<u64>,
    pub(super) refcount_bits: Option<u64>,
    pub(super) lazy_refcounts: Option<bool>,
    pub(super) backing_file: Option<Vec<u8>>,
    pub(super) backing_format: Option<Vec<u8>>,
    pub(super) data_file: Option<Vec<u8>>,
    pub(super) data_file_raw: Option<bool>,
    #[cfg(feature = "encryption")]
    pub(super) keys: keys::KeyOptions,
    pub(super) force: bool,
    pub(super) monitor: Option<&'a dyn Monitor>,
}

impl<'a> AmendOptions<'a> {
    /// Nothing changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Version of the format, `compat`.
    pub fn version(mut self, version: Version) -> Self {
        self.version = Some(version);
        self
    }

    /// Size of the disk in bytes, a multiple of 512. A smaller one loses what is behind, without being asked twice.
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }

    /// Width of refcounts: 1, 2, 4, 8, 16, 32 or 64.
    pub fn refcount_bits(mut self, bits: u64) -> Self {
        self.refcount_bits = Some(bits);
        self
    }

    /// Whether refcounts may be written late, under the dirty bit.
    pub fn lazy_refcounts(mut self, on: bool) -> Self {
        self.lazy_refcounts = Some(on);
        self
    }

    /// Name of the backing file; an empty one takes it and its format away. **Only the name changes**: whoever opens the image
    /// then sees the new file where this one has nothing.
    pub fn backing_file(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.backing_file = Some(name.into());
        self
    }

    /// Format of the backing file; an empty one takes it away.
    pub fn backing_format(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.backing_format = Some(name.into());
        self
    }

    /// Name of the external data file, for an image that has one; an empty one takes the name away, and the file has to be given
    /// when the image is opened.
    pub fn data_file(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.data_file = Some(name.into());
        self
    }

    /// Whether the external data file is to be a valid raw image. It can only be switched off.
    pub fn data_file_raw(mut self, on: bool) -> Self {
        self.data_file_raw = Some(on);
        self
    }

    /// Allows what may lose data for good: active key slots are overwritten, inactive ones erased, **and the last active one,
    /// too**.
    pub fn force(mut self, on: bool) -> Self {
        self.force = on;
        self
    }

    /// Who watches. Progress is told in bytes of metadata; for the width of refcounts, and for a downgrade, where each entry of an L1 table
    /// counts as the L2 table that it leads to, or could lead to.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    /// Sets an option as `qemu-img amend -o key=value` does.
    ///
    /// Keys: `compat`, `size`, `refcount_bits`, `lazy_refcounts`, `backing_file`, `backing_fmt`, `data_file`, `data_file_raw`, and with the
    /// feature `encryption` `encrypt.state`, `encrypt.keyslot` and `encrypt.iter-time`; secrets are given by methods. Values are
    /// written as for [`CreateOptions::set`](crate::create::CreateOptions::set).
    ///
    /// # Errors
    ///
    /// An unknown key, one that can't be changed in an image that is there, or a value that the key doesn't know; nothing
    /// is changed then. Whether the options fit the image is judged when it is amended.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), AmendError> {
        match key {
            "compat" => {
                let choices = [
                    ("0.10", Version::V2),
                    ("v2", Version::V2),
                    ("1.1", Version::V3),
                    ("v3", Version::V3),
                ];
                let allowed = "0.10 (or v2) and 1.1 (or v3)";
                self.version = Some(parse::choose("compat", value, &choices, allowed)?);
            }
            "size" => self.size = Some(parse::size("size", value)?),
            "refcount_bits" => self.refcount_bits = Some(parse::number("refcount_bits", value)?),
            "lazy_refcounts" => {
                self.lazy_refcounts = Some(parse::switch("lazy_refcounts", value)?);
            }
            "backing_file" => self.backing_file = Some(value.into()),
            "backing_fmt" => self.backing_format = Some(value.into()),
            "data_file" => self.data_file = Some(value.into()),
            "data_file_raw" => self.data_file_raw = Some(parse::switch("data_file_raw", value)?),
            #[cfg(feature = "encryption")]
            "encrypt.state" | "encrypt.keyslot" | "encrypt.iter-time" => {
                self.keys.set(key, value)?;
            }
            other => return Err(refuse(other)),
        }
        Ok(())
    }
}

fn refuse(key: &str) -> AmendError {
    let option = key.to_owned();
    if let Some((_, why)) = FIXED.iter().find(|(name, _)| *name == key) {
        return AmendError::Fixed { option, why };
    }
    match key.strip_prefix("encrypt.") {
        Some("cipher-alg" | "cipher-mode" | "ivgen-alg" | "ivgen-hash-alg" | "hash-alg") => {
            AmendError::Fixed {
                option,
                why: "guest data would have to be encrypted anew; copy the image into a new one",
            }
        }
        Some("key-secret" | "new-secret" | "old-secret") => AmendError::Fixed {
            option,
            why: "secrets are no text here; a method takes them",
        },
        Some("state" | "keyslot" | "iter-time") => AmendError::Fixed {
            option,
            why: "it needs the feature `encryption`",
        },
        _ => AmendError::UnknownOption { option },
    }
}

impl fmt::Debug for AmendOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmendOptions")
            .field("version", &self.version)
            .field("size", &self.size)
            .field("refcount_bits", &self.refcount_bits)
            .field("lazy_refcounts", &self.lazy_refcounts)
            .field("backing_file", &self.backing_file)
            .field("backing_format", &self.backing_format)
            .field("data_file", &self.data_file)
            .field("data_file_raw", &self.data_file_raw)
            .field("force", &self.force)
            .finish_non_exhaustive()
    }
}

/// Key slots of LUKS.
#[cfg(feature = "encryption")]
mod keys {
    use std::sync::Arc;
    use std::time::Duration;

    use qcow2_io::cipher::Secret;

    use super::{AmendError, AmendOptions, parse};
    use crate::luks::{KeyCost, WorkLimit};

    /// Which key slot is meant.
    pub type KeySlot = u8;

    /// What becomes of key slots.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum KeyChange {
        /// One gets a passphrase: the [new secret](AmendOptions::new_secret).
        Active,
        /// Those that the [old secret](AmendOptions::old_secret) opens, or the one that is named, are erased.
        Inactive,
    }

    #[derive(Clone, Default)]
    pub(in crate::amend) struct KeyOptions {
        pub(in crate::amend) state: Option<KeyChange>,
        pub(in crate::amend) slot: Option<KeySlot>,
        pub(in crate::amend) cost: Option<KeyCost>,
        pub(in crate::amend) secret: Option<Arc<Secret>>,
        pub(in crate::amend) new_secret: Option<Arc<Secret>>,
        pub(in crate::amend) old_secret: Option<Arc<Secret>>,
        pub(in crate::amend) limit: WorkLimit,
    }

    impl KeyOptions {
        pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), AmendError> {
            match key {
                "encrypt.state" => {
                    let choices = [
                        ("active", KeyChange::Active),
                        ("inactive", KeyChange::Inactive),
                    ];
                    let allowed = "active and inactive";
                    self.state = Some(parse::choose("encrypt.state", value, &choices, allowed)?);
                }
                "encrypt.keyslot" => {
                    let number = parse::number("encrypt.keyslot", value)?;
                    // Too large a number is no slot of any image.
                    self.slot = Some(u8::try_from(number).unwrap_or(u8::MAX));
                }
                _ => {
                    let time = parse::number("encrypt.iter-time", value)?;
                    self.cost = Some(KeyCost::Time(Duration::from_millis(time)));
                }
            }
            Ok(())
        }

        pub(in crate::amend) fn is_any(&self) -> bool {
            self.state.is_some()
                || self.slot.is_some()
                || self.cost.is_some()
                || self.new_secret.is_some()
                || self.old_secret.is_some()
        }
    }

    impl AmendOptions<'_> {
        /// What becomes of key slots, `encrypt.state`.
        pub fn key_state(mut self, change: KeyChange) -> Self {
            self.keys.state = Some(change);
            self
        }

        /// Which slot is meant, 0 to 7, `encrypt.keyslot`. Otherwise a passphrase goes to the first free one.
        pub fn key_slot(mut self, slot: KeySlot) -> Self {
            self.keys.slot = Some(slot);
            self
        }

        /// How much work the new passphrase shall be to try; `encrypt.iter-time` is one way to say it.
        pub fn key_cost(mut self, cost: KeyCost) -> Self {
            self.keys.cost = Some(cost);
            self
        }

        /// A passphrase that opens the image, from which a new slot gets the master key.
        pub fn secret(mut self, secret: impl Into<Arc<Secret>>) -> Self {
            self.keys.secret = Some(secret.into());
            self
        }

        /// The passphrase for a new slot, `encrypt.new-secret`.
        pub fn new_secret(mut self, secret: impl Into<Arc<Secret>>) -> Self {
            self.keys.new_secret = Some(secret.into());
            self
        }

        /// The passphrase whose slots are erased, `encrypt.old-secret`.
        pub fn old_secret(mut self, secret: impl Into<Arc<Secret>>) -> Self {
            self.keys.old_secret = Some(secret.into());
            self
        }

        /// How much work it may be to try the old passphrases.
        pub fn work_limit(mut self, limit: WorkLimit) -> Self {
            self.keys.limit = limit;
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_text_as_for_qemu() {
        let mut options = AmendOptions::new();
        for (key, value) in [
            ("compat", "0.10"),
            ("size", "1.5M"),
            ("refcount_bits", "0x20"),
            ("lazy_refcounts", "on"),
            ("backing_file", "base"),
            ("backing_fmt", "raw"),
            ("data_file", ""),
            ("data_file_raw", "off"),
        ] {
            options.set(key, value).unwrap();
        }
        assert_eq!(options.version, Some(Version::V2));
        assert_eq!(options.size, Some(1536 << 10));
        assert_eq!(options.refcount_bits, Some(32));
        assert_eq!(options.lazy_refcounts, Some(true));
        assert_eq!(options.backing_file.as_deref(), Some(&b"base"[..]));
        assert_eq!(options.data_file.as_deref(), Some(&b""[..]));
        assert_eq!(options.data_file_raw, Some(false));
    }

    #[test]
    fn what_can_not_be_changed_is_told_apart_from_what_is_unknown() {
        let mut options = AmendOptions::new();
        for key in ["cluster_size", "preallocation", "encrypt.cipher-alg"] {
            let error = options.set(key, "x").unwrap_err();
            assert!(matches!(error, AmendError::Fixed { .. }), "{error}");
        }
        let error = options.set("colour", "red").unwrap_err();
        assert!(matches!(error, AmendError::UnknownOption { .. }), "{error}");
        let error = options.set("compat", "3").unwrap_err();
        assert!(matches!(error, AmendError::Value(_)), "{error}");
        assert_eq!(options.version, None);
    }

    #[test]
    #[cfg(feature = "encryption")]
    fn key_slots_are_chosen_by_text() {
        let mut options = AmendOptions::new();
        options.set("encrypt.state", "inactive").unwrap();
        options.set("encrypt.keyslot", "300").unwrap();
        assert!(options.set("encrypt.state", "gone").is_err());
        assert_eq!(options.keys.state, Some(KeyChange::Inactive));
        assert_eq!(options.keys.slot, Some(255));
    }
}
