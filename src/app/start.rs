//! Binds, connects and starts everything a run needs.

use std::collections::BTreeMap;
use std::sync::Arc;

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::commands::Handles;
use super::drain::Drained;
use super::local::{self, Keeper, QUEUE, internal};
use super::nodes::{self, Gathered, Readers, Remote, THIS_NODE};
use super::pauses;
use super::runtime::Runtime;
use super::stage;
use super::{Leading, Run};
use crate::api::AdminCommand;
use crate::driver::attachment::{self, AttachmentConfig};
use crate::driver::frontend;
use crate::driver::handles::{AttachmentHandle, Deployment, EdgeHandle, NodeId, NodeState, Origin};
use crate::driver::node::{Inputs, Node, NodePeers, Outputs, Peers};
use crate::driver::weight_update::{StageReports, UpdateConfig, UpdateNode};
use crate::driver::{control, coordinator, weight_update};
use crate::exit_code::{self, RunEnd};
use crate::http::HttpServer;
use crate::link::server;
use crate::peer::hello::NodeHello;
use crate::peer::leader::{Leader, RemoteNode};
use crate::staging::upload::{self, Uploads};
use crate::tasks::{Task, named};
use crate::token::{Token, TokenError};

/// This node, and the others with the leader that they came to.
pub(super) type Joined = (NodeHello, Leader, Vec<RemoteNode>);

/// Starts all tasks. Nothing is left running on an error but what the caller's runtime ends.
///
/// `commands`: the way in for commands that come by other ways than the admin socket.
pub(super) async fn start(
    run: &Run,
    keeper: Keeper,
    nodes: Option<Joined>,
    commands: mpsc::WeakSender<AdminCommand>,
) -> Result<Runtime<Leading>, RunEnd> {
    let Run { config, state, tracker, stop, .. } = run;
    let (stop_frontend, stop_node) = (CancellationToken::new(), CancellationToken::new());

    let (node_events, mut events_of_nodes) = mpsc::channel(QUEUE);
    let (held, held_calls) = mpsc::channel(QUEUE);
    let (engine_reports, edge_events) = mpsc::channel(coordinator::EVENTS);
    // What each node reports is read when its readers are there.
    let mut reports = Vec::new();
    let mut reporter = |node| {
        let (events, reported) = mpsc::channel(server::EVENTS);
        let stage = StageReports::default();
        reports.push((node, reported, stage.clone()));
        (events, stage)
    };
    let (events, stage_reports) = reporter(THIS_NODE);
    let local = local::start(run, keeper, events.clone()).await?;
    let (uploads, upload_requests) = upload::channel();
    let own_ranks: Vec<EngineIndex> = config.local_ranks().map(EngineIndex).collect();
    let this_node = UpdateNode {
        id: THIS_NODE,
        name: "this node".to_owned(),
        ranks: own_ranks.clone(),
        stage: Some(stage::start(run, Some(upload_requests), events)?),
        reports: stage_reports,
    };
    let mut update_nodes = vec![this_node];
    let gathered = nodes.map(|(own, leader, nodes)| {
        leader.welcome();
        let mut remotes = Vec::new();
        for (id, node) in (1..).zip(nodes) {
            let (events, stage_reports) = reporter(NodeId(id));
            let (remote, update) = nodes::connect(NodeId(id), node, events, stage_reports, run);
            remotes.push(remote);
            update_nodes.push(update);
        }
        Gathered { own, leader, remotes: Arc::new(remotes) }
    });
    let remotes: &[Remote] = gathered.as_ref().map_or(&[], |gathered| &gathered.remotes);

    let mut edges = vec![(own_ranks.clone(), local.relay.handles.edge.clone())];
    edges.extend(remotes.iter().map(|remote| (remote.hello.ranks(), remote.handles.edge.clone())));
    let first = |(ranks, edge): &(Vec<EngineIndex>, EdgeHandle)| Some((*ranks.first()?, edge.clone()));
    let edges_by_rank = edges.iter().filter_map(first).collect();
    let coordinator = coordinator::spawn(config.kind, config.size, edges, edge_events, tracker);
    let mut ranks = local.relay.handles.ranks.clone();
    ranks.extend(remotes.iter().flat_map(|remote| remote.handles.ranks.clone()));

    let deployment = Deployment { kind: config.kind, size: config.size, engines: BTreeMap::new() };
    let (deployment_sender, deployment) = watch::channel(deployment);
    let attachment_config = AttachmentConfig {
        model: config.model().map(str::to_owned),
        state_dir: Some(state.path().to_owned()),
        flagged: config.frontends.iter().cloned().collect(),
        supervises: config.serve.is_some(),
        ..AttachmentConfig::default()
    };
    let attachments =
        attachment::spawn(attachment_config, tracker, ranks.clone(), coordinator.clone(), deployment);

    let control = control::spawn(config.kind, ranks.clone(), held_calls, tracker, stop.clone());
    pauses::frontends_gone(&attachments, &control, tracker, stop.clone());
    let readers =
        Readers { nodes: node_events, held, coordinator: engine_reports, attachments: attachments.clone() };
    for (node, reported, stage) in reports {
        readers.clone().read(node, reported, stage, tracker);
    }
    drop(readers);
    let (fences, fence_requests) = mpsc::channel(QUEUE);
    // A flag that stays on the command line must not take living engines back after each crash.
    let living = local.relay.found.ranks.values().any(|found| found.facts.is_some());
    if config.forget_committed && living {
        warn!("--forget-committed is not followed: engines of the sidecar before live on");
    }
    let updates = weight_update::spawn(
        UpdateConfig {
            pause_deadline: config.pause_deadline,
            startup_timeout: config.startup_timeout,
            forget_committed: config.forget_committed && !living,
            served_names: config.served_names(),
            ..UpdateConfig::new(config.kind, state.path()).with_load_timeout(config.load_timeout)
        },
        ranks.clone(),
        update_nodes,
        control.clone(),
        fences,
        tracker,
        stop.clone(),
    )
    .map_err(|e| internal("journal", &e))?;

    let (node_sender, node_snapshot) = watch::channel(BTreeMap::new());
    let this_node = NodePeers {
        ranks: own_ranks,
        edge: local.relay.handles.edge.clone(),
        handshake: local.handshake.clone(),
        processes: local.processes.clone(),
    };
    let mut node_peers = BTreeMap::from([(THIS_NODE, this_node)]);
    for remote in remotes {
        let peers = NodePeers {
            ranks: remote.hello.ranks(),
            edge: remote.handles.edge.clone(),
            handshake: remote.handles.handshake.clone(),
            processes: local.processes.as_ref().map(|_| remote.handles.processes.clone()),
        };
        node_peers.insert(remote.id, peers);
    }
    let mut states = BTreeMap::from([(THIS_NODE, local.relay.found.clone())]);
    let early = nodes::first_states(remotes, &mut events_of_nodes, &mut states).await?;
    tell_routes(&attachments, &states).await;
    let node = Node::new(
        config.clone(),
        Peers {
            ranks: ranks.iter().map(|r| (r.rank, r.clone())).collect(),
            coordinator: coordinator.clone(),
            updates: updates.clone(),
            nodes: node_peers,
        },
        Outputs { deployment: deployment_sender, snapshot: node_sender },
        &states,
        early,
    );
    let inputs = Inputs { nodes: events_of_nodes, fences: fence_requests, stop: stop_node.clone() };
    let node = tokio::spawn(named(Task::Node, node.run(inputs)));

    for address in &config.frontends {
        let added = attachments.add(address.clone(), Origin::Flag).await;
        added.map_err(|error| RunEnd::new(exit_code::USAGE, error.to_string()))?;
    }
    listen_http(run, uploads, commands).await?;
    let frontend = config.serve.is_some().then(|| {
        tokio::spawn(named(
            Task::SupervisedFrontend,
            frontend::run(
                config.clone(),
                attachment::supervised(state.path()),
                local.keeper.clone(),
                attachments.clone(),
                local.frontend_events,
                stop_frontend.clone(),
            ),
        ))
    });

    let handles = Handles {
        run: run.clone(),
        ranks: ranks.clone(),
        coordinator,
        attachments,
        control,
        updates,
        drained: Drained::default(),
        node: node_snapshot,
        gpus: local.gpus,
        keeper: local.keeper.clone(),
        relay: local.relay.pid.clone(),
        edges: edges_by_rank,
        nodes: gathered,
    };
    Ok(Runtime {
        run: run.clone(),
        ranks,
        keeper: local.keeper,
        relay: local.relay,
        answers: handles.clone(),
        role: Leading { handles, node: Some(node), stop_node, frontend, stop_frontend },
    })
}

/// Has routes closed that an earlier sidecar has left and nobody knows.
async fn tell_routes(attachments: &AttachmentHandle, states: &BTreeMap<NodeId, NodeState>) {
    for (&rank, state) in states.values().flat_map(|state| &state.ranks) {
        if !state.routes.is_empty()
            && let Err(error) = attachments.routes(rank, state.routes.clone()).await
        {
            debug!(%error, "no attachments task");
        }
    }
}

/// Uploads and updates over HTTP, if they are wanted.
async fn listen_http(
    run: &Run,
    uploads: Uploads,
    commands: mpsc::WeakSender<AdminCommand>,
) -> Result<(), RunEnd> {
    let Some(http) = &run.config.http else { return Ok(()) };
    let server = HttpServer::bind(http.address).await.map_err(|error| {
        RunEnd::new(exit_code::USAGE, format!("--http {}: cannot listen: {error}", http.address))
    })?;
    let made = |error: TokenError| {
        RunEnd::new(exit_code::USAGE, format!("{}: {error}", run.state.http_token().display()))
    };
    let (token, file) = match &http.token {
        Some(token) => (token.clone(), None),
        None => (Token::made_in(&run.state.http_token()).map_err(made)?, Some(run.state.http_token())),
    };
    let file = file.map(|file| file.display().to_string());
    info!(address = %server.address(), token_file = file, "uploads and updates over HTTP");
    server.serve(token, http.names.clone(), uploads, commands, &run.tracker, run.stop.clone());
    Ok(())
}
