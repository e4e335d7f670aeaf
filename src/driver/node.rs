//! The node task: drives the lifecycle machine. It asks the keeper for processes, the rank,
//! coordinator and handshake tasks for sockets, and the update task for the committed weights.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::handshake::EngineReadyResponse;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::lifecycle::{Action, Event, Lifecycle, LifecycleConfig, Phase, RankLife};
use dp_sidecar_protocol::{EngineIndex, Incarnation, Time};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::handles::{
    CoordinatorCommand, CoordinatorHandle, Deployment, EngineFacts, Expectation, GroupKind, HandleError,
    HandshakeCommand, HandshakeEvent, HandshakeHandle, Listen, RankCommand, RankEvent, RankHandle, ask,
};
use super::init;
use super::weight_update::UpdateHandle;
use crate::config::{Config, Engines};
use crate::supervisor::client::KeeperClient;
use crate::supervisor::keeper::wire::{ExitStatus, KeeperEvent};

/// Limit for answers of our own tasks and of the keeper.
const LOCAL_ANSWER: Duration = Duration::from_secs(10);

/// Limit for a restarted lockstep group to run the wave that brings it to the current number.
const IN_STEP: Duration = Duration::from_secs(120);

/// What others ask of the node task.
#[derive(Debug)]
pub enum NodeCommand {
    /// This engine must not serve; it is stopped and started again at the committed weights.
    Fence {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation; a later one is not meant.
        incarnation: Incarnation,
        /// Why.
        reason: String,
    },
    /// Stop all engines and end.
    Stop,
}

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
        /// The whole story.
        reason: String,
        /// A time limit ran out.
        timeout: bool,
    },
}

/// The tasks the node task works with.
#[derive(Debug)]
pub struct Peers {
    /// Rank tasks of this node.
    pub ranks: BTreeMap<EngineIndex, RankHandle>,
    /// The DP coordinator.
    pub coordinator: CoordinatorHandle,
    /// The handshake server.
    pub handshake: HandshakeHandle,
    /// Weight updates.
    pub updates: UpdateHandle,
    /// The keeper, when processes are ours.
    pub keeper: Option<KeeperClient>,
}

/// What comes in.
#[derive(Debug)]
pub struct Inputs {
    /// From the rank tasks.
    pub ranks: mpsc::Receiver<RankEvent>,
    /// From the handshake task.
    pub handshake: mpsc::Receiver<HandshakeEvent>,
    /// From the keeper, engines' part.
    pub keeper: mpsc::Receiver<KeeperEvent>,
    /// From everybody else.
    pub commands: mpsc::Receiver<NodeCommand>,
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
    began: Instant,
    /// The keeper died; until its successor is there nothing is spawned or stopped.
    keeper_away: bool,
}

impl Node {
    /// A node task that begins to start all ranks when it is run.
    pub fn new(config: Arc<Config>, peers: Peers, outputs: Outputs) -> Self {
        let ranks: Vec<EngineIndex> = config.local_ranks().map(EngineIndex).collect();
        let machine = Lifecycle::new(
            LifecycleConfig {
                ranks: ranks.clone(),
                lockstep: config.kind == GroupKind::Lockstep,
                spawn: matches!(config.engines, Engines::Spawn(_)),
                startup_timeout: config.startup_timeout,
                restart: init::restart_policy(&config),
            },
            Time::ZERO,
        );
        Self {
            facts: ranks.into_iter().map(|r| (r, Facts::default())).collect(),
            config,
            peers,
            outputs,
            machine,
            group_ports: None,
            work: JoinSet::new(),
            began: Instant::now(),
            keeper_away: false,
        }
    }

    fn now(&self) -> Time {
        Time::from_start(self.began.elapsed())
    }

    /// Runs until told to stop, or until it cannot go on.
    pub async fn run(mut self, mut inputs: Inputs) -> NodeExit {
        let exit = loop {
            if let Some(exit) = self.perform().await {
                break exit;
            }
            self.publish();
            let due = self.machine.poll_timeout().map(|t| self.began + t.since_start());
            tokio::select! {
                biased;
                command = inputs.commands.recv() => match command {
                    Some(NodeCommand::Fence { rank, incarnation, reason }) => {
                        if self.facts_of(rank, incarnation).is_some() {
                            self.event(Event::Fence { rank, reason });
                        }
                    }
                    Some(NodeCommand::Stop) | None => self.event(Event::Stop),
                },
                Some(event) = inputs.keeper.recv() => self.keeper_event(event),
                Some(event) = inputs.handshake.recv() => self.handshake_event(event),
                Some(event) = inputs.ranks.recv() => self.rank_event(event).await,
                Some(done) = self.work.join_next() => self.work_done(done),
                () = super::sleep_until(due) => {
                    let now = self.now();
                    self.machine.handle_timeout(now);
                }
            }
        };
        self.publish();
        self.work.shutdown().await;
        exit
    }

    fn event(&mut self, event: Event) {
        let now = self.now();
        debug!(?event, "lifecycle");
        self.machine.handle_event(now, event);
    }

    fn work_done(&mut self, done: Result<Outcome, tokio::task::JoinError>) {
        match done {
            Ok(Outcome::Event(event)) => self.event(event),
            Ok(Outcome::Prepared { rank, incarnation, address }) => {
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.handshake_at = Some(address);
                    self.event(Event::Prepared { rank, incarnation });
                }
            }
            Ok(Outcome::Spawned { rank, incarnation, pid }) => {
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.pid = Some(pid);
                }
                // A stop that was asked for meanwhile may have reached the keeper before the process
                // was there.
                let life = self.machine.snapshot().remove(&rank);
                if life.is_some_and(|l| l.incarnation == incarnation && l.phase == Phase::Stopping) {
                    self.stop_process(rank, incarnation);
                }
            }
            Ok(Outcome::Done) => {}
            Err(error) => error!(%error, "a task of the node task failed"),
        }
    }

    fn facts_of(&mut self, rank: EngineIndex, incarnation: Incarnation) -> Option<&mut Facts> {
        self.facts.get_mut(&rank).filter(|f| f.incarnation == incarnation)
    }

    fn keeper_event(&mut self, event: KeeperEvent) {
        match event {
            KeeperEvent::Spawned { .. } => {}
            KeeperEvent::Exited(report) if report.status == ExitStatus::Unknown => {
                // Its keeper is dead; the successor's event starts everything over.
                self.keeper_away = true;
            }
            KeeperEvent::Exited(report) => {
                let Some(rank) = init::rank_of_child(&report.name) else {
                    return;
                };
                if !report.left.is_empty() {
                    error!(rank = rank.0, pids = ?report.left, "processes of the engine could not be ended");
                }
                let incarnation = Incarnation(report.incarnation);
                let reason = init::describe_exit(&report);
                if report.requested {
                    info!(rank = rank.0, incarnation = incarnation.0, status = %report.status, "engine stopped");
                } else {
                    warn!(rank = rank.0, incarnation = incarnation.0, status = %report.status, "engine exited");
                }
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.pid = None;
                }
                self.event(Event::Exited { rank, incarnation, reason });
            }
            KeeperEvent::Replaced { pid } => {
                warn!(pid, "the keeper was killed and replaced; its engines were stopped");
                self.keeper_away = false;
                for facts in self.facts.values_mut() {
                    facts.pid = None;
                }
                self.event(Event::KeeperLost);
            }
            KeeperEvent::Failed { error } => {
                error!(%error, "the keeper is gone and cannot be replaced");
                self.keeper_away = false;
                self.event(Event::KeeperLost);
            }
        }
    }

    fn handshake_event(&mut self, event: HandshakeEvent) {
        match event {
            HandshakeEvent::Connected { rank, incarnation } => {
                info!(rank = rank.0, incarnation = incarnation.0, "HELLO answered with INIT");
                self.event(Event::Connected { rank, incarnation });
            }
            HandshakeEvent::Ready { rank, incarnation, parallel_config_hash, num_gpu_blocks } => {
                info!(rank = rank.0, incarnation = incarnation.0, "engine is READY");
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.ready = Some((parallel_config_hash, num_gpu_blocks));
                    self.event(Event::HandshakeReady { rank, incarnation });
                }
            }
            HandshakeEvent::Refused { rank: None, error } => warn!(%error, "handshake refused"),
            HandshakeEvent::Refused { rank: Some(rank), error } => {
                error!(rank = rank.0, %error, "handshake refused");
                self.event(Event::Fence { rank, reason: error });
            }
        }
    }

    async fn rank_event(&mut self, event: RankEvent) {
        match event {
            RankEvent::Lost { rank, incarnation, reason } => {
                warn!(rank = rank.0, incarnation = incarnation.0, %reason, "engine lost");
                self.event(Event::Lost { rank, incarnation, reason });
            }
            RankEvent::Registered { rank, incarnation, frame } => {
                self.registered(rank, incarnation, frame).await;
            }
        }
    }

    async fn registered(&mut self, rank: EngineIndex, incarnation: Incarnation, frame: Bytes) {
        let Some(facts) = self.facts.get_mut(&rank).filter(|f| f.incarnation == incarnation) else {
            return;
        };
        let layout = match init::layout_of(&frame, self.config.allow_untested_vllm) {
            Ok(layout) => layout,
            Err(reason) => {
                error!(rank = rank.0, %reason, "engine refused");
                self.event(Event::Fence { rank, reason });
                return;
            }
        };
        let response = EngineReadyResponse::decode(&frame);
        let version = response.as_ref().ok().and_then(|r| r.vllm_version.clone());
        info!(
            rank = rank.0,
            incarnation = incarnation.0,
            vllm = version.as_deref().unwrap_or("unknown"),
            "engine registered"
        );
        facts.vllm_version = version;
        facts.registration = Some((frame, layout));
        let told = CoordinatorCommand::EngineVersion { rank, incarnation, layout };
        if self.peers.coordinator.commands.send(told).await.is_err() {
            error!("the coordinator task has ended");
        }
        if let Ok(response) = &response
            && let Err(reason) = init::check_kind(self.config.kind, self.config.size, rank, response)
        {
            error!(rank = rank.0, %reason, "engine refused");
            self.event(Event::Fence { rank, reason });
            return;
        }
        self.event(Event::Registered { rank, incarnation });
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
                Action::Restore { ranks } => self.restore(ranks).await,
                Action::Admit { rank, incarnation } => self.admit(rank, incarnation).await,
                Action::Fail { reason, timeout } => {
                    return Some(NodeExit::Failed { reason, timeout });
                }
                Action::Stopped => return Some(NodeExit::Stopped),
            }
        }
        None
    }

    fn prepare(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        self.facts.insert(rank, Facts { incarnation, ..Facts::default() });
        let failed = move |reason: String| Outcome::Event(Event::StartFailed { rank, incarnation, reason });
        let ports = match self.ports(incarnation) {
            Ok(ports) => ports,
            Err(reason) => {
                self.work.spawn(async move { failed(reason) });
                return;
            }
        };
        let Some(handle) = self.peers.ranks.get(&rank).cloned() else {
            return;
        };
        let coordinator = self.peers.coordinator.commands.clone();
        let handshake = self.peers.handshake.commands.clone();
        let config = self.config.clone();
        self.work.spawn(async move {
            let prepared: Result<SocketAddr, HandleError> = async {
                let slots = handle
                    .ask("sockets", LOCAL_ANSWER, |reply| RankCommand::Prepare { incarnation, reply })
                    .await?;
                let what = format!("coordinator sockets of rank {rank}");
                let coordinator = ask(&coordinator, "coordinator", what, LOCAL_ANSWER, |reply| {
                    CoordinatorCommand::Prepare { rank, incarnation, reply }
                })
                .await?;
                let listen = match config.engines {
                    Engines::Spawn(_) => Listen::Own,
                    Engines::Attach => Listen::Shared,
                };
                let init = init::encode(&config, slots, coordinator, &ports);
                let expectation = Expectation { rank, incarnation, listen, init };
                let what = format!("handshake listener of rank {rank}");
                ask(&handshake, "handshake", what, LOCAL_ANSWER, |reply| HandshakeCommand::Expect {
                    expectation,
                    reply,
                })
                .await
            }
            .await;
            match prepared {
                Ok(address) => Outcome::Prepared { rank, incarnation, address },
                Err(error) => failed(error.to_string()),
            }
        });
    }

    /// Ports of the lockstep group's stores: the same for all ranks of one generation.
    fn ports(&mut self, generation: Incarnation) -> Result<Vec<u16>, String> {
        if self.config.kind == GroupKind::Independent {
            return Ok(Vec::new());
        }
        match &self.group_ports {
            Some((of, ports)) if *of == generation => Ok(ports.clone()),
            _ => {
                let ports = init::free_ports()?;
                self.group_ports = Some((generation, ports.clone()));
                Ok(ports)
            }
        }
    }

    fn spawn(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        let address = self.facts.get(&rank).and_then(|f| f.handshake_at);
        let keeper = self.peers.keeper.clone();
        let config = self.config.clone();
        self.work.spawn(async move {
            let spawned = async {
                let address = address.ok_or("its handshake address is not known")?;
                let keeper = keeper.ok_or("there is no keeper")?;
                let spec = config
                    .engine_spawn(rank.0, incarnation.0, address)
                    .ok_or("no MODEL was given")?;
                info!(rank = rank.0, incarnation = incarnation.0, command = %spec.argv.join(" "), "starting engine");
                keeper.spawn(spec).await.map_err(|error| error.to_string())
            };
            match spawned.await {
                Ok(pid) => Outcome::Spawned { rank, incarnation, pid },
                Err(reason) => Outcome::Event(Event::StartFailed { rank, incarnation, reason }),
            }
        });
    }

    fn stop_process(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if self.keeper_away {
            return;
        }
        let Some(keeper) = self.peers.keeper.clone() else {
            return;
        };
        // Nothing is left to drain: the app has waited for requests, or the engine is lost.
        let grace = self.config.kill_grace;
        self.work.spawn(async move {
            let name = init::child_name(rank);
            if let Err(error) = keeper.stop(&name, grace).await {
                // It may have exited by itself a moment ago: then its exit is on the way.
                debug!(rank = rank.0, incarnation = incarnation.0, %error, "stop of the engine");
            }
            Outcome::Done
        });
    }

    async fn down(&mut self, rank: EngineIndex, incarnation: Incarnation, reason: String) {
        let forget = HandshakeCommand::Forget { rank, incarnation };
        let lost = self.peers.handshake.commands.send(forget).await.is_err();
        let down = CoordinatorCommand::EngineDown { rank, incarnation };
        let lost = self.peers.coordinator.commands.send(down).await.is_err() || lost;
        if lost {
            debug!("a task has ended before the engine");
        }
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(RankCommand::EngineDown { incarnation, reason }).await
        {
            debug!(rank = rank.0, %error, "engine down");
        }
    }

    async fn restore(&mut self, ranks: Vec<(EngineIndex, Incarnation)>) {
        for &(rank, incarnation) in &ranks {
            let Some(facts) = self.facts.get(&rank) else {
                continue;
            };
            let (Some((registration, layout)), Some((hash, blocks))) = (&facts.registration, &facts.ready)
            else {
                continue;
            };
            let engine = EngineFacts {
                registration: registration.clone(),
                parallel_config_hash: hash.clone(),
                num_gpu_blocks: *blocks,
                layout: *layout,
            };
            let ready = RankCommand::EngineReady { incarnation, facts: Box::new(engine.clone()) };
            self.outputs.deployment.send_modify(|d| {
                d.engines.insert(rank, engine);
            });
            if let Some(handle) = self.peers.ranks.get(&rank)
                && let Err(error) = handle.tell(ready).await
            {
                debug!(rank = rank.0, %error, "engine ready");
            }
        }
        let updates = self.peers.updates.clone();
        let lockstep = self.config.kind == GroupKind::Lockstep;
        let mut coordinator = self.peers.coordinator.snapshot.clone();
        self.work.spawn(async move {
            if lockstep {
                // Engines of a restarted group count waves from zero, the frontends do not. Until the
                // DP coordinator has brought them together a call could meet a group that runs on one
                // rank only.
                let in_step = coordinator.wait_for(|snapshot| snapshot.in_step);
                if tokio::time::timeout(IN_STEP, in_step).await.is_err() {
                    let reason = format!("the group did not reach the current wave within {IN_STEP:?}");
                    return Outcome::Event(Event::RestoreFailed { ranks, reason });
                }
            }
            let event = match updates.restore(ranks.clone()).await {
                Ok(()) => Event::Restored { ranks },
                Err(error) => Event::RestoreFailed { ranks, reason: error.to_string() },
            };
            Outcome::Event(event)
        });
    }

    async fn admit(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(RankCommand::Admit { incarnation }).await
        {
            debug!(rank = rank.0, %error, "admit");
        }
        let admitted = CoordinatorCommand::Admitted { rank };
        if self.peers.coordinator.commands.send(admitted).await.is_err() {
            debug!("the coordinator task has ended");
        }
        info!(rank = rank.0, incarnation = incarnation.0, "engine admitted");
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
