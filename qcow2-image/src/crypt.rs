//! Encrypted guest data: between the guest's view and the file stands a cipher for sectors.
//!
//! Only whole sectors can be written. What a request has of the first and last sector is written with the rest of them, and
//! nobody else may write meanwhile; guests ask for whole sectors, so this is rare.

use std::io::{IoSlice, IoSliceMut};

use qcow2_format::HostOffset;
#[cfg(feature = "encryption")]
use qcow2_format::header::CryptMethod;
use qcow2_io::Storage as _;
#[cfg(feature = "encryption")]
use qcow2_io::cipher::{Secret, SectorCipher};

use crate::buffer::Buffer;
use crate::cuts::{cut, cut_mut, fill_from, gather, len_of};
#[cfg(feature = "encryption")]
use crate::luks::{self, KeySlots, LuksArea, Unlocked, WorkLimit};
use crate::{Image, ImageError};

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// Bytes that are ciphered at once.
const PIECE: u64 = 1 << 20;

/// How the sectors of an image are encrypted.
#[cfg(feature = "encryption")]
#[derive(Debug)]
pub(crate) struct Crypt {
    /// `None` in an image that was opened without its secret: its data can't be had.
    pub(crate) cipher: Option<SectorCipher>,
    pub(crate) method: CryptMethod,
    /// Sectors are numbered by their place on the disk, as legacy images do, and not by their place in the file.
    pub(crate) by_guest: bool,
}

#[cfg(feature = "encryption")]
impl Crypt {
    fn first_sector(&self, guest: u64, host: u64) -> u64 {
        let at = if self.by_guest { guest } else { host };
        at / SECTOR
    }

    pub(crate) fn encrypt(
        &self,
        guest: u64,
        host: u64,
        bytes: &mut [u8],
    ) -> Result<(), ImageError> {
        let first = self.first_sector(guest, host);
        Ok(self.cipher()?.encrypt(first, bytes)?)
    }

    pub(crate) fn decrypt(
        &self,
        guest: u64,
        host: u64,
        bytes: &mut [u8],
    ) -> Result<(), ImageError> {
        let first = self.first_sector(guest, host);
        Ok(self.cipher()?.decrypt(first, bytes)?)
    }

    pub(crate) fn cipher(&self) -> Result<&SectorCipher, ImageError> {
        let method = self.method;
        self.cipher
            .as_ref()
            .ok_or(ImageError::SecretMissing { method })
    }
}

/// Encrypted images are refused by a build without ciphers, so it never has one of these.
#[cfg(not(feature = "encryption"))]
#[derive(Debug)]
pub(crate) enum Crypt {}

#[cfg(not(feature = "encryption"))]
impl Crypt {
    fn encrypt(&self, _guest: u64, _host: u64, _bytes: &mut [u8]) -> Result<(), ImageError> {
        match *self {}
    }

    fn decrypt(&self, _guest: u64, _host: u64, _bytes: &mut [u8]) -> Result<(), ImageError> {
        match *self {}
    }
}

impl Image {
    /// Whether guest data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.crypt.is_some()
    }

    /// Whether what is encrypted can't be moved as it is: sectors are numbered by their place in the file.
    pub(crate) fn ciphers_by_place(&self) -> bool {
        #[cfg(feature = "encryption")]
        let by_place = self.crypt.as_ref().is_some_and(|crypt| !crypt.by_guest);
        #[cfg(not(feature = "encryption"))]
        let by_place = false;
        by_place
    }

    /// Whether a request can't be written as it is: it has parts of sectors. The end of the disk counts as the end of a sector.
    pub(crate) fn has_part_of_sector(&self, start: u64, end: u64) -> bool {
        self.crypt.is_some()
            && (!start.is_multiple_of(SECTOR)
                || (!end.is_multiple_of(SECTOR) && end != self.virtual_size()))
    }

    /// Reads guest data: the `len` bytes that lie at `host` and belong at `guest` fill the buffers from `skip` on.
    pub(crate) fn load_data(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        skip: u64,
        len: u64,
        guest: u64,
        host: HostOffset,
    ) -> Result<(), ImageError> {
        let data = self.meta.data();
        let Some(crypt) = &self.crypt else {
            return Ok(data.read_vectored_at(&mut cut_mut(bufs, skip, len), host.get())?);
        };
        let mut parts = cut_mut(bufs, skip, len);
        if let [part] = parts.as_mut_slice()
            && guest.is_multiple_of(SECTOR)
            && len.is_multiple_of(SECTOR)
        {
            data.read_at(part, host.get())?;
            return crypt.decrypt(guest, host.get(), part);
        }
        let mut done = 0;
        while done < len {
            let at = guest + done;
            let head = at % SECTOR;
            let piece = (len - done).min(PIECE - head);
            let host = host.get() + done - head;
            let mut sectors = Buffer::unfilled((head + piece).next_multiple_of(SECTOR));
            data.read_at(&mut sectors, host)?;
            crypt.decrypt(at - head, host, &mut sectors)?;
            let wanted = sectors.get(index(head)..index(head + piece));
            fill_from(&mut parts, done, wanted.unwrap_or_default());
            done += piece;
        }
        Ok(())
    }

    /// Writes guest data: what the buffers hold goes to `host` and belongs at `guest`. Of an encrypted image whole sectors;
    /// the last one of the disk is filled up with zeros.
    pub(crate) fn store_data(
        &self,
        parts: &[IoSlice<'_>],
        guest: u64,
        host: HostOffset,
    ) -> Result<(), ImageError> {
        let data = self.meta.data();
        let Some(crypt) = &self.crypt else {
            return Ok(data.write_vectored_at(parts, host.get())?);
        };
        let len = len_of(parts);
        debug_assert!(guest.is_multiple_of(SECTOR));
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PIECE);
            let mut sectors = Buffer::unfilled(piece.next_multiple_of(SECTOR));
            let filled = gather(&cut(parts, done, piece), &mut sectors);
            sectors.get_mut(filled..).unwrap_or_default().fill(0);
            crypt.encrypt(guest + done, host.get() + done, &mut sectors)?;
            data.write_at(&sectors, host.get() + done)?;
            done += piece;
        }
        Ok(())
    }

    /// Writes a request that has parts of sectors, together with the rest of those. The caller has closed the gate.
    pub(crate) fn write_whole_sectors(
        &self,
        bufs: &[IoSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let end = offset + len;
        let start = offset / SECTOR * SECTOR;
        let head = self.view(start, offset - start)?;
        // Behind the end of the disk this gives zeros.
        let tail = self.view(end, end.next_multiple_of(SECTOR) - end)?;
        let mut parts = Vec::with_capacity(bufs.len() + 2);
        parts.push(IoSlice::new(&head));
        parts.extend(bufs.iter().map(|buf| IoSlice::new(buf)));
        parts.push(IoSlice::new(&tail));
        self.write_sectors(&parts, start, (end - start).next_multiple_of(SECTOR))
    }
}

/// Keys of a LUKS image.
#[cfg(feature = "encryption")]
impl Image {
    fn luks_area(&self) -> Result<LuksArea, ImageError> {
        let area = self.header().crypto().copied();
        area.map(LuksArea::from).ok_or(ImageError::Unsupported {
            what: "the image is not encrypted with LUKS, so it has no key slots",
        })
    }

    /// The key slots, to be changed as `qemu-img amend` changes them. Two threads must not do that at once.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] for an image without LUKS; an image that is not open for writing.
    pub fn key_slots(&self) -> Result<KeySlots<'_>, ImageError> {
        self.meta.check_writable()?;
        Ok(KeySlots::new(&**self.meta.storage(), self.luks_area()?))
    }

    /// Opens the master key with a passphrase, as [`KeySlots::add`] needs it.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] for an image without LUKS, and all reasons for which an area can't be
    /// [opened](crate::luks::unlock).
    pub fn unlock(&self, passphrase: &Secret, limit: WorkLimit) -> Result<Unlocked, ImageError> {
        let storage = &**self.meta.storage();
        Ok(luks::unlock(storage, self.luks_area()?, passphrase, limit)?)
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
