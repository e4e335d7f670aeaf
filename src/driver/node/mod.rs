//! The node task: drives the lifecycle machine of all ranks of the deployment, on the leader. It asks the
//! nodes for processes and handshakes, the rank and coordinator tasks for sockets, and the update task for
//! the committed weights. Which node a rank runs on shows only in the handles.

mod adoption;
mod events;
mod serving;
mod starting;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::lifecycle::{Action, Event, Lifecycle, LifecycleConfig, Phase, RankLife};
use dp_sidecar_protocol::{EngineIndex, Incarnation, Time};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::handles::{
    CoordinatorHandle, Deployment, EdgeHandle, GiveUp, HandshakeHandle, NodeEvent, NodeId, NodeState,
    ProcessHandle, RankHandle,
};
use super::weight_update::{FenceRequest, UpdateHandle};
use super::{Clock, init};
use crate::config::{Config, Engines};

/// Limit for answers of our own tasks, and of other nodes.
const ANSWER: Duration = Duration::from_secs(10);
/// Limit for a restarted lockstep group to run the wave that brings it to the current number.
const IN_STEP: Duration = Duration::from_secs(120);

/// Everything the node knows about one rank, for status.
#[derive(Clone, Debug)]
pub struct NodeRank {
    /// State of the lifecycle machine.
    pub life: RankLife,
    /// `vllm serve` process, if ours.
    pub pid: Option<u32>,
    /// From the registration frame.
    pub vllm_version: Option<String>,
}

/// How the node task ended.
#[derive(Clone, Debug)]
pub enum NodeExit {
    /// Told to.
    Stopped,
    /// It cannot go on.
    Failed {
        reason: String,
        /// A time limit ran out.
        timeout: bool,
    },
}

/// The tasks the node task works with.
#[derive(Debug)]
pub struct Peers {
    /// Rank tasks of the whole deployment.
    pub ranks: BTreeMap<EngineIndex, RankHandle>,
    pub coordinator: CoordinatorHandle,
    /// Weight updates.
    pub updates: UpdateHandle,
    /// The nodes; together they have each rank once.
    pub nodes: BTreeMap<NodeId, NodePeers>,
}

/// What the node task asks of one node.
#[derive(Clone, Debug)]
pub struct NodePeers {
    /// The ranks that run there.
    pub ranks: Vec<EngineIndex>,
    /// What their engines take for their DP coordinator.
    pub edge: EdgeHandle,
    /// The handshake server that their engines say HELLO to.
    pub handshake: HandshakeHandle,
    /// Who starts them; none if somebody else does.
    pub processes: Option<ProcessHandle>,
}

impl Peers {
    /// What runs on a node.
    fn ranks_of(&self, node: NodeId) -> Vec<EngineIndex> {
        self.nodes.get(&node).map(|node| node.ranks.clone()).unwrap_or_default()
    }

    /// Where a rank runs.
    fn node_of(&self, rank: EngineIndex) -> Option<(NodeId, &NodePeers)> {
        self.nodes.iter().find(|(_, node)| node.ranks.contains(&rank)).map(|(&id, node)| (id, node))
    }
}

/// What comes in.
#[derive(Debug)]
pub struct Inputs {
    /// What the nodes report about their engines and themselves.
    pub nodes: mpsc::Receiver<(NodeId, NodeEvent)>,
    /// Engines that must not serve; they are stopped and started again at the committed weights.
    pub fences: mpsc::Receiver<FenceRequest>,
    /// All engines are to be stopped, and the task is to end.
    pub stop: CancellationToken,
}

/// What goes out.
#[derive(Debug)]
pub struct Outputs {
    /// Facts for the attachments.
    pub deployment: watch::Sender<Deployment>,
    /// For status.
    pub snapshot: watch::Sender<BTreeMap<EngineIndex, NodeRank>>,
}

/// Facts collected while an incarnation starts.
#[derive(Clone, Debug, Default)]
struct Facts {
    incarnation: Incarnation,
    registration: Option<(Bytes, Layout)>,
    vllm_version: Option<String>,
    ready: Option<(Option<String>, Option<u64>)>,
    handshake_at: Option<SocketAddr>,
    pid: Option<u32>,
}

/// What a piece of work in the background came to.
#[derive(Debug)]
enum Outcome {
    /// The machine is told.
    Event(Event),
    /// Sockets are bound; the engine's handshake address is known.
    Prepared { rank: EngineIndex, incarnation: Incarnation, address: SocketAddr },
    /// The process runs.
    Spawned { rank: EngineIndex, incarnation: Incarnation, pid: u32 },
    /// Nothing to tell.
    Done,
}

/// The node task.
#[derive(Debug)]
pub struct Node {
    config: Arc<Config>,
    peers: Peers,
    outputs: Outputs,
    machine: Lifecycle,
    facts: BTreeMap<EngineIndex, Facts>,
    /// Ports of the group's stores, per generation (lockstep).
    group_ports: Option<(Incarnation, Vec<u16>)>,
    work: JoinSet<Outcome>,
    clock: Clock,
    /// What the nodes report about engines that lived before this task did, for those who must know.
    reported: Vec<NodeState>,
    /// What happened after that.
    early: Vec<(NodeId, NodeEvent)>,
    /// Nodes that cannot be reached.
    away: BTreeSet<NodeId>,
    /// Nodes whose keeper died: until its successor is there nothing is stopped there.
    keeper_away: BTreeSet<NodeId>,
}

impl Node {
    /// A node task that begins to start all ranks when it is run, but for those that can go on as `states`, the
    /// reports of the nodes, tell. `early` is what happened after those reports.
    pub fn new(
        config: Arc<Config>,
        peers: Peers,
        outputs: Outputs,
        states: &BTreeMap<NodeId, NodeState>,
        early: Vec<(NodeId, NodeEvent)>,
    ) -> Self {
        let ranks: Vec<EngineIndex> = peers.ranks.keys().copied().collect();
        let reported = states.values().flat_map(|state| &state.ranks);
        let found = reported.map(|(&rank, state)| (rank, adoption::found(state))).collect();
        let machine = Lifecycle::resume(
            LifecycleConfig {
                ranks: ranks.clone(),
                kind: config.kind,
                spawn: matches!(config.engines, Engines::Spawn(_)),
                startup_timeout: config.startup_timeout,
                restart: init::restart_policy(&config),
            },
            &found,
            Time::ZERO,
        );
        let mut facts: BTreeMap<_, _> = ranks.into_iter().map(|r| (r, Facts::default())).collect();
        for (rank, state) in states.values().flat_map(|state| &state.ranks) {
            facts.insert(*rank, adoption::facts(state));
        }
        Self {
            facts,
            config,
            peers,
            outputs,
            machine,
            group_ports: None,
            work: JoinSet::new(),
            clock: Clock::start(),
            reported: states.values().cloned().collect(),
            early,
            away: BTreeSet::new(),
            keeper_away: BTreeSet::new(),
        }
    }

    /// Runs until told to stop, or until it cannot go on.
    pub async fn run(mut self, mut inputs: Inputs) -> NodeExit {
        self.introduce_adopted().await;
        for (node, event) in std::mem::take(&mut self.early) {
            self.node_event(node, event).await;
        }
        let mut stopping = false;
        let exit = loop {
            if let Some(exit) = self.perform().await {
                break exit;
            }
            self.publish();
            tokio::select! {
                biased;
                () = inputs.stop.cancelled(), if !stopping => {
                    stopping = true;
                    self.event(Event::Stop);
                }
                Some(FenceRequest { rank, incarnation, reason }) = inputs.fences.recv() => {
                    if self.facts_of(rank, incarnation).is_some() {
                        self.event(Event::Fence { rank, reason });
                    }
                }
                Some((node, event)) = inputs.nodes.recv() => self.node_event(node, event).await,
                Some(done) = self.work.join_next() => self.work_done(done),
                () = self.clock.reach(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                }
            }
        };
        self.publish();
        self.work.shutdown().await;
        exit
    }

    fn event(&mut self, event: Event) {
        debug!(?event, "lifecycle");
        self.machine.handle_event(self.clock.now(), event);
    }

    /// Performs all actions; an exit ends the task.
    async fn perform(&mut self) -> Option<NodeExit> {
        while let Some(action) = self.machine.poll_action() {
            debug!(?action, "lifecycle");
            match action {
                Action::Prepare { rank, incarnation } => self.prepare(rank, incarnation),
                Action::Spawn { rank, incarnation } => self.spawn(rank, incarnation),
                Action::StopProcess { rank, incarnation } => self.stop_process(rank, incarnation),
                Action::Down { rank, incarnation, reason } => self.down(rank, incarnation, reason).await,
                Action::GiveUp { rank, reason } => {
                    warn!(rank = rank.0, %reason, "requests for this rank are answered with errors");
                    self.tell_rank(rank, GiveUp { reason }).await;
                }
                Action::Restore { ranks } => self.restore(ranks).await,
                Action::Adopt { ranks } => self.bring_to_committed(ranks, true),
                Action::Admit { rank, incarnation } => self.admit(rank, incarnation).await,
                Action::Fail { reason, timeout } => {
                    return Some(NodeExit::Failed { reason, timeout });
                }
                Action::Stopped => return Some(NodeExit::Stopped),
            }
        }
        None
    }

    fn facts_of(&mut self, rank: EngineIndex, incarnation: Incarnation) -> Option<&mut Facts> {
        self.facts.get_mut(&rank).filter(|f| f.incarnation == incarnation)
    }

    fn publish(&self) {
        let ranks: BTreeMap<EngineIndex, NodeRank> = self
            .machine
            .snapshot()
            .into_iter()
            .map(|(rank, life)| {
                let facts = self.facts.get(&rank);
                let alive = !matches!(life.phase, Phase::Waiting | Phase::GivenUp | Phase::Stopped);
                let entry = NodeRank {
                    pid: facts.and_then(|f| f.pid).filter(|_| alive),
                    vllm_version: facts.and_then(|f| f.vllm_version.clone()),
                    life,
                };
                (rank, entry)
            })
            .collect();
        self.outputs.snapshot.send_replace(ranks);
    }
}
