//! Handle of the attachments manager, and what it must know about the deployment.

use std::collections::BTreeMap;

use dp_sidecar_protocol::{EngineIndex, FrontendId};
use tokio::sync::{mpsc, watch};

use super::{EngineFacts, GroupKind, Reply, RouteLost};
use crate::api::FrontendSnapshot;

/// What is known about the whole deployment. Complete when `engines` has all `size` ranks.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Dense or MoE.
    pub kind: GroupKind,
    /// `--data-parallel-size`.
    pub size: u16,
    /// Facts of each rank that has completed its handshake once (they stay while it restarts).
    pub engines: BTreeMap<EngineIndex, EngineFacts>,
}

/// Who wants a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// `--frontend`: wanted as long as it is on the command line.
    Flag,
    /// `sidecar frontend add`: wanted until removed, or until the sidecar is stopped. A crash does not count.
    Command,
    /// `--serve`: the one that is started by the sidecar.
    Supervised,
}

/// Commands of the attachments manager.
#[derive(Debug)]
pub enum AttachmentCommand {
    /// Attach to this handshake address and keep attaching until removed.
    Add {
        /// `host:port`.
        address: String,
        /// Who wants it.
        origin: Origin,
        /// Done (wanted; not yet attached).
        reply: Reply<()>,
    },
    /// Detach and forget.
    Remove {
        /// `host:port`.
        address: String,
        reply: Reply<()>,
    },
    /// The routes that a rank had when its node was connected. What an earlier sidecar opened, and nobody adopts, is
    /// closed.
    Routes {
        rank: EngineIndex,
        /// Attachment and API server.
        routes: Vec<(FrontendId, u32)>,
    },
    /// A route of one of its frontends ended without being closed.
    RouteLost(RouteLost),
    /// Detach from all and end.
    Shutdown { reply: Reply<()> },
}

/// Handle of the attachments manager.
#[derive(Clone, Debug)]
pub struct AttachmentHandle {
    pub commands: mpsc::Sender<AttachmentCommand>,
    /// All wanted frontends.
    pub snapshot: watch::Receiver<Vec<FrontendSnapshot>>,
}
