//! The yardstick: a process that reads an image's metadata and makes nothing of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use qcow2_format::{Geometry, Header, L1Entry, RefcountTableEntry, snapshot};
use qcow2_io::{File, Storage as _};

/// Tables that a thread takes at a time.
const BATCH: usize = 64;
/// Largest header cluster.
const HEADER_BYTES: usize = 2 << 20;
/// More than the snapshot tables of the benchmark's images.
const SNAPSHOT_TABLE_BYTES: usize = 64 << 10;

/// Read all L2 tables and refcount blocks of an image, and do nothing else
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    image: PathBuf,
}

/// Reads, and prints how many bytes the tables had.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let file = File::open(&args.image)?;
    let mut first = vec![0; 4096];
    file.read_at(&mut first, 0)?;
    let header_len = Header::probe(&first)?.min(HEADER_BYTES);
    first.resize(header_len, 0);
    file.read_at(&mut first, 0)?;
    let header = Header::decode(&first)?;
    let tables = tables(&file, &header)?;
    read_all(&file, header.geometry, &tables)?;
    println!("{}", tables.len() as u64 * header.geometry.cluster_size());
    Ok(ExitCode::SUCCESS)
}

/// Where all L2 tables and refcount blocks lie, in the order of the file.
fn tables(file: &File, header: &Header) -> Result<Vec<u64>> {
    let mut l1_tables = vec![(header.l1_table_offset.get(), header.l1_entries)];
    if header.snapshot_count > 0 {
        let mut bytes = vec![0; SNAPSHOT_TABLE_BYTES];
        file.read_at(&mut bytes, header.snapshot_table_offset.get())?;
        for snapshot in snapshot::decode_table(&bytes, header.snapshot_count) {
            let snapshot = snapshot.context("the snapshot table")?;
            l1_tables.push((snapshot.l1_table_offset.get(), snapshot.l1_entries));
        }
    }
    let mut tables = BTreeSet::new();
    for (offset, entries) in l1_tables {
        for entry in words(file, offset, u64::from(entries) * 8)? {
            tables.insert(L1Entry::from_be_bytes(entry).l2_table().get());
        }
    }
    let len = u64::from(header.refcount_table_clusters) * header.geometry.cluster_size();
    for entry in words(file, header.refcount_table_offset.get(), len)? {
        tables.insert(RefcountTableEntry::from_be_bytes(entry).block().get());
    }
    tables.remove(&0);
    Ok(tables.into_iter().collect())
}

fn words(file: &File, offset: u64, len: u64) -> Result<Vec<[u8; 8]>> {
    let mut bytes = vec![0; usize::try_from(len)?];
    file.read_at(&mut bytes, offset)?;
    Ok(bytes.as_chunks::<8>().0.to_vec())
}

/// Reads the tables, a cluster each, on all cores.
fn read_all(file: &File, geometry: Geometry, tables: &[u64]) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let mut buffer = vec![0; geometry.cluster_len()];
        loop {
            let start = next.fetch_add(BATCH, Ordering::Relaxed);
            let Some(rest) = tables.get(start..).filter(|rest| !rest.is_empty()) else {
                return Ok(());
            };
            for offset in rest.iter().take(BATCH) {
                file.read_at(&mut buffer, *offset)?;
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, Into::into);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            match other.join() {
                Ok(theirs) => result = result.and(theirs),
                Err(_) => bail!("a reading thread panicked"),
            }
        }
        result
    })
}
