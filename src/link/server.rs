//! The serving side of a link: hands commands to the tasks behind it, and tells what happens there.
//!
//! One connection at a time, the newest one wins. Commands run at the same time, but those for one rank (or for
//! the engine-facing sockets, the processes ...) reach its queue in the order in which they came. No task
//! behind the link ever waits for who is connected: what can be spared is left out for a connection that is behind,
//! and one that does not take the rest is given up. What the next one has missed is in the [`NodeState`] that it asks
//! for first.
//!
//! A control call of a frontend that waits for a decision is refused when nobody has been connected for
//! [`HELD_GRACE`], or when another process connects than the one that was told.

mod held;
mod task;

use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::Keepalive;
use super::codec::LinkStream;
use crate::driver::edge::EdgeState;
use crate::driver::handles::{
    EdgeHandle, Envelope, Handle, HandleError, HandshakeHandle, LinkAsk, NodeAsk, NodeEvent, NodeState,
    ProcessHandle, RankHandle, StageHandle, StageRequest,
};

/// How long control calls wait for somebody to connect.
pub const HELD_GRACE: Duration = Duration::from_secs(2);
/// Between two snapshots of a rank whose life and admission have not changed.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(50);
/// Room for events in the queue of a node.
pub const EVENTS: usize = 1024;

/// What a link's serving side hands commands to. One for something that is absent is answered with an error.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// Rank tasks (or another link's handles of them).
    pub ranks: Vec<RankHandle>,
    /// Engine-facing sockets of the DP coordinator.
    pub edge: Option<EdgeHandle>,
    /// What the edge task itself knows of waves and subscriptions, if it runs in this process.
    pub edge_state: Option<watch::Receiver<EdgeState>>,
    /// Handshake listeners.
    pub handshake: Option<HandshakeHandle>,
    /// Processes of engines.
    pub processes: Option<ProcessHandle>,
    /// Staging area.
    pub stage: Option<StageHandle>,
}

impl Services {
    fn rank(&self, rank: EngineIndex) -> Option<&RankHandle> {
        self.ranks.iter().find(|handle| handle.rank == rank)
    }

    /// Puts a command into its task's queue.
    fn submit(&self, Envelope { ask, limit, reply }: Envelope<NodeAsk>) -> Result<(), HandleError> {
        match ask {
            NodeAsk::Rank(rank, ask) => {
                let handle = self.rank(rank).map(|handle| &handle.commands);
                offer(handle, Envelope { ask, limit, reply }, &format!("DP rank {rank} is not on this node"))
            }
            NodeAsk::Edge(ask) => {
                let absent = "coordinator sockets are not served here";
                offer(self.edge.as_ref(), Envelope { ask, limit, reply }, absent)
            }
            NodeAsk::Handshake(ask) => {
                let absent = "handshake listeners are not served here";
                offer(self.handshake.as_ref(), Envelope { ask, limit, reply }, absent)
            }
            NodeAsk::Process(ask) => {
                let absent = "processes of engines are not served here";
                offer(self.processes.as_ref(), Envelope { ask, limit, reply }, absent)
            }
            NodeAsk::Stage(ask) => {
                let absent = "a staging area is not served here";
                offer(self.stage.as_ref(), Envelope { ask, limit, reply }, absent)
            }
            // The staging area's part of the state; the server adds the rest.
            NodeAsk::Link(LinkAsk::GetState(_)) if self.stage.is_some() => {
                offer(self.stage.as_ref(), Envelope { ask: StageRequest::State, limit, reply }, "")
            }
            NodeAsk::Link(LinkAsk::GetState(_) | LinkAsk::Shutdown(_)) => {
                reply.send::<crate::driver::handles::Shutdown>(Ok(()));
                Ok(())
            }
        }
    }
}

fn offer<C>(handle: Option<&Handle<C>>, envelope: Envelope<C>, absent: &str) -> Result<(), HandleError> {
    match handle {
        Some(handle) => handle.offer(envelope).map_err(|(_, error)| error),
        None => Err(HandleError::failed(absent)),
    }
}

/// How a link's serving side is set up.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Names this side in errors: `the relay process`, `node 1`.
    pub name: String,
    /// When the link is looked after.
    pub keepalive: Keepalive,
    /// How long control calls wait for somebody to connect.
    pub held_grace: Duration,
    /// What is known at the start, from a predecessor.
    pub initial: NodeState,
    /// Joins the tasks.
    pub tracker: TaskTracker,
    /// Ends the server.
    pub stop: CancellationToken,
}

impl ServerOptions {
    pub fn new(name: impl Into<String>, tracker: TaskTracker, stop: CancellationToken) -> Self {
        Self {
            name: name.into(),
            keepalive: Keepalive::default(),
            held_grace: HELD_GRACE,
            initial: NodeState::default(),
            tracker,
            stop,
        }
    }
}

/// Why a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeEnd {
    /// [`Shutdown`](crate::driver::handles::Shutdown) came, and was answered.
    Shutdown,
    /// [`ServerOptions::stop`] was cancelled.
    Stopped,
}

/// Serves one connection after the other until told to end. `events` are what the tasks behind it report, or the
/// client of another link that is passed on, whose state becomes what this side knows.
pub async fn serve(
    options: ServerOptions,
    streams: mpsc::Receiver<LinkStream>,
    services: Services,
    events: mpsc::Receiver<NodeEvent>,
) -> ServeEnd {
    task::Task::new(options, services).run(streams, events).await
}
