//! Handle of the attachments manager, and what it must know about the deployment.

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::{EngineIndex, FrontendId};
use tokio::sync::{mpsc, watch};

use super::{EngineFacts, GroupKind, HandleError, Reply, RouteLost, ask};
use crate::api::FrontendSnapshot;

/// For the manager to answer.
const ANSWER: Duration = Duration::from_secs(10);

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
    /// The routes that a rank had when its node was connected, before anything is attached. What an earlier sidecar
    /// opened, and nobody adopts, is closed, and its API servers are told that their engines are dead.
    Routes {
        rank: EngineIndex,
        /// Attachment and API server.
        routes: Vec<(FrontendId, u32)>,
        /// None of their numbers is given to another attachment from now on.
        reply: Reply<()>,
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

impl AttachmentHandle {
    /// See [`AttachmentCommand::Add`].
    pub async fn add(&self, address: String, origin: Origin) -> Result<(), HandleError> {
        let what = format!("attachment to {address}");
        let command = |reply| AttachmentCommand::Add { address, origin, reply };
        ask(&self.commands, "attachment", what, ANSWER, command).await
    }

    /// See [`AttachmentCommand::Remove`].
    pub async fn remove(&self, address: String) -> Result<(), HandleError> {
        let what = format!("detachment from {address}");
        let command = |reply| AttachmentCommand::Remove { address, reply };
        ask(&self.commands, "attachment", what, ANSWER, command).await
    }

    /// See [`AttachmentCommand::Routes`].
    pub async fn routes(&self, rank: EngineIndex, routes: Vec<(FrontendId, u32)>) -> Result<(), HandleError> {
        let what = format!("routes of DP rank {rank}");
        let command = |reply| AttachmentCommand::Routes { rank, routes, reply };
        ask(&self.commands, "attachment", what, ANSWER, command).await
    }
}
