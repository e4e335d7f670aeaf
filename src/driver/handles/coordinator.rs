//! Handles of the DP coordinator, and of the edge task with its engine-facing sockets.

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::coordinator::Adopted;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::ask::asks;
use super::{Handle, Reply};
use crate::api::CoordinatorSnapshot;

/// A message of a rank for a frontend's own DP coordinator, to be pushed as it is.
#[derive(Clone, Debug)]
pub struct ForFrontendCoordinator {
    /// The rank it comes from (whose PUSH socket carries it).
    pub rank: EngineIndex,
    /// A single-frame `EngineCoreOutputs` with stats, wave_complete or start_wave.
    pub frame: Bytes,
}

/// Commands of the coordinator task.
#[expect(clippy::large_enum_variant, reason = "the large one comes once in an engine's life")]
#[derive(Debug)]
pub enum CoordinatorCommand {
    /// The rank registered; from here its version is known.
    EngineVersion {
        /// Field positions and behaviour of its version.
        layout: Layout,
    },
    /// What stands on a node, after the connection to it was made (again), see
    /// [`crate::driver::coordinator::adoption`]. Comes before other commands about its ranks; events of its edge may
    /// overtake it.
    Adopt {
        /// Newest wave noted there, see [`crate::driver::edge::EdgeState::wave`].
        wave: Option<(Wave, bool)>,
        /// Its engines that have subscribed; those whose facts are known are `ready`.
        engines: Vec<Adopted>,
    },
    /// Frontends may send to this rank from now on: report its real load.
    Admitted { rank: EngineIndex },
    /// The rank is down or not admitted: report a load that steers new requests elsewhere; a lockstep
    /// group's wave is over.
    EngineDown { rank: EngineIndex, incarnation: Incarnation },
    /// A frontend's DP coordinator wants to hear of the engines.
    AddFrontend {
        frontend: FrontendId,
        /// Where its messages go. A full queue drops stats, never waves.
        sink: mpsc::Sender<ForFrontendCoordinator>,
    },
    /// A frontend is gone.
    RemoveFrontend { frontend: FrontendId },
    /// A frontend's DP coordinator broadcast START_DP_WAVE. Sent once per broadcast, whichever of the
    /// ranks' subscriptions it is taken from (more often is harmless).
    StartWave {
        frontend: FrontendId,
        /// The wave it names.
        wave: Wave,
    },
    /// As [`NodeEvent::Wake`](super::NodeEvent::Wake), in order with other commands. For tests.
    #[cfg(any(test, feature = "test-support"))]
    Wake { rank: EngineIndex },
    /// End.
    Shutdown { reply: Reply<()> },
}

/// Handle of the coordinator task.
#[derive(Clone, Debug)]
pub struct CoordinatorHandle {
    pub commands: mpsc::Sender<CoordinatorCommand>,
    pub snapshot: watch::Receiver<CoordinatorSnapshot>,
}

asks! {
    /// What the edge task can be asked for: it owns, per engine incarnation, the XPUB and PULL that the engine takes for
    /// its DP coordinator, on the engine's own node. The coordinator machine, on the leader, decides what goes through.
    #[cfg_attr(
        not(any(test, feature = "test-support")),
        expect(clippy::enum_variant_names, reason = "named as its commands are")
    )]
    EdgeAsk {
        EdgePrepare -> (String, String), "coordinator sockets", Repeat;
        // An engine acts on it at once, or never.
        EdgePublish -> (), "publication", Life, |_| Duration::from_secs(10);
        EdgeNote -> (), "note of the wave", Latest;
        EdgeClose -> (), "closing of coordinator sockets", End;
        // Of use only while whoever asked still waits.
        EdgeVersion -> String, "version of the relay process", Once, |_| Duration::from_secs(5);
    }
}

/// Bind fresh sockets for a rank's new incarnation; those of the life before are dropped. Answered with
/// `(coordinator_input, coordinator_output)` for INIT.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgePrepare {
    pub rank: EngineIndex,
    /// Its new incarnation. The same one again gives the same sockets.
    pub incarnation: Incarnation,
}

/// Publish a message to the engines of these ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgePublish {
    pub ranks: Vec<EngineIndex>,
    /// READY, or START_DP_WAVE.
    pub frames: Vec<Bytes>,
}

/// The wave as the coordinator machine has it. Kept for a successor, which starts from it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgeNote {
    pub wave: Wave,
    /// Is it running?
    pub running: bool,
}

/// Drop the sockets of an incarnation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgeClose {
    pub rank: EngineIndex,
    pub incarnation: Incarnation,
}

/// Which release of the sidecar the process with these sockets runs: the relay process, which may be older than the
/// sidecar that took it over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgeVersion {}

/// What the edge task reports.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum EdgeEvent {
    /// The engine receives from now on what is published.
    Subscribed { rank: EngineIndex, incarnation: Incarnation },
    /// The engine reports load or a wave edge.
    Report {
        rank: EngineIndex,
        incarnation: Incarnation,
        /// An encoded single-frame `EngineCoreOutputs`.
        frame: Bytes,
    },
}

/// Handle of the edge task of a node.
pub type EdgeHandle = Handle<EdgeAsk>;
