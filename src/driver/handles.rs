//! What the tasks of the sidecar say to each other: commands, events and the handles that carry
//! them. All queues are bounded. A handle is cheap to clone.
//!
//! [`RankHandle`], [`EdgeHandle`], [`HandshakeHandle`], [`ProcessHandle`] and [`StageHandle`] are the borders that
//! a link carries: for ranks of other nodes (and, the first two, for the relay process of this node)
//! `crate::link` implements the same commands.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::coordinator::Adopted;
use dp_sidecar_protocol::machine::weight_update::Checkpoint;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot, UpdateId, Wave, WeightVersion};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

/// How the engines of the deployment depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupKind {
    /// Dense models (vLLM 0.14.1 and later): each rank runs, pauses, dies and restarts alone.
    Independent,
    /// MoE models: the ranks step in lockstep, pause by consensus, and live and die together.
    Lockstep,
}

/// A task did not do what it was asked to.
#[derive(Clone, Debug, Error)]
pub enum HandleError {
    /// The task has ended; the sidecar is stopping or failed.
    #[error("the {task} task has ended")]
    Gone {
        /// Which task.
        task: &'static str,
    },
    /// The task answered with a failure.
    #[error("{0}")]
    Failed(Arc<str>),
    /// No answer in time.
    #[error("{what} took longer than {limit:?}")]
    Deadline {
        /// What was waited for, naming the peer.
        what: String,
        /// How long.
        limit: Duration,
    },
}

impl HandleError {
    /// A failure with a text.
    pub fn failed(text: impl Into<String>) -> Self {
        Self::Failed(Arc::from(text.into()))
    }
}

/// Answer to a command.
pub type Reply<T> = oneshot::Sender<Result<T, HandleError>>;

/// Outcome of a utility call: the decoded result, or the engine's failure message.
pub type CallResult = Result<rmpv::Value, HandleError>;

// === rank task ===

/// Address pairs of one engine incarnation: position = slot, see [`Slot`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SlotAddresses {
    /// `ipc://` address of the input ROUTER of each slot.
    pub inputs: Vec<String>,
    /// `ipc://` address of the output PULL of each slot.
    pub outputs: Vec<String>,
}

/// What a rank needs to open the data path to one API server of a frontend.
#[derive(Debug)]
pub struct OpenRoute {
    /// The attachment that asks.
    pub frontend: FrontendId,
    /// Position of the API server within its frontend (its own client index there).
    pub api_server: u32,
    /// Where to connect the DEALER.
    pub input_address: String,
    /// Where to connect the PUSH.
    pub output_address: String,
    /// First message on the DEALER: the engine's ready response as this frontend must see it.
    pub registration: Bytes,
    /// Give up connecting after this long.
    pub connect_timeout: Duration,
    /// Told once when the route is lost after it was opened (peer gone, peer does not read).
    pub lost: mpsc::Sender<RouteLost>,
}

/// A route ended without being closed.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RouteLost {
    /// Whose.
    pub frontend: FrontendId,
    /// On which rank.
    pub rank: EngineIndex,
    /// Which API server.
    pub api_server: u32,
    /// Why, for the log.
    pub reason: String,
}

/// Commands of a rank task.
#[derive(Debug)]
pub enum RankCommand {
    /// Bind fresh sockets for a new incarnation; those of the old one are dropped, and what was in
    /// flight there is answered.
    Prepare {
        /// The new incarnation. The one whose sockets are open already: they stay as they are.
        incarnation: Incarnation,
        /// Where it must connect.
        reply: Reply<SlotAddresses>,
    },
    /// The engine's handshake is complete: control calls may be sent.
    EngineReady {
        /// Which incarnation.
        incarnation: Incarnation,
        /// Field positions of its vLLM version, and what frontends are told about it: a link's serving side
        /// keeps it for a restarted sidecar.
        facts: Box<EngineFacts>,
    },
    /// Let the frontends' traffic through (what was held is sent).
    Admit {
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// The engine is gone: answer what is in flight, hold what comes.
    EngineDown {
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why, for logs and failure messages.
        reason: String,
    },
    /// Open or close the gate for new requests of frontends. Closed: ADDs are held up to the bound.
    /// Answered when it is in force.
    Admission {
        /// Open?
        open: bool,
        /// Done.
        reply: Reply<()>,
    },
    /// Call a method of the engine core on the control slot.
    Call {
        /// vLLM's method name.
        method: String,
        /// Positional arguments.
        args: Vec<rmpv::Value>,
        /// Answer with a deadline error after this long.
        timeout: Duration,
        /// The result.
        reply: Reply<rmpv::Value>,
    },
    /// Open a route to a frontend's API server.
    OpenRoute {
        /// What to open.
        route: OpenRoute,
        /// The slot that was taken.
        reply: Reply<Slot>,
    },
    /// Report the loss of a route that is open already to somebody else from now on: a restarted sidecar has
    /// found it. Fails if there is no such route (any more).
    AdoptRoute {
        /// Whose.
        frontend: FrontendId,
        /// Which of its API servers.
        api_server: u32,
        /// Told once when the route is lost.
        lost: mpsc::Sender<RouteLost>,
        /// The slot it has.
        reply: Reply<Slot>,
    },
    /// Close all routes of a frontend; its requests in flight are aborted on the engine.
    CloseRoutes {
        /// Whose.
        frontend: FrontendId,
        /// Done (requests aborted; slots are freed later, when the engine has confirmed).
        reply: Reply<()>,
    },
    /// What to do with a held control call, see [`HeldCall`].
    Release {
        /// Ticket of the held call.
        ticket: u64,
        /// What to do.
        verdict: Verdict,
        /// Told when the engine has answered the forwarded call (its result also went to the
        /// frontend); at once for the other verdicts.
        reply: Reply<rmpv::Value>,
    },
    /// Stop: answer what is in flight, close everything, end.
    Shutdown {
        /// Done.
        reply: Reply<()>,
    },
}

/// A control call of a frontend (pause, resume, sleep, weight methods ...), held at one rank until
/// the control task has decided.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct HeldCall {
    /// At which rank.
    pub rank: EngineIndex,
    /// Names this call at that rank.
    pub ticket: u64,
    /// Who calls.
    pub frontend: FrontendId,
    /// Which of its API servers.
    pub api_server: u32,
    /// vLLM's method name.
    pub method: String,
    /// Positional arguments.
    pub args: Vec<rmpv::Value>,
}

/// Decision on a [`HeldCall`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum Verdict {
    /// Send it to the engine; the answer goes to the frontend.
    Forward,
    /// Answer it with this value, without asking the engine.
    Answer(rmpv::Value),
    /// Answer it with this failure message.
    Refuse(String),
}

/// What a rank task reports.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum RankEvent {
    /// The first registration frame of an incarnation came in on the control slot.
    Registered {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// The frame as it came: empty up to vLLM 0.19.1, else a msgpack map.
        frame: Bytes,
    },
    /// The engine is dead: it said ENGINE_CORE_DEAD, or its connection closed.
    Lost {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// What was seen.
        reason: String,
    },
}

/// Plain data about a rank for status and metrics.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct RankSnapshot {
    /// The rank.
    pub rank: EngineIndex,
    /// Current incarnation.
    pub incarnation: Incarnation,
    /// Frontends' traffic is let through.
    pub admitted: bool,
    /// The gate for new requests is open.
    pub admission_open: bool,
    /// Requests in flight on the engine, by frontend.
    pub in_flight: BTreeMap<u64, u64>,
    /// Requests held in front of the engine.
    pub held: u64,
    /// Slots: occupied, being drained, all.
    pub slots: (u32, u32, u32),
    /// Messages of frontends refused since start.
    pub refused: u64,
    /// Weight version stamped on the last step output (vLLM 0.32.0 and later).
    pub weight_version: Option<String>,
}

/// Handle of a rank task.
#[derive(Clone, Debug)]
pub struct RankHandle {
    /// The rank.
    pub rank: EngineIndex,
    /// Commands.
    pub commands: mpsc::Sender<RankCommand>,
    /// Latest state.
    pub snapshot: watch::Receiver<RankSnapshot>,
}

impl RankHandle {
    /// Sends a command and waits for its answer, at most `limit`.
    pub async fn ask<T>(
        &self,
        what: &str,
        limit: Duration,
        command: impl FnOnce(Reply<T>) -> RankCommand,
    ) -> Result<T, HandleError> {
        ask(&self.commands, "rank", format!("{what} of rank {}", self.rank), limit, command).await
    }

    /// Sends a command that has no answer.
    pub async fn tell(&self, command: RankCommand) -> Result<(), HandleError> {
        self.commands.send(command).await.map_err(|_| HandleError::Gone { task: "rank" })
    }

    /// Calls a method of the engine core on the control slot.
    pub async fn call(&self, method: &str, args: Vec<rmpv::Value>, timeout: Duration) -> CallResult {
        let method = method.to_owned();
        let what = method.clone();
        self.ask(&what, timeout + Duration::from_secs(1), |reply| RankCommand::Call {
            method,
            args,
            timeout,
            reply,
        })
        .await
    }
}

/// Sends a command with a reply channel and waits for the answer under a deadline.
pub async fn ask<C, T>(
    commands: &mpsc::Sender<C>,
    task: &'static str,
    what: String,
    limit: Duration,
    command: impl FnOnce(Reply<T>) -> C,
) -> Result<T, HandleError> {
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        commands.send(command(reply)).await.map_err(|_| HandleError::Gone { task })?;
        answer.await.map_err(|_| HandleError::Gone { task })?
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(HandleError::Deadline { what, limit }),
    }
}

// === coordinator task ===

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
    /// Bind fresh sockets for a rank's new incarnation.
    Prepare {
        /// Which rank.
        rank: EngineIndex,
        /// Its new incarnation.
        incarnation: Incarnation,
        /// `(coordinator_input, coordinator_output)` addresses for INIT.
        reply: Reply<(String, String)>,
    },
    /// The rank registered; from here its version is known.
    EngineVersion {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
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
    Admitted {
        /// Which rank.
        rank: EngineIndex,
    },
    /// The rank is down or not admitted: report a load that steers new requests elsewhere; a lockstep
    /// group's wave is over.
    EngineDown {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// A frontend's DP coordinator wants to hear of the engines.
    AddFrontend {
        /// Which attachment.
        frontend: FrontendId,
        /// Where its messages go. A full queue drops stats, never waves.
        sink: mpsc::Sender<ForFrontendCoordinator>,
    },
    /// A frontend is gone.
    RemoveFrontend {
        /// Which attachment.
        frontend: FrontendId,
    },
    /// A frontend's DP coordinator broadcast START_DP_WAVE. Sent once per broadcast, whichever of the
    /// ranks' subscriptions it is taken from (more often is harmless).
    StartWave {
        /// Which attachment.
        frontend: FrontendId,
        /// The wave it names.
        wave: Wave,
        /// The engine it excludes, if it names one.
        exclude: Option<EngineIndex>,
    },
    /// A request was sent to a lockstep engine; also after the group was resumed. Sent for every
    /// request: whether the group has to be woken is decided here.
    Wake {
        /// The engine.
        rank: EngineIndex,
    },
    /// End.
    Shutdown {
        /// Done.
        reply: Reply<()>,
    },
}

/// Load of one rank as it last reported it.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Load {
    /// `num_waiting_reqs`.
    pub waiting: u64,
    /// `num_running_reqs`.
    pub running: u64,
    /// `kv_cache_usage`, 0 to 1.
    pub kv_cache_usage: f64,
}

/// Plain data about the DP coordinator.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CoordinatorSnapshot {
    /// Current wave.
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

/// Handle of the coordinator task.
#[derive(Clone, Debug)]
pub struct CoordinatorHandle {
    /// Commands.
    pub commands: mpsc::Sender<CoordinatorCommand>,
    /// Latest state.
    pub snapshot: watch::Receiver<CoordinatorSnapshot>,
}

// === handshake task ===

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

// === attachments ===

/// What a frontend is told about an engine when it attaches.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct EngineFacts {
    /// The registration frame of the engine, as it came.
    pub registration: Bytes,
    /// From READY.
    pub parallel_config_hash: Option<String>,
    /// From READY (0.19.1 and older).
    pub num_gpu_blocks: Option<u64>,
    /// Positions of its version.
    pub layout: Layout,
}

impl EngineFacts {
    /// Of an engine about which nothing but its version is known.
    pub const fn of(layout: Layout) -> Self {
        Self { registration: Bytes::new(), parallel_config_hash: None, num_gpu_blocks: None, layout }
    }
}

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

/// State of one wanted frontend, for `sidecar frontend list` and status.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
        /// Done.
        reply: Reply<()>,
    },
    /// The routes that a rank had when its node was connected. What an earlier sidecar opened, and nobody adopts, is
    /// closed.
    Routes {
        /// Which rank.
        rank: EngineIndex,
        /// Attachment and API server.
        routes: Vec<(FrontendId, u32)>,
    },
    /// End, and leave all frontends attached: a successor goes on with them.
    Leave {
        /// Done.
        reply: Reply<()>,
    },
    /// Detach from all and end.
    Shutdown {
        /// Done.
        reply: Reply<()>,
    },
}

/// Handle of the attachments manager.
#[derive(Clone, Debug)]
pub struct AttachmentHandle {
    /// Commands.
    pub commands: mpsc::Sender<AttachmentCommand>,
    /// All wanted frontends.
    pub snapshot: watch::Receiver<Vec<FrontendSnapshot>>,
}

// === engine-facing sockets of the DP coordinator ===

/// Commands of the edge task: it owns, per engine incarnation, the XPUB and PULL that the engine takes for its
/// DP coordinator, on the engine's own node. The coordinator machine, on the leader, decides what goes through.
#[derive(Debug)]
pub enum EdgeCommand {
    /// Bind fresh sockets for a rank's new incarnation; those of the life before are dropped.
    Prepare {
        /// Which rank.
        rank: EngineIndex,
        /// Its new incarnation. The same one again gives the same sockets.
        incarnation: Incarnation,
        /// `(coordinator_input, coordinator_output)` addresses for INIT.
        reply: Reply<(String, String)>,
    },
    /// Publish a message to the engines of these ranks.
    Publish {
        /// To whom.
        ranks: Vec<EngineIndex>,
        /// READY, or START_DP_WAVE.
        frames: Vec<Bytes>,
    },
    /// The wave as the coordinator machine has it. Kept for a successor, which starts from it.
    Note {
        /// Current wave.
        wave: Wave,
        /// Is it running?
        running: bool,
    },
    /// Drop the sockets of an incarnation.
    Close {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
}

/// What the edge task reports.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum EdgeEvent {
    /// The engine receives from now on what is published.
    Subscribed {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// The engine reports load or a wave edge.
    Report {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// An encoded single-frame `EngineCoreOutputs`.
        frame: Bytes,
    },
}

/// Handle of the edge task of a node.
#[derive(Clone, Debug)]
pub struct EdgeHandle {
    /// Commands.
    pub commands: mpsc::Sender<EdgeCommand>,
}

// === processes ===

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
    Connected(Box<crate::link::wire::NodeState>),
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

// === staging ===

/// Where a node takes the bytes of a new checkpoint from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageSource {
    /// A directory that this node can read.
    Directory(String),
    /// The node before it in the chain, which connects to this node's data address.
    Upstream,
    /// What a trainer uploads to the leader.
    Upload(String),
    /// What this node holds as current: it is passed on to a node that lacks it.
    Current,
}

/// Where the version that is replaced is kept, for the way back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Retain {
    /// In the node's other shared memory segment.
    #[default]
    Memory,
    /// In the directory it came from (the start-up checkpoint, or `--path` of an earlier update); only one
    /// segment is used.
    Disk,
    /// Nowhere: an engine that fails gets the new version again, or is fenced.
    None,
}

/// One node's part in staging a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StageSpec {
    /// Names the staged bytes; the update's id.
    pub id: UpdateId,
    /// Label of the weights.
    pub version: WeightVersion,
    /// Where from.
    pub source: StageSource,
    /// Data address of the next node in the chain, which has begun before.
    pub downstream: Option<std::net::SocketAddr>,
    /// What becomes of the version before.
    pub retain: Retain,
    /// Directory of the start-up checkpoint on this node: the manifest must fit it. None: not checked here.
    pub model_path: Option<String>,
}

/// What can be asked of a node's staging area.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageRequest {
    /// What is there.
    State,
    /// Can this node read that directory, and is it the same one? Answered with [`StageState::probed`].
    Probe {
        /// Absolute directory.
        path: String,
    },
    /// Begin to fill the spare segment. Answered when the data address is open (`Upstream`) or the source was
    /// found good; the rest comes as events. The same id again with the bytes already there is done at once.
    Begin(StageSpec),
    /// The staged bytes are the committed version: they become the current segment.
    Commit {
        /// Of the [`StageSpec`].
        id: UpdateId,
    },
    /// Forget the staged bytes (they stay in the spare segment, for a later attempt to reuse).
    Discard {
        /// Of the [`StageSpec`].
        id: UpdateId,
    },
}

/// A version of the weights in a segment.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StagedVersion {
    /// The update that brought it.
    pub id: UpdateId,
    /// Its label.
    pub version: WeightVersion,
    /// What engines of this node are told to load.
    pub checkpoint: Checkpoint,
}

/// State of a node's staging area.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StageState {
    /// Where the node before it in the chain connects; set while a [`StageSource::Upstream`] is awaited.
    pub data_address: Option<std::net::SocketAddr>,
    /// Answer to a probe: digest over names, sizes and headers of the directory's files.
    pub probed: Option<String>,
    /// The committed version, if a segment holds it.
    pub current: Option<StagedVersion>,
    /// The version before it, if it is retained.
    pub previous: Option<StagedVersion>,
    /// Complete and verified, but not committed.
    pub staged: Option<StagedVersion>,
    /// What is being staged now, and how far it is.
    #[serde(default)]
    pub running: Option<(UpdateId, StageProgress)>,
    /// Bytes of shared memory in use.
    pub memory: u64,
}

/// How far staging is on one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StageProgress {
    /// Verified bytes.
    pub done: u64,
    /// Bytes of the checkpoint.
    pub total: u64,
    /// Verified chunks, and all.
    pub chunks: (u64, u64),
    /// Bytes that came over the network (payload).
    pub received: u64,
    /// Bytes taken from the current segment.
    pub reused: u64,
    /// Milliseconds since it began.
    pub ms: u64,
}

/// What a node's staging area reports.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum StageEvent {
    /// It goes on; at most a few times a second.
    Progress {
        /// Of the [`StageSpec`].
        id: UpdateId,
        /// How far.
        progress: StageProgress,
    },
    /// All chunks are there and verified, the manifest fits.
    Staged {
        /// Of the [`StageSpec`].
        id: UpdateId,
        /// What to load.
        checkpoint: Checkpoint,
        /// At the end.
        progress: StageProgress,
    },
    /// It failed; no engine was touched.
    Failed {
        /// Of the [`StageSpec`].
        id: UpdateId,
        /// Who, stage, expected, actual.
        error: String,
    },
}

/// Commands of the staging task.
#[derive(Debug)]
pub struct StageCommand {
    /// What.
    pub request: StageRequest,
    /// State after it.
    pub reply: Reply<StageState>,
}

/// Handle of a node's staging task.
#[derive(Clone, Debug)]
pub struct StageHandle {
    /// Commands.
    pub commands: mpsc::Sender<StageCommand>,
}
