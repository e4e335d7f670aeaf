//! The serving side of a link: hands requests to the tasks behind it, and tells what happens there.
//!
//! One connection at a time, the newest one wins. Requests run at the same time, but those for one rank (or for
//! the engine-facing sockets, the processes ...) reach its queue in the order in which they came. No task
//! behind the link ever waits for who is connected: events are kept in bounded queues; wakes are dropped when one
//! is full, and a connection that does not take the others is given up. What the next one has missed is in the
//! [`NodeState`] that it asks for first.
//!
//! A control call of a frontend that waits for a decision is refused when nobody has been connected for
//! [`HELD_GRACE`], or when another process connects than the one that was told.

mod held;
mod known;
mod lanes;
mod sources;
mod task;

use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{NodeSinks, Tempo};
use super::codec::LinkStream;
use crate::driver::edge::EdgeState;
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeEvent, EdgeHandle, HandshakeEvent, HandshakeHandle, HeldCall, Listen, ProcessEvent, ProcessHandle,
    RankEvent, RankHandle, RouteLost, StageEvent, StageHandle,
};

/// How long control calls wait for somebody to connect.
pub const HELD_GRACE: Duration = Duration::from_secs(2);
/// Between two snapshots of a rank whose life and admission have not changed.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(50);
/// Events waiting in each queue towards the server.
const EVENTS: usize = 256;

/// What a link's serving side hands requests to. A request for something that is absent is answered with an error.
#[derive(Clone, Debug)]
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

/// Where a link's serving side hears of what happens. Made by [`channels`].
#[derive(Debug)]
pub struct Sources {
    /// Of the rank tasks.
    pub ranks: mpsc::Receiver<RankEvent>,
    /// Control calls of frontends.
    pub held: mpsc::Receiver<HeldCall>,
    /// Requests went to lockstep engines.
    pub wakes: mpsc::Receiver<EngineIndex>,
    /// Of the engine-facing sockets of the DP coordinator.
    pub edge: mpsc::Receiver<EdgeEvent>,
    /// Of the handshake task.
    pub handshake: mpsc::Receiver<HandshakeEvent>,
    /// Of the processes.
    pub processes: mpsc::Receiver<ProcessEvent>,
    /// Of the staging area.
    pub stage: mpsc::Receiver<StageEvent>,
    /// Losses of routes that were opened over a link that is passed on, before this process was there.
    pub routes: mpsc::Receiver<RouteLost>,
    /// Of a link that is passed on.
    pub states: mpsc::Receiver<NodeState>,
}

/// Queues towards a link's serving side: for the tasks that report, or for the client of another link that is
/// passed on (its `states` become what this side knows).
pub fn channels() -> (NodeSinks, Sources) {
    let (ranks, ranks_out) = mpsc::channel(EVENTS);
    let (held, held_out) = mpsc::channel(EVENTS);
    let (wakes, wakes_out) = mpsc::channel(EVENTS);
    let (edge, edge_out) = mpsc::channel(EVENTS);
    let (handshake, handshake_out) = mpsc::channel(EVENTS);
    let (processes, processes_out) = mpsc::channel(EVENTS);
    let (stage, stage_out) = mpsc::channel(EVENTS);
    let (routes, routes_out) = mpsc::channel(EVENTS);
    let (states, states_out) = mpsc::channel(EVENTS);
    let sinks = NodeSinks { ranks, held, wakes, edge, handshake, processes, stage, routes, states };
    let sources = Sources {
        ranks: ranks_out,
        held: held_out,
        wakes: wakes_out,
        edge: edge_out,
        handshake: handshake_out,
        processes: processes_out,
        stage: stage_out,
        routes: routes_out,
        states: states_out,
    };
    (sinks, sources)
}

/// How a link's serving side is set up.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Names this side in errors: `the relay process`, `node 1`.
    pub name: String,
    /// When the link is looked after.
    pub tempo: Tempo,
    /// How long control calls wait for somebody to connect.
    pub held_grace: Duration,
    /// Where engines of this node say HELLO.
    pub listen: Listen,
    /// What is known at the start, from a predecessor.
    pub initial: NodeState,
    /// Joins the tasks.
    pub tracker: TaskTracker,
    /// Ends the server.
    pub stop: CancellationToken,
}

impl ServerOptions {
    /// The defaults.
    pub fn new(name: impl Into<String>, tracker: TaskTracker, stop: CancellationToken) -> Self {
        Self {
            name: name.into(),
            tempo: Tempo::default(),
            held_grace: HELD_GRACE,
            listen: Listen::Own,
            initial: NodeState::default(),
            tracker,
            stop,
        }
    }
}

/// Why a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeEnd {
    /// [`super::wire::Request::Shutdown`] came, and was answered.
    Shutdown,
    /// [`ServerOptions::stop`] was cancelled.
    Stopped,
}

/// Serves one connection after the other until told to end.
pub async fn serve(
    options: ServerOptions,
    streams: mpsc::Receiver<LinkStream>,
    services: Services,
    sources: Sources,
) -> ServeEnd {
    task::Task::new(options, services).run(streams, sources).await
}
