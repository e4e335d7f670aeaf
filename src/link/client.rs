//! The asking side of a link: ordinary handles whose commands travel over whatever connection there is.
//!
//! One task sends what is asked and gives back what is answered, encoded as it is. While there is no connection,
//! commands wait or fail as their [`Delivery`](crate::driver::handles::Delivery) says. After each connection the state
//! of the other side is asked for first; what was missed in between (a lost engine or route, a registration, a wave
//! edge) is taken from it and reported as if it had come as an event.

mod task;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use futures::stream::{self, SelectAll, Stream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::codec::LinkStream;
use crate::driver::handles::{
    EdgeHandle, Envelope, Handle, HandshakeHandle, LinkAsk, NodeAsk, NodeEvent, NodeState, ProcessHandle,
    RankHandle, RankSnapshot, StageHandle, queue,
};
use crate::tasks::{Task, named};

/// When a link is looked after.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    /// A ping is sent when nothing else was for so long.
    pub ping: Duration,
    /// A connection on which nothing came for so long is given up: TCP may never tell.
    pub dead: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { ping: Duration::from_secs(1), dead: Duration::from_secs(5) }
    }
}

/// How a link's asking side is set up.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Who is at the other end, for errors: `the relay process`, `node 1`.
    pub name: String,
    /// The ranks there.
    pub ranks: Vec<EngineIndex>,
    /// What the other side must have been started for, see [`NodeState::about`]. None: anything.
    pub about: Option<String>,
    /// When the link is looked after.
    pub keepalive: Keepalive,
    /// Ends the task.
    pub stop: CancellationToken,
}

impl ClientOptions {
    pub fn new(name: impl Into<String>, ranks: Vec<EngineIndex>, stop: CancellationToken) -> Self {
        Self { name: name.into(), ranks, about: None, keepalive: Keepalive::default(), stop }
    }
}

/// What a client can be told about its other side.
#[derive(Debug)]
pub enum Link {
    /// A fresh connection to it. Replaces an earlier one.
    Stream(LinkStream),
    /// The process at the other end is dead, and what it had is gone: its engines' connections, the routes.
    Gone(String),
}

/// State of a link.
#[derive(Clone, Debug, Default)]
pub struct LinkStatus {
    /// There is a connection, and the other side's state is known.
    pub connected: bool,
    /// The state that the other side told when it was connected last.
    pub state: Option<Arc<NodeState>>,
    /// Connections that were tried or lost so far: whoever makes them waits for this to grow.
    pub lost: u64,
    /// Why the last one was lost.
    pub detail: Option<String>,
    /// The other side was started for something else than [`ClientOptions::about`].
    pub stranger: bool,
    /// Time from the last ping to its answer.
    pub rtt: Option<Duration>,
}

/// Handles of everything behind a link.
#[derive(Clone, Debug)]
pub struct NodeHandles {
    /// Its rank tasks.
    pub ranks: Vec<RankHandle>,
    /// Engine-facing sockets of the DP coordinator.
    pub edge: EdgeHandle,
    /// Its handshake listeners.
    pub handshake: HandshakeHandle,
    /// Its engines' processes.
    pub processes: ProcessHandle,
    /// Its staging area.
    pub stage: StageHandle,
    /// The link itself.
    pub link: Handle<LinkAsk>,
}

/// The queues of all handles. What comes from one of them keeps its order.
type Commands = SelectAll<Pin<Box<dyn Stream<Item = Envelope<NodeAsk>> + Send>>>;

fn handle<C: Send + 'static>(
    commands: &mut Commands,
    task: &'static str,
    wrap: impl Fn(C) -> NodeAsk + Send + 'static,
) -> Handle<C> {
    let (handle, inbox) = queue(task);
    commands.push(Box::pin(stream::unfold((inbox, wrap), |(mut inbox, wrap)| async move {
        let envelope: Envelope<C> = inbox.recv().await?;
        Some((envelope.map(&wrap), (inbox, wrap)))
    })));
    handle
}

/// Starts the client; what the other side reports goes to `events`. It ends when `stop` is cancelled, or with its
/// last handle.
pub fn spawn(
    options: ClientOptions,
    links: mpsc::Receiver<Link>,
    events: mpsc::Sender<NodeEvent>,
    tracker: &TaskTracker,
) -> (NodeHandles, watch::Receiver<LinkStatus>) {
    let mut commands = Commands::new();
    let mut snapshots = Vec::new();
    let ranks = options.ranks.iter().map(|&rank| {
        let (publish, snapshot) = watch::channel(RankSnapshot { rank, ..RankSnapshot::default() });
        snapshots.push((rank, publish));
        let wrap = move |ask| NodeAsk::Rank(rank, ask);
        RankHandle { rank, commands: handle(&mut commands, "rank", wrap), snapshot }
    });
    let handles = NodeHandles {
        ranks: ranks.collect(),
        edge: handle(&mut commands, "edge", NodeAsk::Edge),
        handshake: handle(&mut commands, "handshake", NodeAsk::Handshake),
        processes: handle(&mut commands, "process", NodeAsk::Process),
        stage: handle(&mut commands, "staging", NodeAsk::Stage),
        link: handle(&mut commands, "link", NodeAsk::Link),
    };
    let (publish, status) = watch::channel(LinkStatus::default());
    tracker.spawn(named(
        Task::LinkClient,
        task::Task::new(options, events, snapshots, publish).run(links, commands),
    ));
    (handles, status)
}
