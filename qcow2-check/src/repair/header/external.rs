//! Whether guest data lies in another file.

use qcow2_format::header::Version;
use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, EntryRules, L1Entry};
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::action::Effect;
use super::Mending;

/// L2 tables looked at to tell whether guest data lies in another file.
const TABLES_LOOKED_AT: usize = 64;

/// Whether guest data lies in another file: there it lies where the guest has it.
pub(super) fn mend_external(mending: &mut Mending<'_, '_, '_>) -> Result<(), PlanError> {
    let header = &mending.header;
    let said = header.incompatible.external_data();
    if header.version == Version::V2 || !said && header.data_file_name().is_none() {
        return Ok(());
    }
    let geometry = header.geometry;
    let overlay = &mending.planner.overlay;
    let rules = EntryRules {
        external_data: true,
        ..header.entry_rules()
    };
    let entries = geometry
        .l1_entries_for(header.virtual_size_raw)
        .min(header.l1_entries.into());
    let mut l1 = vec![0; usize::try_from(entries * 8).unwrap_or(0)];
    overlay.read_at(&mut l1, header.l1_table_offset.get())?;
    let mut table = vec![0; geometry.cluster_len()];
    let (mut same, mut other) = (0_u64, 0_u64);
    let entries = (0_u64..).zip(l1.as_chunks::<8>().0);
    let tables = entries.filter(|(_, word)| {
        let offset = L1Entry::from_be_bytes(**word).l2_table();
        offset.get() != 0 && geometry.is_cluster_aligned(offset) && offset.get() < overlay.new_len()
    });
    for (index, word) in tables.take(TABLES_LOOKED_AT) {
        overlay.read_at(&mut table, L1Entry::from_be_bytes(*word).l2_table().get())?;
        for (number, entry) in (0_u64..).zip(L2Table::new(&table, geometry).iter()) {
            let guest = index
                .saturating_mul(geometry.l2_coverage())
                .saturating_add(number << geometry.cluster_bits());
            match entry.kind(rules) {
                ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                    if host.get() == guest {
                        same += 1;
                    } else {
                        other += 1;
                    }
                }
                ClusterKind::Compressed(_) => other += 1,
                _ => {}
            }
        }
    }
    if said && (other > same || header.snapshot_count > 0 && other > 0) {
        mending.header.incompatible.set_external_data(false);
        mending.header.autoclear.set_raw_external_data(false);
        let reason =
            format!("{other} clusters lie elsewhere than they would in another file, {same} don't");
        mending.note(72, reason, Effect::Reachable);
    } else if !said && same > other {
        mending.header.incompatible.set_external_data(true);
        let reason = format!(
            "{same} clusters lie where they would in the file that is named, {other} don't"
        );
        mending.note(72, reason, Effect::Reachable);
    }
    Ok(())
}
