//! What travels over the admin socket: one JSON object per line in both directions.
//!
//! A client sends one [`Request`]; the sidecar answers with one [`Response`], or, for an update,
//! with any number of [`Response::Progress`] and then one final answer.

use std::collections::BTreeMap;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::weight_update::{PauseMode, Phase, RankState};
use serde::{Deserialize, Serialize};

use crate::driver::handles::{CoordinatorSnapshot, FrontendSnapshot, GroupKind, Retain};
use crate::driver::weight_update::{AdapterChange, UpdateEvent, UpdateSource};
use crate::gpu::GpuReport;

/// Version of this protocol. The server refuses a request of another version.
pub const ADMIN_PROTOCOL: u32 = 1;

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`ADMIN_PROTOCOL`].
    pub version: u32,
    /// What it wants.
    pub command: Command,
}

impl Request {
    /// A request of the current protocol version.
    pub fn new(command: Command) -> Self {
        Self { version: ADMIN_PROTOCOL, command }
    }
}

/// What a client can ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Command {
    /// Everything there is to know, see [`Status`].
    Status,
    /// Pause all engines, until [`Command::Resume`].
    Pause {
        /// How.
        mode: PauseMode,
        /// With `wait`: abort what still runs after this many milliseconds.
        deadline_ms: Option<u64>,
    },
    /// Resume all engines.
    Resume,
    /// Versions of the sidecar, the engines and the weights.
    Version,
    /// Attach to one more frontend.
    FrontendAdd {
        /// Handshake address, `host:port`.
        address: String,
    },
    /// Detach from a frontend and forget it.
    FrontendRemove {
        /// Handshake address as it was given.
        address: String,
    },
    /// All wanted frontends.
    FrontendList,
    /// New weights for all engines.
    Update(UpdateRequest),
    /// Progress and report of the update that runs.
    UpdateFollow {
        /// Which; none: whichever it is.
        id: Option<String>,
    },
    /// End the running update without a commit.
    UpdateAbort,
    /// Records of the last updates.
    UpdateHistory {
        /// At most so many, newest last.
        limit: usize,
    },
    /// Hold new requests in front of the engines until [`Command::Resume`]; those that run go on.
    Drain,
    /// Stop the sidecar and everything it started.
    Stop,
}

/// A weight update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// Checkpoint directory, absolute; empty for an upload.
    pub path: String,
    /// LoRA adapters to add, replace or remove.
    #[serde(default)]
    pub adapters: Vec<AdapterChange>,
    /// Where it is read.
    #[serde(default)]
    pub source: UpdateSource,
    /// Where the version that is replaced is kept.
    #[serde(default)]
    pub retain: Retain,
    /// Version to stamp; without one the sidecar makes one from the directory's name and the id.
    pub version: Option<String>,
    /// How running requests are treated.
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this many milliseconds.
    pub pause_deadline_ms: Option<u64>,
    /// Refuse unless this version is loaded now.
    pub from_version: Option<String>,
    /// Name of the transaction, for logs and repeats; random if absent.
    pub id: Option<String>,
    /// Update although the current weights cannot be loaded again after a failure.
    #[serde(default)]
    pub allow_no_rollback: bool,
}

/// One step of a running update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateProgress {
    /// `staging`, `prepared`, `pausing`, `loading`, `verifying`, `committing`, `rolling_back`.
    pub phase: String,
    /// What happens, for people.
    pub message: String,
    /// How much of the phase is done, in units of `total` (bytes while staging, else engines).
    pub done: u64,
    /// Size of the phase; 0 if unknown.
    pub total: u64,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<UpdateEvent>,
}

/// How an update ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateStatus {
    /// All engines hold the new weights and serve.
    Committed,
    /// Nothing was touched: directory invalid, or a precondition does not hold.
    Refused,
    /// A load failed; all engines are back at the previous weights and serve.
    RolledBack,
    /// At least one engine could be brought to neither version and is fenced.
    Degraded,
}

/// Final word on an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// Name of the transaction.
    pub id: String,
    /// How it ended.
    pub status: UpdateStatus,
    /// Version that the admitted engines hold now.
    pub version: String,
    /// Version they held before.
    pub previous: String,
    /// Why it was not committed: who, which stage, what was expected and found.
    pub reason: Option<String>,
    /// Ranks that are fenced.
    pub fenced: Vec<EngineIndex>,
    /// Seconds from the request to this report.
    pub total_s: f64,
    /// Seconds during which the engines were paused.
    pub paused_s: f64,
    /// Bytes of the checkpoint.
    pub bytes: u64,
    /// What it took on each engine.
    #[serde(default)]
    pub engines: BTreeMap<EngineIndex, EngineTimes>,
    /// Milliseconds in each phase.
    #[serde(default)]
    pub phases: BTreeMap<Phase, u64>,
    /// What one should know although nothing failed: responses that mix versions, engines that were
    /// lost on the way.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// What an update did on one engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineTimes {
    /// Where it was at the end.
    pub state: RankState,
    /// Milliseconds from the pause call to its answer.
    pub pause_ms: Option<u64>,
    /// Milliseconds of the load of the new weights.
    pub load_ms: Option<u64>,
    /// Milliseconds of the load of the previous weights.
    pub rollback_ms: Option<u64>,
    /// What went wrong, first cause first.
    #[serde(default)]
    pub errors: Vec<String>,
}

/// What kind of refusal or failure an [`Response::Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense.
    Invalid,
    /// Another controller holds the engines; the message names it.
    Busy,
    /// The sidecar is in no state to do it (engines starting, stopping).
    Unavailable,
    /// It was tried and failed.
    Failed,
    /// It took too long.
    Timeout,
}

/// A refusal or failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// Which kind.
    pub kind: ErrorKind,
    /// Who, which stage, expected, actual.
    pub message: String,
}

impl AdminError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What the sidecar answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "body", rename_all = "snake_case")]
pub enum Response {
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Version`].
    Version(VersionReport),
    /// To [`Command::FrontendList`].
    Frontends(Vec<FrontendStatus>),
    /// A running [`Command::Update`], or one that is followed.
    Progress(UpdateProgress),
    /// Final answer to [`Command::Update`] and [`Command::UpdateFollow`].
    Update(UpdateReport),
    /// To [`Command::UpdateHistory`].
    Updates(Vec<UpdateReport>),
    /// It is done.
    Done,
    /// It is refused, or failed.
    Error(AdminError),
}

/// Everything there is to know about a running sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The sidecar process.
    pub sidecar: SidecarStatus,
    /// What it hosts.
    pub deployment: DeploymentStatus,
    /// Its engines, by rank.
    pub engines: Vec<EngineStatus>,
    /// Wanted frontends.
    pub frontends: Vec<FrontendStatus>,
    /// The DP coordinator.
    pub coordinator: CoordinatorSnapshot,
    /// Weights.
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
    /// The link is up.
    pub up: bool,
    /// Seconds since it is up, or down.
    pub since_s: u64,
    /// What is going on.
    pub state: String,
}

/// The sidecar process itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SidecarStatus {
    /// Its pid.
    pub pid: u32,
    /// Its version.
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// The rank.
    pub rank: EngineIndex,
    /// Pid of its `vllm serve` process, if the keeper started it.
    pub pid: Option<u32>,
    /// Its vLLM version, once registered.
    pub vllm_version: Option<String>,
    /// `stopped`, `starting`, `handshake`, `registered`, `restoring`, `admitted`, `fenced`, `failed`.
    pub state: String,
    /// Which life of the rank this is.
    pub incarnation: u64,
    /// Version of its weights, as stamped.
    pub weight_version: Option<String>,
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
    /// How often it was restarted.
    pub restarts: u64,
    /// Why it last failed.
    pub last_error: Option<String>,
}

/// One wanted frontend.
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
    /// Committed version.
    pub version: String,
    /// Directory it was loaded from, if known.
    pub dir: Option<String>,
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
    /// Of the sidecar.
    pub sidecar: String,
    /// vLLM version by rank.
    pub vllm: BTreeMap<u16, String>,
    /// Committed weights.
    pub weights: String,
}
