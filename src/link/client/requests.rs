//! From commands of handles to requests, and from answers to replies.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use dp_sidecar_protocol::{EngineIndex, FrontendId, Slot};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use tokio::sync::mpsc;

use super::LinkCommand;
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeCommand, HandleError, HandshakeCommand, ProcessCommand, RankCommand, Reply, RouteLost, SlotAddresses,
    StageCommand, StageRequest, StageState,
};
use crate::link::wire::{Answer, Request};

/// Longest wait for the answer of another process' task, and for a connection to send it on. The asker's own
/// limit is shorter as a rule.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// For a message that somebody acts on at once, or never.
const FLEETING_LIMIT: Duration = Duration::from_secs(10);
/// On top of the limits that a command carries.
const MARGIN: Duration = Duration::from_secs(5);

/// A command of one of the handles.
pub(super) enum Command {
    Rank(EngineIndex, RankCommand),
    Edge(EdgeCommand),
    Handshake(HandshakeCommand),
    Process(ProcessCommand),
    Stage(StageCommand),
    Link(LinkCommand),
}

/// The queues of all handles. What comes from one of them keeps its order.
pub(super) struct Commands(SelectAll<Pin<Box<dyn Stream<Item = Command> + Send>>>);

impl Commands {
    pub(super) fn new() -> Self {
        Self(SelectAll::new())
    }

    pub(super) fn add<T: Send + 'static>(
        &mut self,
        receiver: mpsc::Receiver<T>,
        command: impl Fn(T) -> Command + Send + 'static,
    ) {
        let receive = stream::unfold((receiver, command), |(mut receiver, command)| async move {
            let next = receiver.recv().await?;
            Some((command(next), (receiver, command)))
        });
        self.0.push(Box::pin(receive));
    }

    /// None: nobody has a handle any more.
    pub(super) async fn next(&mut self) -> Option<Command> {
        self.0.next().await
    }
}

/// Names a route of a node.
pub(super) type RouteKey = (EngineIndex, FrontendId, u32);

/// Who waits for an answer, and for what kind of answer.
pub(super) enum Waiter {
    /// Nobody: the command has no reply.
    Nobody,
    Done(Reply<()>),
    Addresses(Reply<SlotAddresses>),
    Coordinator(Reply<(String, String)>),
    Value(Reply<rmpv::Value>),
    Slot(Reply<Slot>),
    Address(Reply<SocketAddr>),
    Pid(Reply<u32>),
    Stage(Reply<StageState>),
    State(Reply<NodeState>),
    /// The client itself, after a connection.
    Client,
}

impl Waiter {
    /// The asker has given up.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Nobody | Self::Client => false,
            Self::Done(reply) => reply.is_closed(),
            Self::Addresses(reply) => reply.is_closed(),
            Self::Coordinator(reply) => reply.is_closed(),
            Self::Value(reply) => reply.is_closed(),
            Self::Slot(reply) => reply.is_closed(),
            Self::Address(reply) => reply.is_closed(),
            Self::Pid(reply) => reply.is_closed(),
            Self::Stage(reply) => reply.is_closed(),
            Self::State(reply) => reply.is_closed(),
        }
    }

    /// An asker that has gone does not want to know.
    pub(super) fn fail(self, error: HandleError) {
        match self {
            Self::Nobody | Self::Client => tracing::debug!(%error, "a request of the link failed"),
            Self::Done(reply) => drop(reply.send(Err(error))),
            Self::Addresses(reply) => drop(reply.send(Err(error))),
            Self::Coordinator(reply) => drop(reply.send(Err(error))),
            Self::Value(reply) => drop(reply.send(Err(error))),
            Self::Slot(reply) => drop(reply.send(Err(error))),
            Self::Address(reply) => drop(reply.send(Err(error))),
            Self::Pid(reply) => drop(reply.send(Err(error))),
            Self::Stage(reply) => drop(reply.send(Err(error))),
            Self::State(reply) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn answer(self, name: &str, result: Result<Answer, String>) {
        let answer = match result {
            Ok(answer) => answer,
            Err(error) => return self.fail(HandleError::failed(error)),
        };
        match (self, answer) {
            (Self::Nobody | Self::Client, _) => {}
            (Self::Done(reply), _) => drop(reply.send(Ok(()))),
            (Self::Addresses(reply), Answer::Addresses(value)) => drop(reply.send(Ok(value))),
            (Self::Coordinator(reply), Answer::Coordinator(input, output)) => {
                drop(reply.send(Ok((input, output))));
            }
            (Self::Value(reply), Answer::Value(value)) => drop(reply.send(Ok(value))),
            (Self::Slot(reply), Answer::Slot(slot)) => drop(reply.send(Ok(Slot(slot)))),
            (Self::Address(reply), Answer::Address(value)) => drop(reply.send(Ok(value))),
            (Self::Pid(reply), Answer::Pid(value)) => drop(reply.send(Ok(value))),
            (Self::Stage(reply), Answer::Stage(value)) => drop(reply.send(Ok(*value))),
            (Self::State(reply), Answer::State(value)) => drop(reply.send(Ok(*value))),
            (waiter, other) => {
                waiter.fail(HandleError::failed(format!("{name}: answered with {}", kind(&other))));
            }
        }
    }
}

const fn kind(answer: &Answer) -> &'static str {
    match answer {
        Answer::Done => "done",
        Answer::State(_) => "a state",
        Answer::Addresses(_) => "addresses of slots",
        Answer::Coordinator(..) => "addresses for INIT",
        Answer::Value(_) => "a value",
        Answer::Slot(_) => "a slot",
        Answer::Address(_) => "an address",
        Answer::Pid(_) => "a pid",
        Answer::Stage(_) => "a state of staging",
    }
}

/// A request and what belongs to it.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) waiter: Waiter,
    /// From now to the answer.
    pub(super) limit: Duration,
    /// The route that the request makes or adopts.
    pub(super) route: Option<(RouteKey, mpsc::Sender<RouteLost>)>,
}

impl Asked {
    fn new(request: Request, waiter: Waiter) -> Self {
        Self { request, waiter, limit: ANSWER_LIMIT, route: None }
    }

    /// A request of the client itself.
    pub(super) fn client(request: Request) -> Self {
        Self::new(request, Waiter::Client)
    }

    const fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// Whether a request may reach the other side twice.
pub(super) const fn is_idempotent(request: &Request) -> bool {
    match request {
        Request::OpenRoute { .. } | Request::Release { .. } | Request::Spawn { .. } => false,
        // An update that lacks a node fails now, and may be tried again; the node must only hear what was
        // committed. Adapters may be told again and again.
        Request::Stage(request) => matches!(
            request,
            StageRequest::Commit { .. }
                | StageRequest::TakeAdapter { .. }
                | StageRequest::AdapterPiece { .. }
                | StageRequest::KeepAdapters { .. }
        ),
        _ => true,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// None: it was answered here. A link does not end the tasks behind it one by one.
pub(super) fn translate(command: Command) -> Option<Asked> {
    match command {
        Command::Rank(rank, command) => rank_request(rank, command),
        Command::Edge(command) => Some(edge_request(command)),
        Command::Handshake(command) => handshake_request(command),
        Command::Process(ProcessCommand::Spawn { rank, incarnation, handshake, reply }) => {
            Some(Asked::new(Request::Spawn { rank, incarnation, handshake }, Waiter::Pid(reply)))
        }
        Command::Process(ProcessCommand::Stop { rank, reply }) => {
            Some(Asked::new(Request::StopEngine { rank }, Waiter::Done(reply)))
        }
        Command::Stage(StageCommand { request, reply }) => {
            Some(Asked::new(Request::Stage(request), Waiter::Stage(reply)))
        }
        Command::Link(LinkCommand::State { reply }) => Some(Asked::new(Request::State, Waiter::State(reply))),
        Command::Link(LinkCommand::Shutdown { reply }) => {
            Some(Asked::new(Request::Shutdown, Waiter::Done(reply)))
        }
    }
}

fn rank_request(rank: EngineIndex, command: RankCommand) -> Option<Asked> {
    let asked = match command {
        RankCommand::Prepare { incarnation, reply } => {
            Asked::new(Request::Prepare { rank, incarnation }, Waiter::Addresses(reply))
        }
        RankCommand::EngineReady { incarnation, facts } => {
            Asked::new(Request::EngineReady { rank, incarnation, facts: *facts }, Waiter::Nobody)
        }
        RankCommand::Admit { incarnation } => {
            Asked::new(Request::Admit { rank, incarnation }, Waiter::Nobody)
        }
        RankCommand::EngineDown { incarnation, reason } => {
            Asked::new(Request::EngineDown { rank, incarnation, reason }, Waiter::Nobody)
        }
        RankCommand::Admission { open, reply } => {
            Asked::new(Request::Admission { rank, open }, Waiter::Done(reply))
        }
        RankCommand::Call { key, method, args, timeout, reply } => {
            let request = Request::Call { rank, key, method, args, timeout_ms: millis(timeout) };
            Asked::new(request, Waiter::Value(reply)).within(timeout.saturating_add(MARGIN))
        }
        RankCommand::OpenRoute { route, reply } => {
            let request = Request::OpenRoute {
                rank,
                frontend: route.frontend,
                api_server: route.api_server,
                input_address: route.input_address,
                output_address: route.output_address,
                registration: route.registration,
                connect_timeout_ms: millis(route.connect_timeout),
            };
            let key = (rank, route.frontend, route.api_server);
            let limit = route.connect_timeout.saturating_add(MARGIN);
            let asked = Asked::new(request, Waiter::Slot(reply)).within(limit);
            Asked { route: Some((key, route.lost)), ..asked }
        }
        RankCommand::AdoptRoute { frontend, api_server, lost, reply } => {
            let request = Request::AdoptRoute { rank, frontend, api_server };
            let asked = Asked::new(request, Waiter::Slot(reply));
            Asked { route: Some(((rank, frontend, api_server), lost)), ..asked }
        }
        RankCommand::CloseRoutes { frontend, reply } => {
            Asked::new(Request::CloseRoutes { rank, frontend }, Waiter::Done(reply))
        }
        RankCommand::Release { ticket, verdict, reply } => {
            // A forwarded call is answered by the engine; whoever asks has the deadline.
            Asked::new(Request::Release { rank, ticket, verdict }, Waiter::Value(reply))
                .within(Duration::from_secs(24 * 3600))
        }
        RankCommand::Shutdown { reply } => {
            let _ = reply.send(Ok(()));
            return None;
        }
    };
    Some(asked)
}

fn edge_request(command: EdgeCommand) -> Asked {
    match command {
        EdgeCommand::Prepare { rank, incarnation, reply } => {
            Asked::new(Request::EdgePrepare { rank, incarnation }, Waiter::Coordinator(reply))
        }
        EdgeCommand::Publish { ranks, frames } => {
            Asked::new(Request::EdgePublish { ranks, frames }, Waiter::Nobody).within(FLEETING_LIMIT)
        }
        EdgeCommand::Note { wave, running } => {
            Asked::new(Request::EdgeNote { wave, running }, Waiter::Nobody)
        }
        EdgeCommand::Close { rank, incarnation } => {
            Asked::new(Request::EdgeClose { rank, incarnation }, Waiter::Nobody)
        }
    }
}

fn handshake_request(command: HandshakeCommand) -> Option<Asked> {
    match command {
        HandshakeCommand::Expect { expectation, reply } => {
            let request = Request::Expect {
                rank: expectation.rank,
                incarnation: expectation.incarnation,
                init: expectation.init,
            };
            Some(Asked::new(request, Waiter::Address(reply)))
        }
        HandshakeCommand::Forget { rank, incarnation } => {
            Some(Asked::new(Request::Forget { rank, incarnation }, Waiter::Nobody))
        }
        HandshakeCommand::Shutdown { reply } => {
            let _ = reply.send(Ok(()));
            None
        }
    }
}
