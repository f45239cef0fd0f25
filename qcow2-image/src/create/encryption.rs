//! How guest data of a new image is encrypted.

use std::fmt;
#[cfg(feature = "encryption")]
use std::sync::Arc;

use qcow2_format::header::CryptMethod;
use qcow2_io::Storage;
#[cfg(feature = "encryption")]
use qcow2_io::cipher::{Secret, SectorCipher};

use super::CreateError;
#[cfg(feature = "encryption")]
use super::CreateOptions;
use super::layout::Layout;
#[cfg(feature = "encryption")]
use super::target::CHUNK;
#[cfg(feature = "encryption")]
use crate::crypt::{Crypt, SECTOR};
#[cfg(feature = "encryption")]
use crate::luks::{self, LuksOptions};

/// What was chosen about encryption.
#[derive(Clone)]
pub(super) struct Encryption {
    pub(super) method: CryptMethod,
    #[cfg(feature = "encryption")]
    luks: Option<LuksOptions>,
    #[cfg(feature = "encryption")]
    secret: Option<Arc<Secret>>,
}

impl Default for Encryption {
    fn default() -> Self {
        Self {
            method: CryptMethod::None,
            #[cfg(feature = "encryption")]
            luks: None,
            #[cfg(feature = "encryption")]
            secret: None,
        }
    }
}

impl fmt::Debug for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.method, f)
    }
}

impl Encryption {
    /// Bytes of the LUKS area, 0 if there is none.
    #[cfg(feature = "encryption")]
    pub(super) fn area_len(&self) -> Result<u64, CreateError> {
        match self.method {
            CryptMethod::Luks => Ok(self.luks.unwrap_or_default().area_len()?),
            _ => Ok(0),
        }
    }

    #[cfg(not(feature = "encryption"))]
    #[expect(
        clippy::unnecessary_wraps,
        reason = "that of a build with ciphers can fail"
    )]
    pub(super) fn area_len(&self) -> Result<u64, CreateError> {
        Ok(0)
    }

    /// Tests whether the options go together.
    #[cfg(feature = "encryption")]
    pub(super) fn check(&self, raw_data_file: bool) -> Result<(), CreateError> {
        match (self.method, &self.secret) {
            (CryptMethod::None, None) if self.luks.is_none() => Ok(()),
            (CryptMethod::None, _) => Err(CreateError::EncryptionFormatMissing),
            (_, None) => Err(CreateError::SecretMissing),
            (_, Some(secret)) if !secret.is_text() => Err(CreateError::SecretNotText),
            (CryptMethod::Aes, _) if self.luks.is_some() => Err(CreateError::NotForAes),
            _ if raw_data_file => Err(CreateError::RawAndEncrypted),
            _ => self.area_len().map(drop),
        }
    }

    #[cfg(not(feature = "encryption"))]
    #[expect(
        clippy::unnecessary_wraps,
        reason = "that of a build with ciphers can fail"
    )]
    pub(super) fn check(&self, _raw_data_file: bool) -> Result<(), CreateError> {
        Ok(())
    }

    /// Writes the LUKS area. If `zeros` says so, clusters that have their place already get zeros, encrypted; of other images their
    /// entries say that they are zeros.
    #[cfg(feature = "encryption")]
    pub(super) fn write(
        &self,
        storage: &dyn Storage,
        layout: &Layout,
        zeros: bool,
    ) -> Result<(), CreateError> {
        let Some(secret) = &self.secret else {
            return Ok(());
        };
        let crypt = if self.method == CryptMethod::Luks {
            let options = self.luks.unwrap_or_default();
            let area = layout.crypto().get();
            let cipher = luks::create(storage, area, &options, secret)?.into_cipher();
            Crypt {
                cipher: Some(cipher),
                method: self.method,
                by_guest: false,
            }
        } else {
            Crypt {
                cipher: Some(SectorCipher::legacy_aes(secret)),
                method: self.method,
                by_guest: true,
            }
        };
        if zeros {
            write_zeros(storage, layout, &crypt)?;
        }
        Ok(())
    }

    #[cfg(not(feature = "encryption"))]
    #[expect(
        clippy::unnecessary_wraps,
        reason = "that of a build with ciphers can fail"
    )]
    pub(super) fn write(
        &self,
        _storage: &dyn Storage,
        _layout: &Layout,
        _zeros: bool,
    ) -> Result<(), CreateError> {
        Ok(())
    }

    /// Sets one of the options `encrypt.*`.
    #[cfg(feature = "encryption")]
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), CreateError> {
        if key == "encrypt.format" {
            self.method = super::parse::choose(
                "encrypt.format",
                value,
                &[("luks", CryptMethod::Luks), ("aes", CryptMethod::Aes)],
                "luks and aes",
            )?;
            return Ok(());
        }
        let unknown = || CreateError::UnknownOption {
            option: key.to_owned(),
        };
        let mut luks = self.luks.unwrap_or_default();
        match key.strip_prefix("encrypt.") {
            None | Some("key-secret") => return Err(unknown()),
            Some(rest) => luks.set(rest, value)?,
        }
        self.luks = Some(luks);
        Ok(())
    }

    #[cfg(not(feature = "encryption"))]
    pub(super) fn set(&mut self, key: &str, _value: &str) -> Result<(), CreateError> {
        Err(CreateError::NeedsFeature {
            option: key.to_owned(),
            feature: "encryption",
        })
    }
}

/// Fills all clusters that have their place.
#[cfg(feature = "encryption")]
fn write_zeros(storage: &dyn Storage, layout: &Layout, crypt: &Crypt) -> Result<(), CreateError> {
    let Some(cipher) = &crypt.cipher else {
        return Ok(());
    };
    let size = layout.geometry().cluster_size();
    let mut buffer = vec![0; CHUNK.min(layout.geometry().cluster_len())];
    for number in 0..layout.guest_clusters() {
        let (guest, host) = (number * size, layout.data(number).get());
        let mut done = 0;
        while done < size {
            buffer.fill(0);
            let first = if crypt.by_guest { guest } else { host } + done;
            cipher.encrypt(first / SECTOR, &mut buffer)?;
            storage
                .write_at(&buffer, host + done)
                .map_err(CreateError::while_trying("write encrypted zeros"))?;
            done += buffer.len() as u64;
        }
    }
    Ok(())
}

#[cfg(feature = "encryption")]
impl CreateOptions {
    /// Encrypts guest data, with a random key that the passphrase opens; see [`LuksOptions`] for how.
    ///
    /// Deriving the key from the passphrase takes as long as the options say, two seconds by default.
    pub fn luks(mut self, options: LuksOptions, passphrase: Secret) -> Self {
        self.encryption = Encryption {
            method: CryptMethod::Luks,
            luks: Some(options),
            secret: Some(Arc::new(passphrase)),
        };
        self
    }

    /// Encrypts guest data as images did before LUKS: AES-128-CBC with the passphrase itself as key, which protects little.
    /// A wrong passphrase is not noticed. For images that must be read by something old.
    pub fn legacy_aes(mut self, passphrase: Secret) -> Self {
        self.encryption = Encryption {
            method: CryptMethod::Aes,
            luks: None,
            secret: Some(Arc::new(passphrase)),
        };
        self
    }

    /// The passphrase, where the rest comes from [`set`](Self::set).
    pub fn secret(mut self, passphrase: impl Into<Arc<Secret>>) -> Self {
        self.encryption.secret = Some(passphrase.into());
        self
    }
}
