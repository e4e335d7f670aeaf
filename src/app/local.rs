//! The tasks of this node that do what a leader says, its own or another node's: keeper, data path, handshake,
//! processes, staging.

use std::net::SocketAddr;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::handshake;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::Run;
use crate::config::Engines;
use crate::driver::handles::{HandshakeHandle, NodeEvent, ProcessHandle, SetLimits};
use crate::driver::handshake::{HandshakeBindError, HandshakeConfig};
use crate::driver::{handshake as handshake_driver, processes};
use crate::exit_code::{self, RunEnd};
use crate::gpu::{self, GpuMonitor};
use crate::relay::Purpose;
use crate::relay::host::{self, HostOptions, Relay};
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
pub(super) async fn keeper(run: &Run) -> Result<Keeper, RunEnd> {
    let options = run.config.keeper_options(&run.state, &run.tracker);
    let found = KeeperClient::connect_or_start(options).await;
    let (client, events) = found.map_err(|error| internal("keeper", &error))?;
    Ok(Keeper { client, events })
}

/// The tasks of this node.
#[derive(Debug)]
pub(super) struct Local {
    /// The relay process, which has the data path, and what is left of an earlier sidecar of this node.
    pub(super) relay: Relay,
    pub(super) handshake: HandshakeHandle,
    /// None if somebody else starts the engines.
    pub(super) processes: Option<ProcessHandle>,
    pub(super) keeper: KeeperClient,
    /// What the keeper reports about the supervised frontend.
    pub(super) frontend_events: mpsc::Receiver<KeeperEvent>,
    pub(super) gpus: GpuMonitor,
}

/// Starts the tasks of this node; what they report goes to `events`.
pub(super) async fn start(
    run: &Run,
    keeper: Keeper,
    events: mpsc::Sender<NodeEvent>,
) -> Result<Local, RunEnd> {
    let Run { config, state, tracker, stop, .. } = run;
    let Keeper { client: keeper, events: of_keeper } = keeper;
    let [engine_events, frontend_events, relay_events] = distribute(of_keeper, run);
    let handshake = handshake(run, events.clone()).await?;
    let options = HostOptions {
        state_dir: state.path().to_owned(),
        exe: config.exe.clone(),
        purpose: Purpose {
            ranks: config.start_rank..config.start_rank + config.size_local,
            frontend_slots: config.frontend_slots,
            kind: config.kind,
            limits: config.limits,
        },
        keeper: keeper.clone(),
        kill_grace: config.kill_grace,
        tracker: tracker.clone(),
        stop: stop.clone(),
    };
    let mut relay = host::start(options, relay_events, events.clone())
        .await
        .map_err(|error| internal("start", &error))?;
    for rank in &relay.handles.ranks {
        // One that was found may have others.
        let told = rank.commands.tell(SetLimits { limits: config.limits }).await;
        told.map_err(|error| internal("start", &error))?;
    }
    let processes = match &config.engines {
        Engines::Spawn(_) => {
            processes::report(keeper.inherited(), config.local_ranks().map(EngineIndex), &mut relay.found);
            let (config, keeper) = (config.clone(), keeper.clone());
            Some(processes::spawn(config, keeper, engine_events, events, tracker, stop.clone()))
        }
        Engines::Attach => None,
    };
    let file = config.accel_file.clone();
    let gpus = GpuMonitor::start(move || gpu::detect(file.as_deref()))
        .map_err(|error| internal("accelerator thread", &error))?;
    Ok(Local { relay, handshake, processes, keeper, frontend_events, gpus })
}

async fn handshake(run: &Run, events: mpsc::Sender<NodeEvent>) -> Result<HandshakeHandle, RunEnd> {
    let config = &run.config;
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
        handshake_driver::spawn(handshake_config, &run.tracker, events).await.map_err(
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

/// Splits the keeper's events: engines to the process task, the frontend and the relay process to their own. What
/// is about the keeper itself goes to all.
fn distribute(mut events: mpsc::Receiver<KeeperEvent>, run: &Run) -> [mpsc::Receiver<KeeperEvent>; 3] {
    let (to_engines, engines) = mpsc::channel(QUEUE);
    let (to_frontend, frontend) = mpsc::channel(QUEUE);
    let (to_relay, relay) = mpsc::channel(QUEUE);
    run.tracker.spawn(named(
        Task::KeeperEvents,
        run.stop.clone().run_until_cancelled_owned(async move {
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
