//! A follower: its tasks do what the leader says over the peer link, and go on while the leader is away.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::warn;

use super::local::{self, Keeper, Local, internal};
use super::runtime::{Answers, Role, Runtime, TASK_END, stop_keeper};
use super::{Begun, Run, nodes, stage, status, waiting};
use crate::api::{AdminError, Command, EngineStatus, ErrorKind, LeaderStatus, Reply, Response, Status};
use crate::config::Nodes;
use crate::driver::handles::{NodeEvent, ProcessEvent, RankHandle};
use crate::exit_code::{self, RunEnd};
use crate::gpu::GpuMonitor;
use crate::link::LinkStream;
use crate::link::server::{self, ServeEnd, ServerOptions, Services};
use crate::peer::facts;
use crate::peer::follower::{FindError, Finder, Found, LeaderView};
use crate::peer::hello::NodeHello;
use crate::supervisor::client::KeeperClient;
use crate::supervisor::command::{engine_name, engine_rank};
use crate::tasks::{Task, named};

impl Begun {
    /// Finds the leader and starts what it directs.
    pub(super) async fn follow(&mut self, nodes: Nodes) -> Result<Runtime<Following>, RunEnd> {
        // Before anything else: a keeper that has engines stops them when nobody comes.
        let keeper = local::keeper(&self.run).await?;
        let client = keeper.client.clone();
        let followed = self.follow_with(nodes, keeper).await;
        if followed.is_err() {
            stop_keeper(&client, self.run.config.kill_grace).await;
        }
        followed
    }

    async fn follow_with(&mut self, nodes: Nodes, keeper: Keeper) -> Result<Runtime<Following>, RunEnd> {
        // Engines of a predecessor: the leader may be away for as long as for a follower that runs.
        let children = keeper.client.list().await.unwrap_or_default();
        let adopted = children.iter().any(|child| engine_rank(&child.name).is_some());
        let hello = facts::hello(&self.run.config, self.run.state.run_id()).await;
        let (view, seen) = watch::channel(LeaderView::default());
        let finder = Finder {
            leader: nodes.leader.clone(),
            token: nodes.token.clone(),
            hello: hello.clone(),
            epoch: Arc::new(super::nodes::epoch(&self.run).await?),
            strict: !adopted,
            view,
        };
        let limit = if adopted { nodes.leader_timeout } else { self.run.config.startup_timeout };
        let look = || Status {
            leader: Some(leader_status(&nodes, &seen)),
            ..waiting::status(&self.run, "waiting for the leader")
        };
        let why_not = why_not(&nodes);
        let finding = finder.find(limit);
        let found = waiting::serve_while(finding, &mut self.admin, &mut self.outside, look, &why_not).await?;
        let found = found.map_err(|error| {
            if adopted { away(&error) } else { RunEnd::new(error.exit_code(), error.to_string()) }
        })?;
        self.run.set_address(found.own);
        let run = self.run.clone();
        let (events, reported) = mpsc::channel(server::EVENTS);
        let Local { relay, handshake, processes, keeper, gpus, .. } =
            local::start(&run, keeper, events.clone()).await?;
        let stage = stage::start(&run, None, events.clone())?;
        let ranks = relay.handles.ranks.clone();
        let services = Services {
            ranks: ranks.clone(),
            edge: Some(relay.handles.edge.clone()),
            edge_state: None,
            handshake: Some(handshake),
            processes,
            stage: Some(stage),
        };
        let (streams, stream_inbox) = mpsc::channel(1);
        let options = ServerOptions {
            initial: relay.found.clone(),
            ..ServerOptions::new(hello.name(), run.tracker.clone(), run.stop.clone())
        };
        let serving =
            tokio::spawn(named(Task::Follower, server::serve(options, stream_inbox, services, reported)));
        let finder = Finder { strict: false, ..finder };
        let linking = keep_linked(finder, found, streams, nodes.leader_timeout);
        let linking = tokio::spawn(named(Task::FollowerLinking, linking));
        let role = Following { events, serving, linking };
        let answers = View {
            run: run.clone(),
            hello,
            nodes,
            leader: seen,
            ranks: ranks.clone(),
            keeper: keeper.clone(),
            relay: relay.pid.clone(),
            gpus,
        };
        Ok(Runtime { run, ranks, keeper, relay, answers, role })
    }
}

/// What clients are told that should ask the leader.
fn why_not(nodes: &Nodes) -> String {
    format!("this sidecar is a follower; use the leader's, at {}", nodes.leader)
}

/// Hands each connection on, and looks for the leader again when it is lost. Ends when the leader is away for too
/// long, or when no task accepts connections any more.
async fn keep_linked(
    finder: Finder,
    found: Found,
    streams: mpsc::Sender<LinkStream>,
    limit: Duration,
) -> Option<FindError> {
    let mut found = found;
    loop {
        let (dropped, lost) = oneshot::channel::<()>();
        let peer = format!("the leader at {}", finder.leader);
        if streams.send(LinkStream::new(found.stream, peer).keeping(dropped)).await.is_err() {
            return None;
        }
        // An error, always: it is only ever dropped.
        let _ = lost.await;
        warn!("the link to the leader at {} is down", finder.leader);
        match finder.find(limit).await {
            Ok(next) => found = next,
            Err(error) => return Some(error),
        }
    }
}

/// The leader did not come back.
fn away(error: &FindError) -> RunEnd {
    RunEnd::new(exit_code::PEER_OR_LIFELINE, format!("engines stopped: {error}"))
}

fn leader_status(nodes: &Nodes, view: &watch::Receiver<LeaderView>) -> LeaderStatus {
    let view = view.borrow();
    LeaderStatus {
        address: nodes.leader.clone(),
        up: view.up,
        since_s: view.since.elapsed().as_secs(),
        state: view.state.clone(),
    }
}

/// What status is made of.
#[derive(Clone)]
pub(super) struct View {
    run: Run,
    hello: NodeHello,
    nodes: Nodes,
    leader: watch::Receiver<LeaderView>,
    ranks: Vec<RankHandle>,
    keeper: KeeperClient,
    relay: watch::Receiver<Option<u32>>,
    gpus: GpuMonitor,
}

impl Answers for View {
    async fn status(&self, stopping: bool) -> Status {
        let leader = leader_status(&self.nodes, &self.leader);
        let state = match (stopping, leader.up) {
            (true, _) => "stopping",
            (false, true) => "following",
            (false, false) => "waiting for the leader",
        };
        let mut status = waiting::status(&self.run, state);
        status.sidecar.keeper_pid = self.keeper.pid();
        status.sidecar.relay_pid = *self.relay.borrow();
        status.engines = self.engines().await;
        let address = self.run.config.nodes.as_ref().and_then(|nodes| nodes.address);
        status.nodes = vec![nodes::here(&self.hello, address)];
        status.leader = Some(leader);
        status.gpus = self.gpus.report().await;
        status
    }

    async fn perform(&self, _: Command, _: &Reply) -> Result<Response, AdminError> {
        Err(AdminError::new(ErrorKind::Unavailable, why_not(&self.nodes)))
    }
}

impl View {
    /// What this node knows about its engines; their lifecycle is the leader's.
    async fn engines(&self) -> Vec<EngineStatus> {
        let children = self.keeper.list().await.unwrap_or_default();
        let engine = |handle: &RankHandle| {
            let snapshot = handle.snapshot.borrow();
            let name = engine_name(handle.rank.0);
            let pid = children.iter().find(|child| child.name == name).map(|child| child.pid);
            let state = match (snapshot.admitted, pid) {
                (true, _) => "admitted",
                (false, Some(_)) => "starting",
                (false, None) => "stopped",
            };
            EngineStatus { pid, state: state.to_owned(), ..status::engine(&snapshot) }
        };
        self.ranks.iter().map(engine).collect()
    }
}

/// A follower whose leader has been there.
pub(super) struct Following {
    /// What the leader hears of this node.
    events: mpsc::Sender<NodeEvent>,
    serving: JoinHandle<ServeEnd>,
    linking: JoinHandle<Option<FindError>>,
}

impl Role for Following {
    type Answers = View;

    async fn ended(&mut self) -> RunEnd {
        tokio::select! {
            biased;
            ended = &mut self.serving => match ended {
                Ok(ServeEnd::Shutdown) => RunEnd::new(exit_code::OK, "the leader stops the deployment"),
                Ok(ServeEnd::Stopped) => RunEnd::new(exit_code::INTERNAL, "the link ended unexpectedly"),
                Err(error) => internal("link task", &error),
            },
            ended = &mut self.linking => match ended {
                Ok(Some(error)) => away(&error),
                Ok(None) => RunEnd::new(exit_code::INTERNAL, "no task accepts connections of the leader"),
                Err(error) => internal("link", &error),
            },
        }
    }

    async fn announce(&self, reason: &str) {
        let stops = NodeEvent::Process(ProcessEvent::NodeStops { reason: reason.to_owned() });
        if timeout(TASK_END, self.events.send(stops)).await.is_err() {
            warn!("cannot tell the leader that this node stops");
        }
    }

    /// The engines have ended with the keeper. The link went on meanwhile, so that the leader heard of it.
    async fn finish(self) {
        self.linking.abort();
    }
}
