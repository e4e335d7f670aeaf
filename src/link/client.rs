//! The asking side of a link: ordinary handles whose commands travel over whatever connection there is.
//!
//! One task turns commands into requests and answers into replies. While nobody is connected, requests that may
//! be repeated wait up to their deadline and are sent, or sent again, after the next connection, in order;
//! the others ([`Request::OpenRoute`], [`Request::Release`], [`Request::Spawn`]) fail at once. After each
//! connection the state of the other side is asked for first; what was missed in between (a lost engine or route,
//! a registration, a wave edge) is taken from it and reported as if it had come as an event.
//!
//! [`Request::OpenRoute`]: super::wire::Request::OpenRoute
//! [`Request::Release`]: super::wire::Request::Release
//! [`Request::Spawn`]: super::wire::Request::Spawn

mod requests;
mod sinks;
mod task;

use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::codec::LinkStream;
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeEvent, EdgeHandle, HandleError, HandshakeEvent, HandshakeHandle, HeldCall, ProcessEvent,
    ProcessHandle, RankEvent, RankHandle, RankSnapshot, Reply, RouteLost, StageEvent, StageHandle, ask,
};

/// Commands waiting in each handle's queue.
const COMMANDS: usize = 64;

/// When a link is looked after.
#[derive(Clone, Copy, Debug)]
pub struct Tempo {
    /// A ping is sent when nothing else was for so long.
    pub ping: Duration,
    /// A connection on which nothing came for so long is given up: TCP may never tell.
    pub dead: Duration,
}

impl Default for Tempo {
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
    /// When the link is looked after.
    pub tempo: Tempo,
    /// Ends the task.
    pub stop: CancellationToken,
}

/// What a client can be told about its other side.
#[derive(Debug)]
pub enum Link {
    /// A fresh connection to it. Replaces an earlier one.
    Stream(LinkStream),
    /// The process at the other end is dead, and what it had is gone: its engines' connections, the routes.
    Gone(String),
}

/// Where a client reports what the other side tells. A sink whose receiver was dropped is left alone.
#[derive(Clone, Debug)]
pub struct NodeSinks {
    /// Of the rank tasks.
    pub ranks: mpsc::Sender<RankEvent>,
    /// Control calls of frontends. Those that nobody releases are refused when the link is lost.
    pub held: mpsc::Sender<HeldCall>,
    /// Requests went to lockstep engines. Dropped when full.
    pub wakes: mpsc::Sender<EngineIndex>,
    /// Of the engine-facing sockets of the DP coordinator.
    pub edge: mpsc::Sender<EdgeEvent>,
    /// Of the handshake task.
    pub handshake: mpsc::Sender<HandshakeEvent>,
    /// Of the processes.
    pub processes: mpsc::Sender<ProcessEvent>,
    /// Of the staging area.
    pub stage: mpsc::Sender<StageEvent>,
    /// Losses of routes that nobody on this side has opened or adopted: somebody behind another link may have.
    pub routes: mpsc::Sender<RouteLost>,
    /// Everything the other side knows, after each connection.
    pub states: mpsc::Sender<NodeState>,
}

/// State of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// There is a connection, and the other side's state is known.
    pub connected: bool,
    /// Connections that were tried or lost so far: whoever makes them waits for this to grow.
    pub lost: u64,
    /// Why the last one was lost.
    pub detail: Option<String>,
    /// Time from the last ping to its answer.
    pub rtt: Option<Duration>,
}

/// What can be asked of a link itself.
#[derive(Debug)]
pub enum LinkCommand {
    /// The state of the other side.
    State {
        /// All of it.
        reply: Reply<NodeState>,
    },
    /// The other side is to end everything, see [`super::wire::Request::Shutdown`].
    Shutdown {
        /// It has begun.
        reply: Reply<()>,
    },
}

/// Handle of the link itself.
#[derive(Clone, Debug)]
pub struct LinkHandle {
    /// Commands.
    pub commands: mpsc::Sender<LinkCommand>,
}

impl LinkHandle {
    /// The state of the other side.
    ///
    /// # Errors
    /// It is not there, or does not answer within `limit`.
    pub async fn state(&self, limit: Duration) -> Result<NodeState, HandleError> {
        ask(&self.commands, "link", "state".to_owned(), limit, |reply| LinkCommand::State { reply }).await
    }

    /// Tells the other side to end.
    ///
    /// # Errors
    /// It is not there, or does not answer within `limit`.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), HandleError> {
        ask(&self.commands, "link", "shutdown".to_owned(), limit, |reply| LinkCommand::Shutdown { reply })
            .await
    }
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
    pub link: LinkHandle,
}

/// Starts the client. It ends when `stop` is cancelled, or when nobody has a handle any more.
pub fn spawn(
    options: ClientOptions,
    links: mpsc::Receiver<Link>,
    sinks: NodeSinks,
    tracker: &TaskTracker,
) -> (NodeHandles, watch::Receiver<LinkStatus>) {
    let mut inputs = requests::Commands::new();
    let mut views = Vec::new();
    let ranks = options.ranks.iter().map(|&rank| {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        inputs.add(receiver, move |command| requests::Command::Rank(rank, command));
        let (publish, snapshot) = watch::channel(RankSnapshot { rank, ..RankSnapshot::default() });
        views.push((rank, publish));
        RankHandle { rank, commands, snapshot }
    });
    let ranks = ranks.collect();
    let (edge, receiver) = mpsc::channel(COMMANDS);
    inputs.add(receiver, requests::Command::Edge);
    let (handshake, receiver) = mpsc::channel(COMMANDS);
    inputs.add(receiver, requests::Command::Handshake);
    let (processes, receiver) = mpsc::channel(COMMANDS);
    inputs.add(receiver, requests::Command::Process);
    let (stage, receiver) = mpsc::channel(COMMANDS);
    inputs.add(receiver, requests::Command::Stage);
    let (link, receiver) = mpsc::channel(COMMANDS);
    inputs.add(receiver, requests::Command::Link);
    let (publish, status) = watch::channel(LinkStatus::default());
    let sinks = sinks::Sinks::start(sinks, tracker);
    tracker.spawn(task::Task::new(options, sinks, views, publish).run(links, inputs));
    let handles = NodeHandles {
        ranks,
        edge: EdgeHandle { commands: edge },
        handshake: HandshakeHandle { commands: handshake },
        processes: ProcessHandle { commands: processes },
        stage: StageHandle { commands: stage },
        link: LinkHandle { commands: link },
    };
    (handles, status)
}
