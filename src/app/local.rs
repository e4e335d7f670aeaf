//! The tasks of this node that do what a leader says, its own or another node's: keeper, data path, handshake,
//! processes, staging.

use std::net::SocketAddr;
use std::sync::Arc;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::handshake;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use crate::config::{Config, Engines};
use crate::driver::handles::{EdgeHandle, HandshakeHandle, NodeEvent, NodeState, ProcessHandle, RankHandle};
use crate::driver::handshake::{HandshakeBindError, HandshakeConfig};
use crate::driver::{handshake as handshake_driver, processes};
use crate::exit_code::{self, RunEnd};
use crate::gpu::{self, GpuMonitor};
use crate::relay::Purpose;
use crate::relay::host::{self, HostError, HostOptions};
use crate::state_dir::StateDir;
use crate::supervisor::client::KeeperClient;
use crate::supervisor::command::FRONTEND;
use crate::supervisor::keeper::wire::KeeperEvent;
use crate::tasks::{Task, named};
use crate::transport::GuardLimits;

/// Messages between tasks waiting at the most. All readers only move them on.
pub(super) const QUEUE: usize = 256;

/// The sidecar itself cannot go on.
pub(super) fn internal(what: &str, error: &dyn std::fmt::Display) -> RunEnd {
    RunEnd::new(exit_code::INTERNAL, format!("{what}: {error}"))
}

/// The keeper of this node, and what it reports.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) client: KeeperClient,
    pub(super) events: mpsc::Receiver<KeeperEvent>,
}

/// Finds or starts the keeper.
pub(super) async fn keeper(
    config: &Config,
    state: &StateDir,
    tracker: &TaskTracker,
) -> Result<Keeper, RunEnd> {
    let (client, events) = KeeperClient::connect_or_start(config.keeper_options(state, tracker))
        .await
        .map_err(|e| internal("keeper", &e))?;
    Ok(Keeper { client, events })
}

/// The tasks of this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) ranks: Vec<RankHandle>,
    pub(super) edge: EdgeHandle,
    pub(super) handshake: HandshakeHandle,
    /// None if somebody else starts the engines.
    pub(super) processes: Option<ProcessHandle>,
    pub(super) keeper: KeeperClient,
    /// What the keeper reports about the supervised frontend.
    pub(super) frontend_events: mpsc::Receiver<KeeperEvent>,
    /// What is left of an earlier sidecar of this node.
    pub(super) state: NodeState,
    /// The relay process, which has the data path.
    pub(super) relay: Supervised,
    pub(super) gpus: GpuMonitor,
}

/// The relay process, as the end of a run sees it.
#[derive(Debug)]
pub(super) struct Supervised {
    pub(super) pid: watch::Receiver<Option<u32>>,
    /// Tells when it died and cannot be replaced.
    pub(super) failed: mpsc::Receiver<HostError>,
    /// Cancel it before the keeper is told to stop everything.
    pub(super) retire: CancellationToken,
}

/// Starts the tasks of this node; what they report goes to `events`.
pub(super) async fn start(
    config: &Arc<Config>,
    state: &StateDir,
    keeper: Keeper,
    events: mpsc::Sender<NodeEvent>,
    tracker: &TaskTracker,
    stop: &CancellationToken,
) -> Result<Local, RunEnd> {
    let Keeper { client: keeper, events: of_keeper } = keeper;
    let [engine_events, frontend_events, relay_events] = distribute(of_keeper, tracker, stop.clone());
    let handshake = handshake(config, events.clone(), tracker).await?;
    let options = HostOptions {
        state_dir: state.path().to_owned(),
        exe: config.exe.clone(),
        purpose: Purpose {
            ranks: config.start_rank..config.start_rank + config.size_local,
            frontend_slots: config.frontend_slots,
            kind: config.kind,
        },
        keeper: keeper.clone(),
        kill_grace: config.kill_grace,
        tracker: tracker.clone(),
        stop: stop.clone(),
    };
    let relay = host::start(options, relay_events, events.clone())
        .await
        .map_err(|error| internal("start", &error))?;
    let mut state = relay.found;
    let processes = match &config.engines {
        Engines::Spawn(_) => {
            processes::report(keeper.inherited(), config.local_ranks().map(EngineIndex), &mut state);
            let (config, keeper) = (config.clone(), keeper.clone());
            Some(processes::spawn(config, keeper, engine_events, events, tracker, stop.clone()))
        }
        Engines::Attach => None,
    };
    let file = config.accel_file.clone();
    let gpus = GpuMonitor::start(move || gpu::detect(file.as_deref()))
        .map_err(|error| internal("accelerator thread", &error))?;
    Ok(Local {
        ranks: relay.handles.ranks,
        edge: relay.handles.edge,
        handshake,
        processes,
        keeper,
        frontend_events,
        state,
        relay: Supervised { pid: relay.pid, failed: relay.failed, retire: relay.retire },
        gpus,
    })
}

async fn handshake(
    config: &Config,
    events: mpsc::Sender<NodeEvent>,
    tracker: &TaskTracker,
) -> Result<HandshakeHandle, RunEnd> {
    let shared = match config.engines {
        Engines::Attach => Some(SocketAddr::new(config.address, config.rpc_port)),
        Engines::Spawn(_) => None,
    };
    let handshake_config = HandshakeConfig {
        machine: handshake::Config {
            ready_timeout: config.startup_timeout,
            ..handshake::Config::new(config.start_rank..config.start_rank + config.size_local)
        },
        shared,
        limits: GuardLimits::default(),
    };
    let handle =
        handshake_driver::spawn(handshake_config, tracker, events).await.map_err(|error| match error {
            HandshakeBindError::InUse { .. } => RunEnd::new(exit_code::IN_USE, error.to_string()),
            HandshakeBindError::Other { .. } => internal("handshake", &error),
        })?;
    if let Some(address) = shared {
        info!(%address, "waiting for engines");
    }
    Ok(handle)
}

/// Splits the keeper's events: engines to the process task, the frontend and the relay process to their own. What
/// is about the keeper itself goes to all.
fn distribute(
    mut events: mpsc::Receiver<KeeperEvent>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> [mpsc::Receiver<KeeperEvent>; 3] {
    let (to_engines, engines) = mpsc::channel(QUEUE);
    let (to_frontend, frontend) = mpsc::channel(QUEUE);
    let (to_relay, relay) = mpsc::channel(QUEUE);
    tracker.spawn(named(
        Task::KeeperEvents,
        stop.run_until_cancelled_owned(async move {
            while let Some(event) = events.recv().await {
                let name = match &event {
                    KeeperEvent::Spawned { name, .. } => Some(name.as_str()),
                    KeeperEvent::Exited(report) => Some(report.name.as_str()),
                    KeeperEvent::Replaced { .. } | KeeperEvent::Failed { .. } => None,
                };
                let to = match name {
                    Some(FRONTEND) => vec![&to_frontend],
                    Some(crate::relay::CHILD) => vec![&to_relay],
                    Some(_) => vec![&to_engines],
                    // The relay process first: new engines need it.
                    None => vec![&to_relay, &to_frontend, &to_engines],
                };
                for task in to {
                    // A receiver that is gone belongs to a task that has ended.
                    if task.send(event.clone()).await.is_err() {
                        debug!("unexpected event from the keeper");
                    }
                }
            }
        }),
    ));
    [engines, frontend, relay]
}
