//! What an audit is asked for, on any command line.

use anyhow::Result;
use clap::Args;
use qcow2_check::chain::References;

use super::{Choice, parse_offset, parse_references, references};

/// The switches of an audit.
#[derive(Clone, Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Switches {
    /// Show every finding, not just a screenful
    #[arg(long)]
    pub all: bool,

    /// Keep and show at most N findings of each kind
    #[arg(long, value_name = "N", conflicts_with = "all")]
    pub max_findings: Option<usize>,

    /// Exit with 2 if there is any hazard
    #[arg(long)]
    pub deny_hazards: bool,

    /// Decode every compressed cluster, too, and name those that can't be read; takes as long as reading the whole disk
    #[arg(long)]
    pub deep: bool,

    /// Audit the backing files, too, as far as --references lets them be opened
    #[arg(long)]
    pub chain: bool,

    /// What --chain may open: deny, same-directory (of the first image, and below; the default), allow:PATH (a file or folder, may be
    /// repeated) or all
    #[arg(long, value_name = "POLICY", requires = "chain", value_parser = parse_references)]
    references: Vec<Choice>,

    /// Check beside a running writer: read again until the findings are stable, and leave out those that are not
    #[arg(long, short_alias = 'U', alias = "force-share")]
    pub online: bool,

    /// Tell who owns the cluster at this offset of the image file: decimal or 0x…, perhaps with k, M, G or T
    #[arg(long, value_name = "HOST_OFFSET", value_parser = parse_offset, conflicts_with_all = ["chain", "deny_hazards", "all", "max_findings", "deep"])]
    pub owner: Option<u64>,
}

impl Switches {
    /// What `--chain` may open.
    ///
    /// # Errors
    ///
    /// Policies that contradict each other.
    pub fn references(&self) -> Result<References> {
        references(&self.references)
    }
}
