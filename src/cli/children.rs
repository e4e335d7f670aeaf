//! Commands that the sidecar starts itself.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::machine::virtual_engine::Limits;

use crate::duration;

/// `sidecar keeper`.
#[derive(Debug, Args)]
pub(super) struct KeeperArgs {
    /// The state directory.
    #[arg(long)]
    pub state_dir: PathBuf,
    /// Marks all processes of the state directory.
    #[arg(long)]
    pub run_id: String,
    /// Stop everything after this long without an owner.
    #[arg(long, value_parser = duration::parse)]
    pub orphan_grace: Duration,
    /// Grace between SIGTERM and SIGKILL.
    #[arg(long, value_parser = duration::parse)]
    pub kill_grace: Duration,
}

/// `sidecar relay`.
#[derive(Debug, Args)]
pub(super) struct RelayArgs {
    /// The state directory.
    #[arg(long)]
    pub state_dir: PathBuf,
    /// First rank of this node.
    #[arg(long)]
    pub start_rank: u16,
    /// Number of ranks of this node.
    #[arg(long)]
    pub ranks: u16,
    /// Slots of every engine for frontends.
    #[arg(long)]
    pub frontend_slots: u32,
    /// How the ranks depend on each other.
    #[arg(long)]
    pub kind: GroupKind,
    /// Bounds of each rank, as JSON.
    #[arg(long, value_parser = |text: &str| serde_json::from_str::<Limits>(text))]
    pub limits: Limits,
}
