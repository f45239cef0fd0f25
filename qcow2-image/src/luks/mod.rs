//! The LUKS area of an encrypted image: make one, open it with a passphrase, change its passphrases.
//!
//! A disk is encrypted with a random master key. The area holds up to eight encrypted copies of that key, the key slots; each is
//! opened by a passphrase of its own, so passphrases change without touching the data. Everything here works on a
//! [`Storage`](qcow2_io::Storage) and the [`LuksArea`] in it, and knows nothing of clusters.
//!
//! A header is hostile until proven otherwise. All of it is judged, and [`WorkLimit`] compared with what its iterations would cost,
//! before a passphrase is put to work. Keys and passphrases are overwritten when dropped, and neither an error nor a
//! `Debug` shows one.
//!
//! ```
//! use qcow2_image::luks::{KeyCost, LuksArea, LuksOptions, WorkLimit};
//! use qcow2_io::cipher::Secret;
//!
//! let disk = qcow2_io::Memory::new();
//! let options = LuksOptions::new().cost(KeyCost::Iterations(1000));
//! let passphrase = Secret::new(b"correct horse".to_vec());
//! qcow2_image::luks::create(&disk, 65536, &options, &passphrase)?;
//!
//! let area = LuksArea { offset: 65536, len: options.area_len()? };
//! let unlocked = qcow2_image::luks::unlock(&disk, area, &passphrase, WorkLimit::default())?;
//! assert_eq!(unlocked.slot(), 0);
//! # Ok::<(), qcow2_image::luks::LuksError>(())
//! ```

mod area;
mod cost;
mod create;
mod error;
mod info;
mod key_slots;
mod options;
mod suite;
mod unlock;

pub use area::LuksArea;
pub use cost::{KeyCost, WorkLimit};
pub use create::create;
pub use error::{LuksError, LuksErrorKind};
pub use info::{LuksInfo, LuksSlotInfo, info};
pub use key_slots::KeySlots;
pub use options::LuksOptions;
pub use unlock::{Unlocked, unlock};
