//! The staging area of this node.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::Run;
use super::local::internal;
use crate::driver::handles::{NodeEvent, StageHandle};
use crate::exit_code::RunEnd;
use crate::peer::hello::ranks_text;
use crate::shared_memory::{self, SHM_DIR};
use crate::staging::upload::UploadRequests;
use crate::staging::{self, StageConfig};
use crate::state_dir::{RUN_ID_FILE, StateDir};

/// Starts the staging area. Weights of other nodes are taken at the address that those reach.
pub(super) fn start(
    run: &Run,
    uploads: Option<UploadRequests>,
    events: mpsc::Sender<NodeEvent>,
) -> Result<StageHandle, RunEnd> {
    let Run { config, state, tracker, stop, .. } = run;
    let name = format!("node of {}", ranks_text(config.start_rank, config.size_local));
    let nodes = config.nodes.as_ref();
    let host = nodes.and_then(|nodes| nodes.address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let token = nodes.map(|nodes| nodes.token.clone());
    let stage = StageConfig {
        uploads,
        prefault: config.prefault.clone(),
        max_memory: config.max_shared_memory,
        ..StageConfig::new(name, state.path().to_owned(), state.run_id().to_owned(), host, token)
    };
    staging::spawn(stage, events, tracker, stop.clone()).map_err(|e| internal("staging area", &e))
}

/// Frees the shared memory of deployments that are gone for good. Blocks.
pub(super) fn free_lost(state: &StateDir) {
    match shared_memory::remove_lost(Path::new(SHM_DIR), state.run_id(), state.path(), RUN_ID_FILE) {
        Ok(found) => {
            if !found.removed.is_empty() {
                warn!(segments = ?found.removed, "removed segments of a state directory that is lost");
            }
            if !found.unknown.is_empty() {
                info!(segments = ?found.unknown, "nobody has these segments now; they go when their sidecar stops");
            }
        }
        Err(error) => warn!(%error, "cannot look for segments that nobody has"),
    }
}

/// Frees the shared memory, when all engines of this node have ended with the sidecar. Adapters are kept for the
/// successor, as the commit record is.
pub(super) fn free(state: &StateDir) {
    match shared_memory::remove_segments(Path::new(SHM_DIR), state.run_id()) {
        Ok(0) => {}
        Ok(count) => info!(count, "shared memory segments removed"),
        Err(error) => error!(%error, "shared memory segments not removed"),
    }
    if let Err(error) = staging::forget_upload(state.path()) {
        error!(%error, "notes of an upload not removed");
    }
}
