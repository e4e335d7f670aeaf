//! What a running sidecar says about itself.

use std::collections::BTreeMap;

use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::stats::Load;
use dp_sidecar_protocol::{EngineIndex, Wave};
use serde::{Deserialize, Serialize};

use super::UpdateReport;
use crate::gpu::GpuReport;

/// Everything there is to know about a running sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The sidecar process.
    pub sidecar: SidecarStatus,
    /// What it hosts.
    pub deployment: DeploymentStatus,
    /// Its engines, by rank.
    pub engines: Vec<EngineStatus>,
    /// Wanted frontends.
    pub frontends: Vec<FrontendStatus>,
    pub coordinator: CoordinatorSnapshot,
    pub weights: WeightsStatus,
    /// Who controls the engines at the moment.
    pub controller: ControllerStatus,
    /// Accelerators of this node.
    pub gpus: GpuReport,
    /// All nodes of a deployment over several, by first rank; on a follower itself alone.
    #[serde(default)]
    pub nodes: Vec<NodeStatus>,
    /// On a follower: its way to the leader.
    #[serde(default)]
    pub leader: Option<LeaderStatus>,
    /// On a leader: ranks that no node has brought yet, for people.
    #[serde(default)]
    pub missing: Option<String>,
}

/// A node of the deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// First rank of the node.
    pub start_rank: u16,
    /// Ranks of the node.
    pub size_local: u16,
    /// Its host name.
    pub host: String,
    /// Its address that other nodes reach.
    pub address: Option<String>,
    /// `here`, `up`, `down`.
    pub link: String,
    /// Seconds since the link came up or went down.
    pub since_s: Option<u64>,
    /// Round trip of the last ping over the link, in microseconds.
    pub rtt_us: Option<u64>,
    /// Why the link went down.
    pub detail: Option<String>,
}

/// A follower's way to its leader.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderStatus {
    /// `--leader`.
    pub address: String,
    pub up: bool,
    /// Seconds since it is up, or down.
    pub since_s: u64,
    pub state: String,
}

/// The sidecar process itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SidecarStatus {
    pub pid: u32,
    pub version: String,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// `starting`, `waiting for nodes`, `serving`, `degraded`, `stopping`; on a follower `waiting for the leader`,
    /// `following`, `stopping`.
    pub state: String,
    /// State directory of the sidecar.
    pub state_dir: String,
    /// Pid of the keeper, if there is one.
    pub keeper_pid: Option<u32>,
    /// Pid of the relay process, which owns the data path; none while it is replaced.
    #[serde(default)]
    pub relay_pid: Option<u32>,
}

/// What the sidecar hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeploymentStatus {
    /// Dense or MoE.
    pub kind: GroupKind,
    /// `--data-parallel-size`.
    pub size: u16,
    /// First rank of this node.
    pub start_rank: u16,
    /// Ranks of this node.
    pub size_local: u16,
    /// Model as given on the command line, if the sidecar starts the engines.
    pub model: Option<String>,
    /// HTTP address of the frontend that the sidecar starts (`--serve`).
    #[serde(default)]
    pub http: Option<String>,
}

/// One DP rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    pub rank: EngineIndex,
    /// Pid of its `vllm serve` process, if the keeper started it.
    pub pid: Option<u32>,
    /// Its vLLM version, once registered.
    pub vllm_version: Option<String>,
    /// `stopped`, `starting`, `handshake`, `registered`, `restoring`, `admitted`, `fenced`, `failed`.
    pub state: String,
    /// Which life of the rank this is.
    pub incarnation: u64,
    /// Version of the weights that it holds, once it is admitted: `unknown` while it loads, and when a frontend has
    /// changed or discarded them. Only the leader knows it.
    pub weight_version: Option<String>,
    /// Parts of its memory that sleep: `weights`, `kv_cache`.
    #[serde(default)]
    pub asleep: Vec<String>,
    /// Its weights were discarded (`sleep` of level 2) and nothing was loaded since: new requests are held.
    #[serde(default)]
    pub without_weights: bool,
    /// Requests waiting in its scheduler.
    pub waiting: u64,
    /// Requests running.
    pub running: u64,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_cache_usage: f64,
    /// Requests the sidecar has in flight there.
    pub in_flight: u64,
    /// Requests held in front of it.
    pub held: u64,
    /// Bytes that they take.
    #[serde(default)]
    pub held_bytes: u64,
    /// Messages of frontends that were refused since the relay process started.
    #[serde(default)]
    pub refused: u64,
    /// Why the last of them was.
    #[serde(default)]
    pub last_refusal: Option<String>,
    /// How often it was restarted.
    pub restarts: u64,
    /// Why it last failed.
    pub last_error: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrontendStatus {
    /// State of its attachment.
    pub attachment: FrontendSnapshot,
    /// Its requests in flight, over all ranks.
    pub in_flight: u64,
}

/// Weights of the deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WeightsStatus {
    /// Committed version; `unknown` if a frontend has changed or discarded the weights since.
    pub version: String,
    /// Directory it was loaded from, if known.
    pub dir: Option<String>,
    /// `possible`, or that and why they cannot be updated, for people.
    #[serde(default)]
    pub updates: String,
    /// The last update, however it ended.
    pub last_update: Option<UpdateReport>,
}

/// Who controls the engines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerStatus {
    /// Holder of the control lock: `update <id>`, `frontend <address>`, `command line`.
    pub holder: Option<String>,
    /// The engines are paused.
    pub paused: bool,
}

/// Versions of everything that has one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionReport {
    pub sidecar: String,
    /// Of the relay process of each node, by the node's first rank.
    #[serde(default)]
    pub relays: BTreeMap<u16, RelayVersion>,
    /// vLLM version by rank.
    pub vllm: BTreeMap<u16, String>,
    /// Committed weights.
    pub weights: String,
}

/// Release of a relay process, which may be older than the sidecar that took it over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RelayVersion {
    /// What it answered.
    Version(String),
    /// Why it is not known now.
    Unknown(String),
}

/// State of one wanted frontend, for `sidecar frontend list` and status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendSnapshot {
    /// Handshake address, as given.
    pub address: String,
    /// Attachment number, if there is one at the moment.
    pub id: Option<u64>,
    /// `waiting`, `connecting`, `handshake`, `registering`, `attached`, `refused`.
    pub state: String,
    /// API servers (slots taken).
    pub api_servers: u32,
    /// Why it is not attached, if it is not.
    pub detail: Option<String>,
    /// How often it attached.
    pub attachments: u64,
}

/// Plain data about the DP coordinator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CoordinatorSnapshot {
    pub wave: Wave,
    /// Whether the group is running, as reported by engines.
    pub running: bool,
    /// Load by rank.
    pub loads: BTreeMap<u16, Load>,
    /// Ranks subscribed.
    pub subscribed: u32,
    /// False while a restarted lockstep group is brought to the wave the frontends know. No control
    /// call and no request may be sent to its engines before (it takes one idle step).
    pub in_step: bool,
}
