//! What is to be done, judged as a whole before anything is.

use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::header::{CompressionType, Version};
use qcow2_format::{Geometry, Header};

use super::{AmendError, AmendOptions, header};
use crate::Image;
use crate::resize::SIZE_MAX;

/// The steps that an image needs to become what is asked for.
#[derive(Debug)]
pub(super) struct Plan {
    /// From version 2 to version 3.
    pub(super) upgrade: bool,
    /// The header after the upgrade, with new names and switches; equal to the old one if nothing changes.
    pub(super) header: Header,
    pub(super) refcount_order: Option<u32>,
    pub(super) size: Option<u64>,
    /// From version 3 to version 2.
    pub(super) downgrade: bool,
}

impl Plan {
    pub(super) fn new(image: &Image, options: &AmendOptions<'_>) -> Result<Self, AmendError> {
        let old = image.header();
        let target = options.version.unwrap_or(old.version);
        let size = options.size.filter(|size| *size != image.virtual_size());
        let mut plan = Self {
            upgrade: old.version < target,
            downgrade: target < old.version,
            refcount_order: refcount_order(&old, target, options)?,
            size,
            header: old,
        };
        plan.change_header(target, options)?;
        // It may not fit.
        plan.header.encode()?;
        if let Some(size) = size {
            check_size(image, size, target)?;
            if plan.header.autoclear.bitmaps() {
                image.get_ready()?;
                let fit = image.check_bitmaps_fit(size);
                image.close_bitmaps()?;
                fit?;
            }
        }
        if plan.downgrade {
            plan.check_downgrade(image)?;
        }
        #[cfg(feature = "encryption")]
        image.judge_keys(options)?;
        Ok(plan)
    }

    fn change_header(
        &mut self,
        target: Version,
        options: &AmendOptions<'_>,
    ) -> Result<(), AmendError> {
        if self.upgrade {
            header::upgrade(&mut self.header);
        }
        let header = &mut self.header;
        if let Some(lazy) = options.lazy_refcounts {
            if lazy && target == Version::V2 {
                return Err(AmendError::refused("lazy_refcounts", "it needs compat=1.1"));
            }
            header.compatible.set_lazy_refcounts(lazy);
        }
        if options.backing_file.is_some() || options.backing_format.is_some() {
            change_backing(header, options)?;
        }
        if let Some(name) = &options.data_file {
            if !header.incompatible.external_data() {
                return Err(AmendError::refused(
                    "data_file",
                    "the image has no external data file, and can't get one",
                ));
            }
            header::set_data_file(header, (!name.is_empty()).then(|| name.clone()));
        }
        if let Some(raw) = options.data_file_raw
            && raw != header.autoclear.raw_external_data()
        {
            if raw {
                return Err(AmendError::refused(
                    "data_file_raw",
                    "it can't be switched on: the data file may hold other than what the guest sees",
                ));
            }
            header.autoclear.set_raw_external_data(false);
        }
        Ok(())
    }

    /// Whether version 2 can say what this image is.
    fn check_downgrade(&self, image: &Image) -> Result<(), AmendError> {
        let refuse = |why: &str| Err(AmendError::refused("compat", why));
        let header = &self.header;
        if self
            .refcount_order
            .unwrap_or(header.geometry.refcount_order())
            != 4
        {
            return refuse("compat=0.10 needs refcount_bits=16");
        }
        if header.incompatible.external_data() {
            return refuse("version 2 has no external data files");
        }
        if header.incompatible.extended_l2() {
            return refuse("version 2 has no extended L2 entries");
        }
        if header.autoclear.bitmaps() && header.bitmaps().is_some() {
            return refuse(
                "the image has bitmaps, which version 2 doesn't have; remove them first",
            );
        }
        let size = self.size.unwrap_or(image.virtual_size());
        for snapshot in image.snapshot_table()?.0 {
            if snapshot.disk_size().is_some_and(|old| old != size) {
                return refuse("a snapshot's disk has another size, which version 2 can't say");
            }
            if snapshot.vm_state_size() > u32::MAX.into() {
                return refuse("a snapshot's machine state is too large for version 2");
            }
        }
        image.check_snapshot_l1s()?;
        let mut last = header.clone();
        if let Some(order) = self.refcount_order {
            last.geometry = geometry_with(last.geometry, order)?;
        }
        header::downgrade(&mut last);
        last.encode()?;
        if header.compression_type != CompressionType::Zlib && image.has_compressed()? {
            return refuse("version 2 has only zlib, and there are clusters compressed otherwise");
        }
        image.check_sound()
    }
}

/// The geometry of an image whose refcounts have another width.
pub(super) fn geometry_with(old: Geometry, order: u32) -> Result<Geometry, AmendError> {
    Geometry::new(old.cluster_bits(), order, old.extended_l2())
        .map_err(|_| AmendError::refused("refcount_bits", "no such width"))
}

/// The new width of refcounts, if it is another.
fn refcount_order(
    old: &Header,
    target: Version,
    options: &AmendOptions<'_>,
) -> Result<Option<u32>, AmendError> {
    let Some(bits) = options.refcount_bits else {
        return Ok(None);
    };
    if !bits.is_power_of_two() || bits > 64 {
        return Err(AmendError::refused(
            "refcount_bits",
            "it must be a power of two and at most 64",
        ));
    }
    let order = bits.trailing_zeros();
    if order == old.geometry.refcount_order() {
        return Ok(None);
    }
    if target == Version::V2 && order != 4 {
        return Err(AmendError::refused(
            "refcount_bits",
            "widths other than 16 need compat=1.1",
        ));
    }
    Ok(Some(order))
}

fn change_backing(header: &mut Header, options: &AmendOptions<'_>) -> Result<(), AmendError> {
    let chosen = |new: &Option<Vec<u8>>, old: Option<&[u8]>| match new {
        Some(name) => Some(name.clone()).filter(|name| !name.is_empty()),
        None => old.map(<[u8]>::to_vec),
    };
    let name = chosen(&options.backing_file, header.backing_name.as_deref());
    let mut format = chosen(&options.backing_format, header.backing_format());
    if name.is_none() {
        if options
            .backing_format
            .as_ref()
            .is_some_and(|format| !format.is_empty())
        {
            return Err(AmendError::refused(
                "backing_fmt",
                "there is no backing file",
            ));
        }
        format = None;
    }
    if name.is_some()
        && header.autoclear.raw_external_data()
        && options.data_file_raw != Some(false)
    {
        return Err(AmendError::refused(
            "backing_file",
            "an image whose data file is raw can't have one",
        ));
    }
    if name.as_deref() != header.backing_name.as_deref()
        || format.as_deref() != header.backing_format()
    {
        header::set_backing(header, name, format);
    }
    Ok(())
}

/// All for which a resize is refused.
fn check_size(image: &Image, size: u64, target: Version) -> Result<(), AmendError> {
    let refuse = |why: String| Err(AmendError::refused("size", why));
    if !size.is_multiple_of(512) {
        return refuse("it must be a multiple of 512".to_owned());
    }
    let geometry = image.geometry;
    if size > SIZE_MAX || geometry.l1_entries_for(size) * 8 > MAX_L1_BYTES {
        let limit = (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage());
        let limit = limit.min(SIZE_MAX);
        return refuse(format!(
            "a disk with clusters of this size has at most {limit} bytes"
        ));
    }
    let header = image.header();
    if header.version == Version::V2 && target == Version::V2 && header.snapshot_count > 0 {
        return refuse("version 2 can't say that snapshots have another size".to_owned());
    }
    Ok(())
}
