//! Binds, connects and starts everything a run needs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dp_sidecar_protocol::machine::handshake;
use dp_sidecar_protocol::{EngineIndex, FrontendId};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use super::App;
use super::commands::Handles;
use super::status::Sources;
use crate::admin::server::AdminServer;
use crate::config::{Config, Engines};
use crate::driver::attachment::{self, AttachmentConfig};
use crate::driver::control::ControlHandle;
use crate::driver::frontend::{self, SupervisedSnapshot};
use crate::driver::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorCommand, CoordinatorHandle, Deployment, NodeEvent,
    NodeId, ProcessEvent, RankHandle, ask,
};
use crate::driver::handshake::{HandshakeBindError, HandshakeConfig};
use crate::driver::node::{Inputs, Node, NodeCommand, NodePeers, Outputs, Peers};
use crate::driver::rank::{RankConfig, RankOutputs};
use crate::driver::weight_update::{FenceRequest, UpdateConfig};
use crate::driver::{
    control, coordinator, edge, handshake as handshake_driver, processes, rank, weight_update,
};
use crate::exit_code::{self, RunEnd};
use crate::gpu::{self, GpuMonitor};
use crate::state_dir::StateDir;
use crate::supervisor::client::{KeeperClient, KeeperOptions};
use crate::supervisor::keeper::wire::KeeperEvent;
use crate::transport::{GuardLimits, PrivateDir};

/// Messages between tasks waiting at the most. All readers only move them on.
const QUEUE: usize = 256;
/// The leader's own node.
const THIS_NODE: NodeId = NodeId(0);
/// Limit for answers of our own tasks.
const LOCAL_ANSWER: Duration = Duration::from_secs(10);

/// Starts all tasks. Nothing is left running on an error but what the caller's runtime ends.
pub(super) async fn start(
    config: Arc<Config>,
    state: &StateDir,
    tracker: TaskTracker,
) -> Result<App, RunEnd> {
    let internal = |what: &str, error: &dyn std::fmt::Display| {
        RunEnd::new(exit_code::INTERNAL, format!("{what}: {error}"))
    };
    let stop = CancellationToken::new();
    let stop_frontend = CancellationToken::new();
    let (stopping, is_stopping) = watch::channel(false);

    // The admin socket first: status answers while everything else starts.
    let server = AdminServer::bind(state.path()).map_err(|e| internal("admin socket", &e))?;
    let (admin_commands, admin) = mpsc::channel(QUEUE);
    tracker.spawn(server.serve(admin_commands, stop.clone()));

    // Sockets of an earlier run have no owner: the lock of the state directory is ours.
    let ipc_path = state.path().join("ipc");
    if let Err(error) = std::fs::remove_dir_all(&ipc_path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(internal(&format!("{}", ipc_path.display()), &error));
    }
    let ipc = PrivateDir::create(ipc_path).map_err(|e| internal("socket directory", &e))?;

    let (keeper, keeper_events) = if needs_keeper(&config) {
        let options = KeeperOptions {
            state_dir: state.path().to_owned(),
            exe: config.exe.clone(),
            run_id: state.run_id().to_owned(),
            orphan_grace: config.orphan_grace,
            kill_grace: config.kill_grace,
            tasks: tracker.clone(),
        };
        let (client, events) =
            KeeperClient::connect_or_start(options).await.map_err(|e| internal("keeper", &e))?;
        (Some(client), Some(events))
    } else {
        (None, None)
    };
    let (engine_events, frontend_events) = distribute(keeper_events, &tracker, stop.clone());

    let shared = match config.engines {
        Engines::Attach => Some(SocketAddr::new(config.address, config.rpc_port)),
        Engines::Spawn(_) => None,
    };
    let (handshake_sender, handshake_events) = mpsc::channel(QUEUE);
    let handshake_config = HandshakeConfig {
        machine: handshake::Config {
            ready_timeout: config.startup_timeout,
            ..handshake::Config::new(config.start_rank..config.start_rank + config.size_local)
        },
        shared,
        limits: GuardLimits::default(),
    };
    let handshake =
        handshake_driver::spawn(handshake_config, &tracker, handshake_sender).await.map_err(|error| {
            match error {
                HandshakeBindError::InUse { .. } => RunEnd::new(exit_code::IN_USE, error.to_string()),
                HandshakeBindError::Other { .. } => internal("handshake", &error),
            }
        })?;
    if let Some(address) = shared {
        info!(%address, "waiting for engines");
    }

    let (reports, edge_events) = mpsc::channel(coordinator::EVENTS);
    let edge = edge::spawn(ipc.clone(), reports, &tracker);
    let coordinator = coordinator::spawn(
        coordinator::CoordinatorConfig::new(config.kind, config.size),
        vec![(config.local_ranks().map(EngineIndex).collect(), edge.handle)],
        edge_events,
        &tracker,
    );
    let (rank_sender, rank_events) = mpsc::channel(QUEUE);
    let (held, held_calls) = mpsc::channel(QUEUE);
    let wake = wakes(&coordinator, &tracker);
    let outputs = RankOutputs { events: rank_sender, held, wake };
    let ranks: Vec<RankHandle> = config
        .local_ranks()
        .map(|r| {
            let rank_config =
                RankConfig::new(EngineIndex(r), config.frontend_slots, config.kind, ipc.clone());
            rank::spawn(rank_config, &tracker, outputs.clone())
        })
        .collect();
    drop(outputs);

    let deployment = Deployment { kind: config.kind, size: config.size, engines: BTreeMap::new() };
    let (deployment_sender, deployment) = watch::channel(deployment);
    let model = match &config.engines {
        Engines::Spawn(launch) => launch.model.clone(),
        Engines::Attach => None,
    };
    let attachment_config = AttachmentConfig { model: model.clone(), ..AttachmentConfig::default() };
    let attachments =
        attachment::spawn(attachment_config, &tracker, ranks.clone(), coordinator.clone(), deployment);

    let control = control::spawn(
        &control::ControlConfig::new(config.kind),
        ranks.clone(),
        held_calls,
        &tracker,
        stop.clone(),
    );
    frontends_gone(&attachments, &control, &tracker, stop.clone());
    let (node_commands, commands) = mpsc::channel(QUEUE);
    let updates = weight_update::spawn(
        UpdateConfig::new(config.kind, state.path()),
        ranks.clone(),
        Vec::new(),
        control.clone(),
        fences(&node_commands, &tracker),
        &tracker,
        stop.clone(),
    )
    .map_err(|e| internal("journal", &e))?;

    let (node_sender, node_snapshot) = watch::channel(BTreeMap::new());
    let (node_events, events_of_nodes) = mpsc::channel(QUEUE);
    let processes = match (&config.engines, &keeper) {
        (Engines::Spawn(_), Some(keeper)) => {
            let events = of_node(THIS_NODE, node_events, &tracker);
            let (config, keeper) = (config.clone(), keeper.clone());
            Some(processes::spawn(config, keeper, engine_events, events, &tracker, stop.clone()))
        }
        _ => None,
    };
    let this_node = NodePeers {
        ranks: config.local_ranks().map(EngineIndex).collect(),
        handshake: handshake.clone(),
        processes,
    };
    let node = Node::new(
        config.clone(),
        Peers {
            ranks: ranks.iter().map(|r| (r.rank, r.clone())).collect(),
            coordinator: coordinator.clone(),
            updates: updates.clone(),
            nodes: BTreeMap::from([(THIS_NODE, this_node)]),
        },
        Outputs { deployment: deployment_sender, snapshot: node_sender },
        &BTreeMap::new(),
    );
    let inputs = Inputs { ranks: rank_events, handshake: handshake_events, nodes: events_of_nodes, commands };
    let node = tokio::spawn(node.run(inputs));

    for address in &config.frontends {
        let what = format!("attachment to {address}");
        let address = address.clone();
        let add = |reply| AttachmentCommand::Add { address, reply };
        ask(&attachments.commands, "attachment", what, LOCAL_ANSWER, add)
            .await
            .map_err(|error| RunEnd::new(exit_code::USAGE, error.to_string()))?;
    }
    let (supervised, _) = watch::channel(SupervisedSnapshot::default());
    let frontend = match (&config.serve, &keeper) {
        (Some(_), Some(keeper)) => Some(tokio::spawn(frontend::run(
            config.clone(),
            keeper.clone(),
            attachments.clone(),
            frontend_events,
            supervised,
            stop_frontend.clone(),
        ))),
        _ => None,
    };

    let file = config.accel_file.clone();
    let gpus = GpuMonitor::start(move || gpu::detect(file.as_deref()))
        .map_err(|e| internal("accelerator thread", &e))?;
    let sources = Sources {
        began: Instant::now(),
        ranks: ranks.clone(),
        node: node_snapshot,
        coordinator: coordinator.snapshot.clone(),
        frontends: attachments.snapshot.clone(),
        updates: updates.clone(),
        control: control.clone(),
        gpus,
        keeper: keeper.clone(),
    };
    Ok(App {
        config,
        tracker,
        stop,
        stop_frontend,
        admin,
        node,
        node_commands,
        frontend,
        handles: Handles {
            ranks,
            coordinator,
            handshake,
            attachments,
            control,
            updates,
            sources,
            stopping: is_stopping,
        },
        stopping,
        keeper,
        ipc,
    })
}

/// Whether anything is to be started by us.
fn needs_keeper(config: &Config) -> bool {
    matches!(config.engines, Engines::Spawn(_)) || config.serve.is_some()
}

/// Splits the keeper's events: engines to the node task, the frontend to its own.
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
                    debug!("no node task");
                }
            }
        }));
    }
    (engines, frontend)
}

/// Hands the events of a node's process task to the node task.
fn of_node(
    node: NodeId,
    events: mpsc::Sender<(NodeId, NodeEvent)>,
    tracker: &TaskTracker,
) -> mpsc::Sender<ProcessEvent> {
    let (sender, mut inbox) = mpsc::channel(QUEUE);
    tracker.spawn(async move {
        while let Some(event) = inbox.recv().await {
            if events.send((node, NodeEvent::Process(event))).await.is_err() {
                return;
            }
        }
    });
    sender
}

/// Tells the coordinator task of every request that goes to a lockstep engine.
fn wakes(coordinator: &CoordinatorHandle, tracker: &TaskTracker) -> mpsc::Sender<EngineIndex> {
    let (sender, mut ranks) = mpsc::channel(QUEUE);
    let commands = coordinator.commands.clone();
    tracker.spawn(async move {
        while let Some(rank) = ranks.recv().await {
            if commands.send(CoordinatorCommand::Wake { rank }).await.is_err() {
                return;
            }
        }
    });
    sender
}

/// Hands the update task's fences to the node task.
fn fences(node: &mpsc::Sender<NodeCommand>, tracker: &TaskTracker) -> mpsc::Sender<FenceRequest> {
    let (sender, mut requests) = mpsc::channel::<FenceRequest>(QUEUE);
    let node = node.clone();
    tracker.spawn(async move {
        while let Some(FenceRequest { rank, incarnation, reason }) = requests.recv().await {
            let fence = NodeCommand::Fence { rank, incarnation, reason };
            if node.send(fence).await.is_err() {
                return;
            }
        }
    });
    sender
}

/// Tells the control task which attachments have ended: a pause they hold becomes a lease.
fn frontends_gone(
    attachments: &AttachmentHandle,
    control: &ControlHandle,
    tracker: &TaskTracker,
    stop: CancellationToken,
) {
    let mut snapshots = attachments.snapshot.clone();
    let control = control.clone();
    tracker.spawn(stop.run_until_cancelled_owned(async move {
        let mut known: BTreeSet<u64> = BTreeSet::new();
        while snapshots.changed().await.is_ok() {
            let now: BTreeSet<u64> = snapshots.borrow_and_update().iter().filter_map(|f| f.id).collect();
            for &gone in known.difference(&now) {
                control.frontend_gone(FrontendId(gone)).await;
            }
            known = now;
        }
    }));
}
