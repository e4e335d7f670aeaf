//! What a node knows about its engines: told after each (re)connection of a link, and what a restarted sidecar
//! goes on from.

use std::collections::BTreeMap;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};
use serde::{Deserialize, Serialize};

use super::{EngineFacts, HandshakeEvent, RankSnapshot, StageState};

/// What a node knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeState {
    /// Its ranks.
    pub ranks: BTreeMap<EngineIndex, RankReport>,
    /// What the serving process was started for; another purpose makes it useless. Relay link only.
    pub about: Option<String>,
    /// Newest wave known there: [`EdgeCommand::Note`](super::EdgeCommand::Note), or a later one that an engine reported.
    pub wave: Option<(Wave, bool)>,
    /// The staging area. Peer link only.
    pub stage: Option<StageState>,
}

/// What a node knows about a rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RankReport {
    /// Its numbers.
    pub snapshot: RankSnapshot,
    /// The incarnation whose sockets are open: none before the first [`RankCommand::Prepare`](super::RankCommand::Prepare), and after the engine
    /// was lost or [`RankCommand::EngineDown`](super::RankCommand::EngineDown).
    pub prepared: Option<Incarnation>,
    /// Its registration frame, see [`RankEvent::Registered`](super::RankEvent::Registered).
    pub registered: Option<Bytes>,
    /// The last incarnation that was lost, and why, see [`RankEvent::Lost`](super::RankEvent::Lost).
    pub lost: Option<(Incarnation, String)>,
    /// From [`RankCommand::EngineReady`](super::RankCommand::EngineReady); none while an engine starts, or is down.
    pub facts: Option<EngineFacts>,
    /// Its engine subscribed to the DP coordinator.
    pub subscribed: bool,
    /// The last report of its engine with a wave edge (wave complete, or start wave), since it was prepared.
    pub wave_report: Option<Bytes>,
    /// Open routes: attachment and API server.
    pub routes: Vec<(FrontendId, u32)>,
    /// The engine's process, if it is ours and runs. Peer link only.
    pub pid: Option<u32>,
    /// Which incarnation that process is. Peer link only.
    pub process: Option<Incarnation>,
    /// It was told to stop. Peer link only.
    pub stopping: bool,
    /// How the last process ended, if no sidecar was there to hear of it. Peer link only.
    pub ended: Option<(Incarnation, String)>,
    /// The incarnation that the handshake task of this process expects or carries on, see
    /// [`HandshakeCommand::Expect`](super::HandshakeCommand::Expect); none after a restart of the sidecar: that handshake cannot be completed any more. Peer
    /// link only.
    pub expected: Option<Incarnation>,
    /// What the handshake task has reported about that incarnation. Peer link only.
    pub handshake: Vec<HandshakeEvent>,
}
