//! The leader's way to the nodes of a deployment: gathers them, and makes handles for what runs there.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};

use super::Run;
use crate::api::NodeStatus;
use crate::config::Nodes;
use crate::driver::handles::{
    AttachmentCommand, AttachmentHandle, HeldCall, NodeEvent, NodeId, NodeState, Shutdown,
};
use crate::driver::weight_update::{StageReports, UpdateNode};
use crate::exit_code::{self, RunEnd};
use crate::link::client::{self, ClientOptions, LinkStatus, NodeHandles};
use crate::peer::epoch::Epoch;
use crate::peer::hello::NodeHello;
use crate::peer::leader::{BindError, GatherError, Leader, RemoteNode};
use crate::tasks::{Task, named};

/// The leader's own node.
pub(super) const THIS_NODE: NodeId = NodeId(0);
/// Limit for all nodes to tell what they have. A link that flaps once or twice may take some of it.
const FIRST_STATE: Duration = Duration::from_secs(30);
/// Limit for a follower to take the word that the deployment stops.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Listens for the other nodes.
pub(super) async fn listen(run: &Run, nodes: &Nodes, own: NodeHello) -> Result<Leader, RunEnd> {
    let Run { config, tracker, stop, .. } = run;
    let limit = config.startup_timeout;
    Leader::start(nodes, own, config.size, limit, tracker, stop.clone()).await.map_err(|error| {
        let code = match error {
            BindError::Unknown { .. } => exit_code::TIMEOUT,
            BindError::InUse { .. } => exit_code::IN_USE,
            BindError::Other { .. } => exit_code::PREFLIGHT,
        };
        RunEnd::new(code, error.to_string())
    })
}

/// The newest leader that this node knows of.
pub(super) async fn epoch(run: &Run) -> Result<Epoch, RunEnd> {
    with_epoch(run, Ok).await
}

/// This sidecar's own epoch, now that it leads.
pub(super) async fn lead(run: &Run) -> Result<u64, RunEnd> {
    with_epoch(run, |epoch| epoch.lead()).await
}

async fn with_epoch<T: Send + 'static>(
    run: &Run,
    act: impl FnOnce(Epoch) -> io::Result<T> + Send + 'static,
) -> Result<T, RunEnd> {
    let dir = run.state.path().to_owned();
    let done = tokio::task::spawn_blocking(move || Epoch::read(&dir).and_then(act)).await;
    let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|error| RunEnd::new(exit_code::PREFLIGHT, format!("the leader's epoch: {error}")))
}

/// How a start ends when the nodes do not come together.
pub(super) fn gather_end(error: &GatherError) -> RunEnd {
    let code = match error {
        GatherError::Mismatch(_) => exit_code::MISMATCH,
        GatherError::Missing { .. } => exit_code::TIMEOUT,
    };
    RunEnd::new(code, error.to_string())
}

/// A follower, as the leader's tasks see it.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub(super) id: NodeId,
    pub(super) hello: NodeHello,
    pub(super) handles: NodeHandles,
    pub(super) status: watch::Receiver<LinkStatus>,
}

impl Remote {
    /// Tells the follower that the deployment stops.
    pub(super) async fn shutdown(&self) {
        if let Err(error) = self.handles.link.ask_within(SHUTDOWN, Shutdown {}).await {
            warn!(node = %self.hello.name(), %error, "the node was not told that the deployment stops");
        }
    }
}

/// Makes handles for a follower. What it reports goes to `events`, and from there to `reports` what its staging area
/// does.
pub(super) fn connect(
    id: NodeId,
    node: RemoteNode,
    events: mpsc::Sender<NodeEvent>,
    reports: StageReports,
    run: &Run,
) -> (Remote, UpdateNode) {
    let RemoteNode { hello, connections } = node;
    let name = hello.name();
    let options = ClientOptions::new(&*name, hello.ranks(), run.stop.clone());
    let (handles, status) = client::spawn(options, connections, events, &run.tracker);
    let remote = Remote { id, hello, handles, status };
    let update = UpdateNode {
        id,
        name,
        ranks: remote.hello.ranks(),
        stage: Some(remote.handles.stage.clone()),
        reports,
    };
    (remote, update)
}

/// Who reads what the nodes report.
#[derive(Clone, Debug)]
pub(super) struct Readers {
    /// The node task: engines, and nodes as a whole.
    pub(super) nodes: mpsc::Sender<(NodeId, NodeEvent)>,
    /// The control task.
    pub(super) held: mpsc::Sender<HeldCall>,
    /// The coordinator task: reports of engines, and wakes.
    pub(super) coordinator: mpsc::Sender<NodeEvent>,
    /// Lost routes.
    pub(super) attachments: AttachmentHandle,
}

impl Readers {
    /// Hands on what one node reports, until it ends. No reader waits for another one.
    pub(super) fn read(
        self,
        node: NodeId,
        mut events: mpsc::Receiver<NodeEvent>,
        stage: StageReports,
        tracker: &TaskTracker,
    ) {
        tracker.spawn(named(Task::Queue, async move {
            while let Some(event) = events.recv().await {
                let gone = match event {
                    NodeEvent::Held(call) => self.held.send(call).await.is_err(),
                    NodeEvent::Edge(_) | NodeEvent::Wake(_) => self.coordinator.send(event).await.is_err(),
                    NodeEvent::RouteLost(loss) => {
                        self.attachments.commands.send(AttachmentCommand::RouteLost(loss)).await.is_err()
                    }
                    NodeEvent::Stage(event) => {
                        stage.take(event);
                        false
                    }
                    // Of its relay process, whose state was told at the start; what was missed came as events.
                    NodeEvent::Connected(_) | NodeEvent::Disconnected { .. } if node == THIS_NODE => false,
                    event => {
                        if let NodeEvent::Disconnected { reason } = &event {
                            error!(node = node.0, %reason, "link lost");
                        }
                        self.nodes.send((node, event)).await.is_err()
                    }
                };
                if gone {
                    debug!(node = node.0, "event dropped: its task has ended");
                }
            }
        }));
    }
}

/// Waits until each node has told what it has. Returns what happened meanwhile.
pub(super) async fn first_states(
    remotes: &[Remote],
    events: &mut mpsc::Receiver<(NodeId, NodeEvent)>,
    states: &mut BTreeMap<NodeId, NodeState>,
) -> Result<Vec<(NodeId, NodeEvent)>, RunEnd> {
    let mut early = Vec::new();
    let all = async {
        while remotes.iter().any(|remote| !states.contains_key(&remote.id)) {
            match events.recv().await {
                Some((node, NodeEvent::Connected(state))) if !states.contains_key(&node) => {
                    states.insert(node, *state);
                }
                // What was told before the state is in the state.
                Some((node, event)) if states.contains_key(&node) => early.push((node, event)),
                Some(_) => {}
                None => return,
            }
        }
    };
    if tokio::time::timeout(FIRST_STATE, all).await.is_ok() {
        return Ok(early);
    }
    let silent = remotes.iter().filter(|remote| !states.contains_key(&remote.id));
    let silent: Vec<String> = silent.map(|remote| remote.hello.name()).collect();
    let reason = format!("{}: did not report its state within {FIRST_STATE:?}", silent.join(", "));
    Err(RunEnd::new(exit_code::TIMEOUT, reason))
}

/// What status says about the node that is asked.
pub(super) fn here(own: &NodeHello, address: Option<IpAddr>) -> NodeStatus {
    NodeStatus {
        start_rank: own.start_rank,
        size_local: own.size_local,
        host: own.host.clone(),
        address: address.map(|address| address.to_string()),
        link: "here".to_owned(),
        ..NodeStatus::default()
    }
}

/// What status says about the nodes.
pub(super) fn status(own: &NodeHello, leader: &Leader, remotes: &[Remote]) -> Vec<NodeStatus> {
    let mut nodes = vec![here(own, leader.own_address())];
    for view in leader.claims() {
        let remote = remotes.iter().find(|r| r.hello.start_rank == view.hello.start_rank);
        let link = remote.map(|remote| remote.status.borrow().clone());
        let up = view.alive && link.as_ref().is_none_or(|link| link.connected);
        nodes.push(NodeStatus {
            start_rank: view.hello.start_rank,
            size_local: view.hello.size_local,
            host: view.hello.host,
            address: Some(view.hello.address.unwrap_or_else(|| view.peer.ip()).to_string()),
            link: if up { "up" } else { "down" }.to_owned(),
            since_s: Some(view.since.elapsed().as_secs()),
            rtt_us: link
                .as_ref()
                .and_then(|link| link.rtt)
                .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            detail: link.and_then(|link| link.detail).filter(|_| !up),
        });
    }
    nodes
}

/// All that is known about the nodes of a leader.
#[derive(Clone, Debug)]
pub(super) struct Gathered {
    pub(super) own: NodeHello,
    pub(super) leader: Leader,
    pub(super) remotes: Arc<Vec<Remote>>,
}

impl Gathered {
    /// Tells all followers that the deployment stops, at the same time.
    pub(super) async fn shutdown(&self) {
        futures::future::join_all(self.remotes.iter().map(Remote::shutdown)).await;
        debug!("followers told");
    }
}
