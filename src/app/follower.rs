//! A follower: its tasks do what the leader says over the peer link, and go on while the leader is away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::local::{self, Local};
use super::{Begun, TASK_END, asked, ended_by, gone, nodes, stage, stop_keeper, until_few, waiting};
use crate::api::{
    AdminCommand, AdminError, Command, EngineStatus, ErrorKind, LeaderStatus, NodeStatus, Reply, Response,
    Status,
};
use crate::config::{Config, Nodes};
use crate::driver::handles::{Admission, NodeEvent, ProcessEvent, RankHandle};
use crate::exit_code::{self, RunEnd};
use crate::gpu::{self, GpuMonitor};
use crate::link::LinkStream;
use crate::link::server::{self, ServeEnd, ServerOptions, Services};
use crate::peer::facts;
use crate::peer::follower::{FindError, Finder, Found, LeaderView};
use crate::peer::introduction::Introduction;
use crate::shutdown::Why;
use crate::supervisor::client::KeeperClient;
use crate::supervisor::command::engine_rank;
use crate::tasks::{Task, named};
use crate::transport;

/// Runs a follower until the leader, a signal, a client or its leader's absence ends it.
pub(super) async fn run(begun: Begun) -> RunEnd {
    match begun.config.nodes.clone() {
        Some(nodes) => follow(begun, nodes).await,
        None => RunEnd::new(exit_code::INTERNAL, "a follower without a leader"),
    }
}

async fn follow(mut begun: Begun, nodes: Nodes) -> RunEnd {
    // Before anything else: a keeper that has engines stops them when nobody comes.
    let keeper = match local::keeper(&begun.config, &begun.state, &begun.tracker).await {
        Ok(keeper) => keeper,
        Err(end) => return end,
    };
    let client = keeper.client.clone();
    // Engines of a predecessor: the leader may be away for as long as for a follower that runs.
    let children = client.list().await.unwrap_or_default();
    let adopted = children.iter().any(|child| engine_rank(&child.name).is_some());
    let grace = begun.config.kill_grace;
    let introduction = facts::introduction(&begun.config, begun.state.run_id()).await;
    let (view, seen) = watch::channel(LeaderView::new());
    let finder = Finder {
        leader: nodes.leader.clone(),
        token: nodes.token.clone(),
        introduction: introduction.clone(),
        strict: !adopted,
        view,
    };
    let limit = if adopted { nodes.leader_timeout } else { begun.config.startup_timeout };
    let found = {
        let (config, began) = (&begun.config, begun.began);
        let look = || {
            let status = waiting::status(config, began, "waiting for the leader");
            Status { leader: Some(leader_status(&nodes, &seen)), ..status }
        };
        let why_not = format!("this sidecar is a follower; use the leader's, at {}", nodes.leader);
        let finding = finder.find(limit);
        waiting::serve_while(finding, &mut begun.admin, &mut begun.outside, look, &why_not).await
    };
    let found = match found {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            stop_keeper(&client, grace).await;
            return if adopted { away(&error) } else { RunEnd::new(error.exit_code(), error.to_string()) };
        }
        Err(end) => {
            stop_keeper(&client, grace).await;
            return end;
        }
    };
    nodes::set_address(&mut begun.config, found.own);
    let config = Arc::new(begun.config);
    let (events, reported) = mpsc::channel(server::EVENTS);
    let (tracker, stop) = (begun.tracker, begun.stop);
    let local = match local::start(&config, &begun.state, keeper, events.clone(), &tracker, &stop).await {
        Ok(local) => local,
        Err(end) => {
            stop_keeper(&client, grace).await;
            return end;
        }
    };
    let stage_events = stage::events_of_node(events.clone(), &tracker);
    let stage = stage::start(&config, &begun.state, None, stage_events, &tracker, &stop);
    let stage = match stage {
        Ok(stage) => stage,
        Err(end) => {
            stop_keeper(&client, grace).await;
            return end;
        }
    };
    let services = Services {
        ranks: local.ranks.clone(),
        edge: Some(local.edge.clone()),
        edge_state: None,
        handshake: Some(local.handshake.clone()),
        processes: local.processes.clone(),
        stage: Some(stage),
    };
    let (streams, stream_inbox) = mpsc::channel(1);
    let options = ServerOptions {
        initial: local.state.clone(),
        ..ServerOptions::new(introduction.name(), tracker.clone(), stop.clone())
    };
    let serving =
        tokio::spawn(named(Task::Follower, server::serve(options, stream_inbox, services, reported)));
    let finder = Finder { strict: false, ..finder };
    let linking =
        tokio::spawn(named(Task::FollowerLinking, keep_linked(finder, found, streams, nodes.leader_timeout)));
    let file = config.accel_file.clone();
    let gpus = GpuMonitor::start(move || gpu::detect(file.as_deref()));
    let follower = Follower {
        view: View {
            config,
            introduction,
            nodes,
            leader: seen,
            ranks: local.ranks.clone(),
            keeper: local.keeper.clone(),
            relay: local.relay.pid.clone(),
            gpus: gpus.ok(),
            began: begun.began,
        },
        local,
        events,
        tracker,
        stop,
    };
    follower.run(begun.admin, begun.outside, serving, linking).await
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
        let stream = found.stream.when_dropped(move || drop(dropped));
        if streams.send(LinkStream::new(stream, peer)).await.is_err() {
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
struct View {
    config: Arc<Config>,
    introduction: Introduction,
    nodes: Nodes,
    leader: watch::Receiver<LeaderView>,
    ranks: Vec<RankHandle>,
    keeper: KeeperClient,
    relay: watch::Receiver<Option<u32>>,
    gpus: Option<GpuMonitor>,
    began: Instant,
}

impl View {
    /// Answers a client with the status.
    fn answer(&self, tracker: &TaskTracker, stopping: bool, reply: Reply) {
        let view = self.clone();
        tracker.spawn(named(Task::AdminCommand, async move {
            reply.send(Ok(Response::Status(Box::new(view.status(stopping).await))));
        }));
    }

    async fn status(&self, stopping: bool) -> Status {
        let leader = leader_status(&self.nodes, &self.leader);
        let state = match (stopping, leader.up) {
            (true, _) => "stopping",
            (false, true) => "following",
            (false, false) => "waiting for the leader",
        };
        let mut status = waiting::status(&self.config, self.began, state);
        status.sidecar.keeper_pid = self.keeper.pid();
        status.sidecar.relay_pid = *self.relay.borrow();
        status.engines = self.engines().await;
        status.nodes = vec![NodeStatus {
            start_rank: self.introduction.start_rank,
            size_local: self.introduction.size_local,
            host: self.introduction.host.clone(),
            address: self.config.nodes.as_ref().and_then(|n| n.address).map(|ip| ip.to_string()),
            link: "here".to_owned(),
            ..NodeStatus::default()
        }];
        status.leader = Some(leader);
        if let Some(gpus) = &self.gpus {
            status.gpus = gpus.report().await;
        }
        status
    }

    /// What this node knows about its engines; their lifecycle is the leader's.
    async fn engines(&self) -> Vec<EngineStatus> {
        let children = self.keeper.list().await.unwrap_or_default();
        let engine = |handle: &RankHandle| {
            let snapshot = handle.snapshot.borrow();
            let name = crate::supervisor::command::engine_name(handle.rank.0);
            let pid = children.iter().find(|child| child.name == name).map(|child| child.pid);
            let state = match (snapshot.admitted, pid) {
                (true, _) => "admitted",
                (false, Some(_)) => "starting",
                (false, None) => "stopped",
            };
            EngineStatus {
                rank: handle.rank,
                pid,
                state: state.to_owned(),
                incarnation: snapshot.incarnation.0,
                weight_version: snapshot.weight_version.clone(),
                in_flight: snapshot.in_flight.values().sum(),
                held: snapshot.held,
                ..EngineStatus::default()
            }
        };
        self.ranks.iter().map(engine).collect()
    }

    fn in_flight(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.snapshot.borrow().in_flight.values().sum::<u64>()).sum()
    }
}

/// A follower whose leader has been there.
struct Follower {
    view: View,
    local: Local,
    /// What the leader hears of this node.
    events: mpsc::Sender<NodeEvent>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Follower {
    async fn run(
        mut self,
        mut admin: mpsc::Receiver<AdminCommand>,
        mut outside: watch::Receiver<crate::shutdown::Asked>,
        mut serving: JoinHandle<ServeEnd>,
        mut linking: JoinHandle<Option<FindError>>,
    ) -> RunEnd {
        let (end, drain) = loop {
            tokio::select! {
                biased;
                why = asked(&mut outside) => {
                    let mut end = ended_by(why);
                    if self.view.config.keep_engines && matches!(why, Why::Signal(_)) {
                        info!(reason = %end.reason, "exiting; engines and requests keep running");
                        // As if the process was killed: no task may see another one end and tell anybody of it.
                        std::mem::forget(self);
                        end.keeps_engines = true;
                        return end;
                    }
                    break (end, true);
                }
                ended = &mut serving => break match ended {
                    Ok(ServeEnd::Shutdown) => (RunEnd::new(exit_code::OK, "the leader stops the deployment"), false),
                    Ok(ServeEnd::Stopped) => (internal("the link ended unexpectedly"), false),
                    Err(error) => (internal(&format!("link task: {error}")), false),
                },
                Some(error) = self.local.relay.failed.recv() => break (internal(&error.to_string()), false),
                ended = &mut linking => break match ended {
                    Ok(Some(error)) => (away(&error), false),
                    Ok(None) => (internal("no task accepts connections of the leader"), false),
                    Err(error) => (internal(&format!("link: {error}")), false),
                },
                command = admin.recv() => match command {
                    Some(AdminCommand { command: Command::Stop, reply }) => {
                        reply.send(Ok(Response::Done));
                        break (RunEnd::new(exit_code::OK, "stop command"), true);
                    }
                    Some(command) => self.command(command),
                    None => break (internal("the admin server has ended"), false),
                },
            }
        };
        info!(reason = %end.reason, "stopping");
        let hurry = CancellationToken::new();
        let (view, tracker) = (self.view.clone(), self.tracker.clone());
        if drain {
            let stops = NodeEvent::Process(ProcessEvent::NodeStops { reason: end.reason.clone() });
            if timeout(TASK_END, self.events.send(stops)).await.is_err() {
                warn!("cannot tell the leader that this node stops");
            }
        }
        let stages = self.stop_all(drain, linking, hurry.clone());
        tokio::pin!(stages);
        loop {
            tokio::select! {
                () = &mut stages => return end,
                Some(AdminCommand { command, reply }) = admin.recv() => match command {
                    Command::Stop => reply.send(Ok(Response::Done)),
                    Command::Status => view.answer(&tracker, true, reply),
                    // A dropped reply is answered as "the sidecar is stopping".
                    _ => {}
                },
                Ok(()) = outside.changed() => {
                    if outside.borrow().times > 1 || !drain {
                        warn!("second signal: skipping all waits");
                        hurry.cancel();
                    }
                }
            }
        }
    }

    fn command(&self, AdminCommand { command, reply }: AdminCommand) {
        match command {
            Command::Status => self.view.answer(&self.tracker, false, reply),
            _ => {
                let text =
                    format!("this sidecar is a follower; use the leader's, at {}", self.view.nodes.leader);
                reply.send(Err(AdminError::new(ErrorKind::Unavailable, text)));
            }
        }
    }

    /// Stops the engines of this node, then its tasks. The link goes on meanwhile, so that the leader hears of it.
    async fn stop_all(self, drain: bool, linking: JoinHandle<Option<FindError>>, hurry: CancellationToken) {
        if drain {
            tokio::select! {
                () = self.drain() => {}
                () = hurry.cancelled() => {}
            }
        }
        let grace = if hurry.is_cancelled() { Duration::ZERO } else { self.view.config.kill_grace };
        self.local.relay.retire.cancel();
        stop_keeper(&self.local.keeper, grace).await;
        linking.abort();
        self.stop.cancel();
        let Self { view, local, events: told, tracker, stop: _ } = self;
        drop((view, told, local));
        tracker.close();
        // The watcher of signals is in there, too: it ends when its last receiver is dropped. And whoever asks for
        // the status at this moment.
        if timeout(TASK_END, until_few(&tracker, 1)).await.is_err() {
            error!(tasks = tracker.len() - 1, "tasks did not end in time");
        }
        transport::linger().await;
    }

    /// Lets requests in flight on this node's ranks finish, at most for the shutdown timeout.
    async fn drain(&self) {
        let limit = self.view.config.shutdown_timeout;
        let closed = self.local.ranks.iter().map(|rank| rank.ask_within(TASK_END, Admission { open: false }));
        futures::future::join_all(closed).await.into_iter().for_each(gone);
        let idle = async {
            let mut tick = tokio::time::interval(crate::driver::rank::SNAPSHOT_LAG * 2);
            // Requests that came just now are not in the snapshots yet.
            tick.tick().await;
            tick.tick().await;
            while self.view.in_flight() > 0 {
                tick.tick().await;
            }
        };
        if timeout(limit, idle).await.is_err() {
            let ranks: Vec<EngineIndex> = self.local.ranks.iter().map(|rank| rank.rank).collect();
            warn!(
                ?ranks,
                in_flight = self.view.in_flight(),
                "aborting requests: the shutdown timeout is over"
            );
        }
    }
}

fn internal(text: &str) -> RunEnd {
    RunEnd::new(exit_code::INTERNAL, text)
}
