//! Handles of the handshake task, and of whoever starts vLLM on a node.

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tokio::sync::mpsc;

use super::Reply;

/// Where an engine's handshake comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// The one address given by `--data-parallel-address` and `--data-parallel-rpc-port`, for engines
    /// that somebody else starts.
    Shared,
    /// A loopback port of its own, for an engine that the keeper starts.
    Own,
}

/// What INIT tells an engine, see `protocol::handshake::Init`.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// Which rank.
    pub rank: EngineIndex,
    /// Which incarnation.
    pub incarnation: Incarnation,
    /// Where it will say HELLO.
    pub listen: Listen,
    /// The INIT payload, encoded.
    pub init: Bytes,
}

/// Commands of the handshake task.
#[derive(Debug)]
pub enum HandshakeCommand {
    /// Expect an engine; replaces an earlier expectation of the rank.
    Expect {
        /// Whom, and what to tell it.
        expectation: Expectation,
        /// `host:port` to pass to the engine.
        reply: Reply<std::net::SocketAddr>,
    },
    /// The rank's engine is gone or given up: a READY of that incarnation is refused from now on.
    Forget {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// End.
    Shutdown {
        /// Done.
        reply: Reply<()>,
    },
}

/// What the handshake task reports.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum HandshakeEvent {
    /// HELLO came and INIT went out.
    Connected {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// READY came, and it fits.
    Ready {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// vLLM's hash of the parallel flags (lockstep engines since 0.12.0).
        parallel_config_hash: Option<String>,
        /// Up to 0.19.1 READY carries it; later the ready response does.
        num_gpu_blocks: Option<u64>,
    },
    /// A peer broke the rules. Says who, stage, expected and actual. `rank` is set when the fault
    /// disqualifies that rank's engine.
    Refused {
        /// The rank it concerns, if it is one of ours.
        rank: Option<EngineIndex>,
        /// The whole story, for the log.
        error: String,
    },
}

/// Handle of the handshake task.
#[derive(Clone, Debug)]
pub struct HandshakeHandle {
    /// Commands.
    pub commands: mpsc::Sender<HandshakeCommand>,
}

/// Commands for whoever starts vLLM on a node.
#[derive(Debug)]
pub enum ProcessCommand {
    /// Start the engine of a rank; the node builds the command line from its own configuration.
    Spawn {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Where the engine says HELLO.
        handshake: std::net::SocketAddr,
        /// Its pid.
        reply: Reply<u32>,
    },
    /// Stop it: SIGTERM, after the kill grace SIGKILL. Its exit comes as an event.
    Stop {
        /// Which rank.
        rank: EngineIndex,
        /// Told (the process may live on for the grace).
        reply: Reply<()>,
    },
}

/// What happened to processes of engines.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum ProcessEvent {
    /// An engine's process has ended, with all its children.
    Exited {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Was it asked to stop?
        requested: bool,
        /// Status and last lines, for people.
        reason: String,
    },
    /// The keeper is gone and its successor is not there yet: nothing can be started or stopped.
    KeeperAway,
    /// The keeper was replaced, or cannot be; the engines it had are ended.
    KeeperLost,
    /// The sidecar of this node was told to stop: its engines end now, and none can be started until it is back.
    NodeStops {
        /// Who told it.
        reason: String,
    },
}

pub use dp_sidecar_protocol::machine::weight_update::NodeId;

/// What the leader hears about a node of the deployment: its own, or one at the other end of a peer link.
#[derive(Clone, Debug)]
pub enum NodeEvent {
    /// Of its engines' processes.
    Process(ProcessEvent),
    /// The link to it is there again; this is what it knows. What happened in between is not told otherwise.
    Connected(Box<super::NodeState>),
    /// The link to it is lost. Its engines go on; commands wait in the link, under their deadlines.
    Disconnected {
        /// What was seen.
        reason: String,
    },
}

/// Handle of whoever starts vLLM on a node.
#[derive(Clone, Debug)]
pub struct ProcessHandle {
    /// Commands.
    pub commands: mpsc::Sender<ProcessCommand>,
}
