//! Who owns a cluster?
//!
//! The reference map says how often a cluster is referenced, not by whom. This walk looks at all references again and keeps
//! those to a few chosen clusters. It runs only when owners are to be named.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use qcow2_format::bitmap::BitmapCluster;
use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, HostOffset, RefcountBlock};
use qcow2_io::Storage;

use crate::blocks::{BlockRef, Blocks};
use crate::image::Image;
use crate::load::{self, Loaded};
use crate::refmap::RefMap;
use crate::walk::{self, L1Scan, Window};
use crate::{ByteRange, Code, Finding, Options, Place, Run, Structure, bitmaps, blocks};

/// Clusters with conflicting owners that are looked into; the rest is only counted.
const CONFLICTS_MAX: usize = 1 << 14;
/// Owners kept for a cluster.
const OWNERS_MAX: usize = 64;

/// One owner of a host cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct Owner {
    /// What it is.
    pub structure: Structure,
    /// Guest bytes: what the cluster holds, or an L2 table maps.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub guest: Option<ByteRange>,
    /// Which of several: an L2 table's L1 entry, a refcount block's, a bitmap's or its table's index.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub index: Option<u64>,
    /// The snapshot whose tree it is; `None` for the active tree and what no tree owns.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub snapshot: Option<u64>,
}

impl Owner {
    fn new(structure: Structure, index: Option<u64>) -> Self {
        Self {
            structure,
            guest: None,
            index,
            snapshot: None,
        }
    }

    /// Whether it is guest data.
    pub fn is_data(&self) -> bool {
        matches!(self.structure, Structure::Data | Structure::CompressedData)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.structure)?;
        if let Some(index) = self.index {
            write!(f, " {index}")?;
        }
        if let Some(guest) = &self.guest {
            write!(f, ", guest {:#x}..{:#x}", guest.start, guest.end)?;
        }
        match self.snapshot {
            Some(snapshot) => write!(f, " (snapshot {snapshot})"),
            None if self.is_data() || self.structure == Structure::L2Table => {
                f.write_str(" (active)")
            }
            None => Ok(()),
        }
    }
}

/// What is known of one host cluster.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct ClusterOwners {
    /// First byte of the cluster.
    pub host_offset: u64,
    /// Bytes in the cluster.
    pub cluster_size: u64,
    /// Its refcount on disk; `None` where it can't be read.
    pub refcount: Option<u64>,
    /// Its owners, at most 64.
    pub owners: Vec<Owner>,
}

/// Names the owners of the cluster that holds a byte of the file.
///
/// # Errors
///
/// The finding that makes the image impossible to look into.
pub fn owners(
    storage: &dyn Storage,
    offset: HostOffset,
    options: &Options<'_>,
) -> Result<ClusterOwners, Box<Finding>> {
    Run::start(options, |run| name_owners(storage, offset, run))
        .unwrap_or_else(|| Err(Box::new(failed("no threads can be started"))))
}

fn failed(detail: &'static str) -> Finding {
    let place = Place::of(Structure::Header);
    Finding::new(Code::HeaderUnreadable, place, detail)
}

fn name_owners(
    storage: &dyn Storage,
    offset: HostOffset,
    run: Run<'_>,
) -> Result<ClusterOwners, Box<Finding>> {
    let Some(loaded) = load::load(storage, &run) else {
        let (findings, _) = run.finish().1.finish();
        let first = findings.into_iter().next();
        return Err(Box::new(first.unwrap_or_else(|| failed("can't be read"))));
    };
    let image = &loaded.image;
    let cluster = offset.get() >> image.cluster_bits();
    let scan = walk::scan(image, &run);
    let mut map = RefMap::new(image.file_clusters());
    map.insert(image.file_clusters());
    let blocks = blocks::load(image, &mut map, &run);
    let found = gather(&loaded, &scan, &blocks, &[cluster], &run);
    Ok(ClusterOwners {
        host_offset: cluster << image.cluster_bits(),
        cluster_size: image.cluster_size(),
        refcount: refcount(image, &blocks, cluster),
        owners: found.into_values().flatten().collect(),
    })
}

fn refcount(image: &Image<'_>, blocks: &Blocks, cluster: u64) -> Option<u64> {
    let per_block = image.geometry.refcounts_per_block();
    match blocks.get(cluster / per_block) {
        BlockRef::Absent => Some(0),
        BlockRef::Unreadable | BlockRef::Skipped => None,
        BlockRef::At(offset) => {
            let mut bytes = vec![0; image.geometry.cluster_len()];
            image.reader.read(&mut bytes, offset).ok()?;
            RefcountBlock::new(&bytes, image.geometry)
                .get(usize::try_from(cluster % per_block).ok()?)
        }
    }
}

/// Tells of clusters whose owners may not share them, and of data that compressed data claims, too. Whether there is nothing but
/// the latter.
pub(crate) fn conflicts(
    loaded: &Loaded<'_>,
    map: &RefMap,
    scan: &L1Scan,
    blocks: &Blocks,
    run: &Run<'_>,
) -> bool {
    let image = &loaded.image;
    let targets: Vec<u64> = map.conflicts().take(CONFLICTS_MAX).collect();
    let found = gather(loaded, scan, blocks, &targets, run);
    let mut harmless = true;
    for cluster in targets {
        let owners = found.get(&cluster).cloned().unwrap_or_default();
        let data = owners.iter().filter(|owner| owner.is_data()).count();
        let code = if data == owners.len() && map.is_mixed(cluster) {
            Code::CompressedOnData
        } else if data == owners.len() {
            Code::DataShared
        } else if data > 0 {
            Code::DataOnMetadata
        } else if owners
            .iter()
            .all(|owner| owner.structure == Structure::L2Table)
        {
            Code::L2Shared
        } else {
            Code::MetadataOverlap
        };
        harmless &= code == Code::CompressedOnData;
        let structure = owners
            .first()
            .map_or(Structure::Data, |owner| owner.structure);
        let mut place =
            Place::of(structure).at(cluster << image.cluster_bits(), image.cluster_size());
        place.guest = owners.iter().rev().find_map(|owner| owner.guest);
        let names: Vec<String> = owners.iter().take(4).map(Owner::to_string).collect();
        let more = owners.len().saturating_sub(names.len());
        let mut detail = names.join("; ");
        if more > 0 {
            detail.push_str("; and others");
        }
        run.find(Finding::new(code, place, detail));
    }
    let rest = map.conflicts().skip(CONFLICTS_MAX).count() as u64;
    if rest > 0 {
        let place = Place::of(Structure::Data);
        let detail = format!("{rest} more clusters have owners that may not share them");
        run.find(Finding::new(Code::DataShared, place, detail).times(rest));
    }
    harmless && rest == 0
}

type Found = BTreeMap<u64, BTreeSet<Owner>>;

fn keep(found: &mut Found, cluster: u64, owner: Owner) {
    let owners = found.entry(cluster).or_default();
    owners.insert(owner);
    if owners.len() > OWNERS_MAX {
        // The smallest ones stay, whichever came first.
        owners.pop_last();
    }
}

/// Looks for the owners of the clusters in `targets`, ascending.
fn gather(
    loaded: &Loaded<'_>,
    scan: &L1Scan,
    blocks: &Blocks,
    targets: &[u64],
    run: &Run<'_>,
) -> Found {
    let image = &loaded.image;
    let mut wanted = RefMap::new(image.file_clusters());
    for cluster in targets {
        wanted.insert(*cluster);
    }
    let mut found = Found::new();
    let bits = image.cluster_bits();
    for range in &image.metadata {
        let last = range.offset.saturating_add(range.len.max(1) - 1) >> bits;
        let clusters = range.offset >> bits..=last;
        if !image.is_inside(range.offset, range.len) || range.len == 0 {
            continue;
        }
        let first = targets.partition_point(|target| target < clusters.start());
        for cluster in targets
            .iter()
            .skip(first)
            .take_while(|t| clusters.contains(t))
        {
            let mut owner = Owner::new(range.structure, range.index);
            if range.structure == Structure::SnapshotL1 {
                owner.snapshot = owner.index.take();
            }
            keep(&mut found, *cluster, owner);
        }
    }
    for index in 0..blocks.len() {
        if let BlockRef::At(offset) = blocks.get(index)
            && wanted.is_seen(offset >> bits)
        {
            keep(
                &mut found,
                offset >> bits,
                Owner::new(Structure::RefcountBlock, Some(index)),
            );
        }
    }
    for (number, bitmap) in (0_u64..).zip(&loaded.bitmaps) {
        bitmaps::each_entry(image, bitmap, run, |_, entry| {
            if let BitmapCluster::Cluster(offset) = entry.kind()
                && wanted.is_seen(offset.get() >> bits)
            {
                keep(
                    &mut found,
                    offset.get() >> bits,
                    Owner::new(Structure::BitmapData, Some(number)),
                );
            }
        });
    }
    for part in tables(image, scan, &wanted, run) {
        for (cluster, owners) in part {
            for owner in owners {
                keep(&mut found, cluster, owner);
            }
        }
    }
    found
}

fn tables(image: &Image<'_>, scan: &L1Scan, wanted: &RefMap, run: &Run<'_>) -> Vec<Found> {
    let plan = Window::plan(image);
    let windows = scan.windows.len() as u64;
    let seekers = run.share_out(
        windows.saturating_add(1),
        || Seeker {
            image,
            wanted,
            found: Found::new(),
            window: Window::default(),
            buffer: Vec::new(),
        },
        |seeker, unit| match scan.window(unit) {
            Some(number) => seeker.window(&plan, number, scan),
            None => {
                for table in &scan.duplicates {
                    let tree = if table.active { None } else { table.snapshot };
                    seeker.table(table.offset, table.l1_index, &[tree]);
                }
            }
        },
    );
    seekers.into_iter().map(|seeker| seeker.found).collect()
}

struct Seeker<'a, 'i> {
    image: &'a Image<'i>,
    wanted: &'a RefMap,
    found: Found,
    window: Window,
    buffer: Vec<u8>,
}

impl Seeker<'_, '_> {
    /// Looks at all tables of a window.
    fn window(&mut self, plan: &walk::Plan, number: u64, scan: &L1Scan) {
        let mut window = std::mem::take(&mut self.window);
        let (mut tables, mut trees) = (Vec::new(), Vec::new());
        window.load(self.image, plan, number, |_, _, _| {});
        for index in window.indices() {
            window.trees_by_table(self.image, index, &mut tables);
            for same in tables.chunk_by(|a, b| a.0 == b.0) {
                let first = same.first().filter(|(at, _)| !scan.is_duplicate(*at));
                let Some((offset, _)) = first else {
                    continue;
                };
                trees.clear();
                trees.extend(same.iter().map(|(_, snapshot)| *snapshot));
                self.table(*offset, index, &trees);
            }
        }
        self.window = window;
    }

    /// Looks at a table and all its entries. `trees` are the snapshots that have it, `None` for the active tree.
    fn table(&mut self, offset: u64, l1_index: u64, trees: &[Option<u64>]) {
        let image = self.image;
        let coverage = image.geometry.l2_coverage();
        let start = image.guest_offset(l1_index, 0);
        self.touch(offset, image.cluster_size(), trees, |snapshot| Owner {
            structure: Structure::L2Table,
            guest: Some(ByteRange::new(start, coverage)),
            index: Some(l1_index),
            snapshot,
        });
        if image.reader.is_known_zero(offset, image.cluster_size()) {
            return;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(image.geometry.cluster_len(), 0);
        if image.reader.read(&mut buffer, offset).is_ok() && !image.rules.external_data {
            for (index, entry) in (0_u64..).zip(L2Table::new(&buffer, image.geometry).iter()) {
                let (structure, at, len) = match entry.kind(image.rules) {
                    ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                        (Structure::Data, host.get(), image.cluster_size())
                    }
                    ClusterKind::Compressed(extent) if entry.bitmap() == 0 => (
                        Structure::CompressedData,
                        extent.offset.get(),
                        extent.len_bytes,
                    ),
                    _ => continue,
                };
                let guest = image.guest_offset(l1_index, index);
                self.touch(at, len, trees, |snapshot| Owner {
                    structure,
                    guest: Some(ByteRange::new(guest, image.cluster_size())),
                    index: None,
                    snapshot,
                });
            }
        }
        self.buffer = buffer;
    }

    #[inline]
    fn touch(
        &mut self,
        at: u64,
        len: u64,
        trees: &[Option<u64>],
        owner: impl Fn(Option<u64>) -> Owner,
    ) {
        let bits = self.image.cluster_bits();
        let first = at >> bits;
        let last = at.saturating_add(len - 1) >> bits;
        for cluster in first..=last {
            if self.wanted.is_seen(cluster) && self.image.is_inside(at, len) {
                for snapshot in trees {
                    keep(&mut self.found, cluster, owner(*snapshot));
                }
            }
        }
    }
}
