//! From a secret to the cipher of an image.

use qcow2_format::Header;
#[cfg(feature = "encryption")]
use qcow2_format::HeaderError;
use qcow2_format::header::CryptMethod;
use qcow2_io::Storage;
#[cfg(feature = "encryption")]
use qcow2_io::cipher::{Secret, SectorCipher};

use crate::crypt::Crypt;
#[cfg(feature = "encryption")]
use crate::luks::{self, LuksArea, WorkLimit};
use crate::{ImageError, ImageOptions};

/// The cipher of an encrypted image.
#[cfg(feature = "encryption")]
pub(crate) fn unlock(
    storage: &dyn Storage,
    header: &Header,
    options: &ImageOptions,
) -> Result<Option<Crypt>, ImageError> {
    let method = header.crypt_method;
    let secrets = &options.secrets;
    let Some(secret) = secrets.by_layer.get(&0) else {
        return match method {
            CryptMethod::None => Ok(None),
            method if secrets.locked && options.read_only => Ok(Some(Crypt {
                cipher: None,
                method,
                by_guest: method == CryptMethod::Aes,
            })),
            method => Err(ImageError::SecretMissing { method }),
        };
    };
    match unlock_with(storage, header, secret, secrets.work)? {
        Some(crypt) => Ok(Some(crypt)),
        None => Err(ImageError::NeedlessSecret),
    }
}

/// The cipher that a secret opens; `None` if the image is not encrypted.
#[cfg(feature = "encryption")]
pub(crate) fn unlock_with(
    storage: &dyn Storage,
    header: &Header,
    secret: &Secret,
    work: WorkLimit,
) -> Result<Option<Crypt>, ImageError> {
    let method = header.crypt_method;
    match method {
        CryptMethod::None => Ok(None),
        CryptMethod::Aes => Ok(Some(Crypt {
            cipher: Some(SectorCipher::legacy_aes(secret)),
            method,
            by_guest: true,
        })),
        // Decoding has refused other methods, and a header without its extension.
        CryptMethod::Luks | CryptMethod::Unknown(_) => {
            let area = header.crypto().ok_or(HeaderError::CryptoMissing)?;
            let found = luks::unlock(storage, LuksArea::from(*area), secret, work)?;
            Ok(Some(Crypt {
                cipher: Some(found.into_cipher()),
                method,
                by_guest: false,
            }))
        }
    }
}

/// A build without ciphers has none for an encrypted image.
#[cfg(not(feature = "encryption"))]
pub(crate) fn unlock(
    _storage: &dyn Storage,
    header: &Header,
    _options: &ImageOptions,
) -> Result<Option<Crypt>, ImageError> {
    match header.crypt_method {
        CryptMethod::None => Ok(None),
        method => Err(ImageError::Encrypted { method }),
    }
}
