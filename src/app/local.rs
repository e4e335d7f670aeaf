//! The tasks of this node that do what a leader says, its own or another node's: keeper, data path, handshake,
//! processes, staging.

use std::net::SocketAddr;
use std::sync::Arc;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::handshake;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use crate::config::{Config, Engines};
use crate::driver::handles::{EdgeHandle, HandshakeHandle, ProcessHandle, RankHandle};
use crate::driver::handshake::{HandshakeBindError, HandshakeConfig};
use crate::driver::rank::{RankConfig, RankOutputs};
use crate::driver::{edge, frontend, handshake as handshake_driver, processes, rank};
use crate::exit_code::{self, RunEnd};
use crate::link::client::NodeSinks;
use crate::link::wire::NodeState;
use crate::state_dir::StateDir;
use crate::supervisor::client::KeeperClient;
use crate::supervisor::keeper::wire::KeeperEvent;
use crate::transport::{GuardLimits, PrivateDir};

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

/// Finds or starts the keeper; none if nothing is to be started by us.
pub(super) async fn keeper(
    config: &Config,
    state: &StateDir,
    tracker: &TaskTracker,
) -> Result<Option<Keeper>, RunEnd> {
    if !matches!(config.engines, Engines::Spawn(_)) && config.serve.is_none() {
        return Ok(None);
    }
    let (client, events) = KeeperClient::connect_or_start(config.keeper_options(state, tracker))
        .await
        .map_err(|e| internal("keeper", &e))?;
    Ok(Some(Keeper { client, events }))
}

/// The tasks of this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) ranks: Vec<RankHandle>,
    pub(super) edge: EdgeHandle,
    pub(super) handshake: HandshakeHandle,
    /// None if somebody else starts the engines.
    pub(super) processes: Option<ProcessHandle>,
    pub(super) keeper: Option<KeeperClient>,
    /// What the keeper reports about the supervised frontend.
    pub(super) frontend_events: mpsc::Receiver<KeeperEvent>,
    pub(super) ipc: PrivateDir,
    /// What is left of an earlier sidecar of this node.
    pub(super) state: NodeState,
}

/// Starts the tasks of this node; what happens goes to `sinks`.
pub(super) async fn start(
    config: &Arc<Config>,
    state: &StateDir,
    keeper: Option<Keeper>,
    sinks: NodeSinks,
    tracker: &TaskTracker,
    stop: &CancellationToken,
) -> Result<Local, RunEnd> {
    // Sockets of an earlier run have no owner: the lock of the state directory is ours.
    let ipc_path = state.path().join("ipc");
    if let Err(error) = std::fs::remove_dir_all(&ipc_path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(internal(&format!("{}", ipc_path.display()), &error));
    }
    let ipc = PrivateDir::create(ipc_path).map_err(|e| internal("socket directory", &e))?;
    let (keeper, keeper_events) = keeper.map(|keeper| (keeper.client, keeper.events)).unzip();
    let (engine_events, frontend_events) = distribute(keeper_events, tracker, stop.clone());
    let handshake = handshake(config, &sinks, tracker).await?;
    let edge = edge::spawn(ipc.clone(), sinks.edge, tracker);
    let outputs = RankOutputs { events: sinks.ranks, held: sinks.held, wake: sinks.wakes };
    let ranks: Vec<RankHandle> = config
        .local_ranks()
        .map(|r| {
            let rank_config =
                RankConfig::new(EngineIndex(r), config.frontend_slots, config.kind, ipc.clone());
            rank::spawn(rank_config, tracker, outputs.clone())
        })
        .collect();
    let mut state = NodeState::default();
    let processes = match (&config.engines, &keeper) {
        (Engines::Spawn(_), Some(keeper)) => {
            processes::report(keeper.inherited(), config.local_ranks().map(EngineIndex), &mut state);
            let (config, keeper) = (config.clone(), keeper.clone());
            Some(processes::spawn(config, keeper, engine_events, sinks.processes, tracker, stop.clone()))
        }
        _ => None,
    };
    Ok(Local { ranks, edge: edge.handle, handshake, processes, keeper, frontend_events, ipc, state })
}

async fn handshake(
    config: &Config,
    sinks: &NodeSinks,
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
    let handle = handshake_driver::spawn(handshake_config, tracker, sinks.handshake.clone()).await.map_err(
        |error| match error {
            HandshakeBindError::InUse { .. } => RunEnd::new(exit_code::IN_USE, error.to_string()),
            HandshakeBindError::Other { .. } => internal("handshake", &error),
        },
    )?;
    if let Some(address) = shared {
        info!(%address, "waiting for engines");
    }
    Ok(handle)
}

/// Splits the keeper's events: engines to the process task, the frontend to its own.
fn distribute(
    events: Option<mpsc::Receiver<KeeperEvent>>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> (mpsc::Receiver<KeeperEvent>, mpsc::Receiver<KeeperEvent>) {
    let (to_engines, engines) = mpsc::channel(QUEUE);
    let (to_frontend, frontend) = mpsc::channel(QUEUE);
    if let Some(mut events) = events {
        tracker.spawn(stop.run_until_cancelled_owned(async move {
            while let Some(event) = events.recv().await {
                let name = match &event {
                    KeeperEvent::Spawned { name, .. } => Some(name.as_str()),
                    KeeperEvent::Exited(report) => Some(report.name.as_str()),
                    KeeperEvent::Replaced { .. } | KeeperEvent::Failed { .. } => None,
                };
                // A receiver that is gone belongs to a task that has ended.
                if name.is_none_or(|name| name == frontend::CHILD)
                    && to_frontend.send(event.clone()).await.is_err()
                {
                    debug!("no frontend task");
                }
                if name.is_none_or(|name| name != frontend::CHILD) && to_engines.send(event).await.is_err() {
                    debug!("no process task");
                }
            }
        }));
    }
    (engines, frontend)
}
