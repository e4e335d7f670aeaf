//! Handles of the handshake task, and of whoever starts vLLM on a node.

use std::net::SocketAddr;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use serde::{Deserialize, Serialize};

use super::Handle;
use super::ask::asks;
pub use dp_sidecar_protocol::machine::handshake::Report as HandshakeEvent;

/// Where an engine's handshake comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Listen {
    /// The one address given by `--data-parallel-address` and `--data-parallel-rpc-port`, for engines
    /// that somebody else starts.
    Shared,
    /// A loopback port of its own, for an engine that the keeper starts.
    Own,
}

asks! {
    /// What the handshake task can be asked for.
    HandshakeAsk {
        Expect -> SocketAddr, "handshake listener", Repeat;
        Forget -> (), "end of a handshake", End;
    }
}

/// Expect an engine; replaces an earlier expectation of the rank. Answered with the `host:port` to pass to the engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Expect {
    pub rank: EngineIndex,
    pub incarnation: Incarnation,
    /// Where it will say HELLO.
    pub listen: Listen,
    /// The INIT payload, encoded, see `protocol::handshake::Init`.
    pub init: Bytes,
}

/// The rank's engine is gone or given up: a READY of that incarnation is refused from now on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Forget {
    pub rank: EngineIndex,
    pub incarnation: Incarnation,
}

/// Handle of the handshake task.
pub type HandshakeHandle = Handle<HandshakeAsk>;

asks! {
    /// What can be asked of who starts vLLM on a node.
    ProcessAsk {
        Spawn -> u32, "start of an engine", Once;
        StopEngine -> (), "stop of an engine", End;
    }
}

/// Start the engine of a rank; the node builds the command line from its own configuration. Answered with its pid.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spawn {
    pub rank: EngineIndex,
    pub incarnation: Incarnation,
    /// Where the engine says HELLO.
    pub handshake: SocketAddr,
}

/// Stop it: SIGTERM, after the kill grace SIGKILL. Its exit comes as an event; the process may live on for the grace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StopEngine {
    pub rank: EngineIndex,
}

/// Handle of who starts vLLM on a node.
pub type ProcessHandle = Handle<ProcessAsk>;

/// What happened to processes of engines.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ProcessEvent {
    /// An engine's process has ended, with all its children.
    Exited {
        rank: EngineIndex,
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
