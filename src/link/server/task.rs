//! The loop of a link's serving side.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use futures::stream::{self, FuturesUnordered, SelectAll, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use super::held::Held;
use super::{SNAPSHOT_INTERVAL, ServeEnd, ServerOptions, Services};
use crate::driver::handles::{
    CloseRoutes, Envelope, HandleError, HeldCall, LinkAsk, Memory, NodeAsk, NodeEvent, NodeState, RankAsk,
    RankSnapshot, Release, ReplyTo, StageState, Verdict, decode, encode,
};
use crate::link::codec::{Fault, LinkError, LinkStream, Wire, frame};
use crate::link::mutation::{self, Mutation};
use crate::link::wire::{FromNode, LINK_VERSION, ToNode};

/// Commands that run at the same time.
const MAX_RUNNING: usize = 2048;
/// Frames waiting to be written before what can be spared is dropped.
const SPARE: usize = 256;
/// Frames waiting to be written before the connection is given up.
const FULL: usize = 4096;
/// Answers that are kept for an asker that reconnects: so many, of so many bytes together.
const RECENT: usize = 256;
const RECENT_BYTES: usize = 4 << 20;
/// For the staging area to tell its state.
const STATE_LIMIT: Duration = Duration::from_secs(2);
/// On top of the limit that a command has.
const MARGIN: Duration = Duration::from_secs(2);
/// For the last frames of a connection to get out.
const LAST_FLUSH: Duration = Duration::from_secs(1);

struct Finished {
    session: Uuid,
    id: u64,
    ask: NodeAsk,
    result: Result<Bytes, HandleError>,
}

type Running = FuturesUnordered<Pin<Box<dyn Future<Output = Finished> + Send>>>;

struct Connection {
    wire: Wire,
    heard: Instant,
    /// Who is at the other end, once it has said so.
    session: Option<Uuid>,
}

/// The last snapshot of a rank that was told.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Reported {
    incarnation: Incarnation,
    admitted: bool,
    admission_open: bool,
    memory: Memory,
}

impl Reported {
    const fn of(snapshot: &RankSnapshot) -> Self {
        Self {
            incarnation: snapshot.incarnation,
            admitted: snapshot.admitted,
            admission_open: snapshot.admission_open,
            memory: snapshot.memory,
        }
    }
}

pub(super) struct Task {
    options: ServerOptions,
    services: Services,
    known: NodeState,
    held: Held,
    connection: Option<Connection>,
    /// Since when nobody has been connected.
    alone_since: Instant,
    /// Who was connected last.
    session: Option<Uuid>,
    running: Running,
    running_ids: BTreeSet<(Uuid, u64)>,
    recent: VecDeque<(u64, Bytes)>,
    recent_bytes: usize,
    reported: BTreeMap<EngineIndex, (Reported, Instant)>,
    changed: BTreeSet<EngineIndex>,
    ending: bool,
}

impl Task {
    pub(super) fn new(options: ServerOptions, services: Services) -> Self {
        Self {
            known: options.initial.clone(),
            options,
            services,
            held: Held::default(),
            connection: None,
            alone_since: Instant::now(),
            session: None,
            running: Running::new(),
            running_ids: BTreeSet::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            reported: BTreeMap::new(),
            changed: BTreeSet::new(),
            ending: false,
        }
    }

    pub(super) async fn run(
        mut self,
        mut streams: mpsc::Receiver<LinkStream>,
        mut events: mpsc::Receiver<NodeEvent>,
    ) -> ServeEnd {
        let mut snapshots = self.snapshots();
        let stop = self.options.stop.clone();
        let mut streams_open = true;
        let end = loop {
            if self.ending {
                break ServeEnd::Shutdown;
            }
            let due = self.due();
            tokio::select! {
                // An answer goes out before the loss of the route that it is about.
                biased;
                () = stop.cancelled() => break ServeEnd::Stopped,
                Some(finished) = self.running.next(), if !self.running.is_empty() => self.finished(finished),
                stream = streams.recv(), if streams_open => match stream {
                    Some(stream) => self.connected(stream),
                    None => streams_open = false,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.timeout(),
                message = Wire::next_of(self.connection.as_mut().map(|of| &mut of.wire)) => {
                    if let Err(error) = message.and_then(|message| self.message(message)) {
                        self.disconnected(&error);
                    }
                }
                Some(event) = events.recv() => self.happened(event),
                Some(rank) = snapshots.next() => self.snapshot(rank),
            }
        };
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.wire.finish(LAST_FLUSH).await
        {
            tracing::debug!(%error, "the last messages of a link");
        }
        end
    }

    // === connections ===

    fn connected(&mut self, stream: LinkStream) {
        tracing::debug!(peer = stream.peer(), "connection for the link");
        if let Some(old) = self.connection.take() {
            tracing::info!(peer = old.wire.peer(), "its connection was replaced by a newer one");
            self.alone_since = Instant::now();
        }
        let wire = Wire::new(stream);
        self.connection = Some(Connection { wire, heard: Instant::now(), session: None });
    }

    fn disconnected(&mut self, error: &LinkError) {
        if self.connection.take().is_some() {
            tracing::info!(%error, "no connection to the link is left");
            self.alone_since = Instant::now();
        }
    }

    /// The one who is connected and has introduced itself.
    fn listener(&mut self) -> Option<(&mut Connection, Uuid)> {
        let connection = self.connection.as_mut()?;
        let session = connection.session?;
        Some((connection, session))
    }

    fn due(&self) -> Option<Instant> {
        let connection = self.connection.as_ref();
        let dead = connection.map(|connection| connection.heard + self.options.keepalive.dead);
        let listening = connection.is_some_and(|connection| connection.session.is_some());
        let held = (!listening && !self.held.is_empty()).then(|| self.alone_since + self.options.held_grace);
        let snapshot = self.changed.iter().filter(|_| listening).map(|rank| match self.reported.get(rank) {
            Some((_, at)) => *at + SNAPSHOT_INTERVAL,
            None => Instant::now(),
        });
        dead.into_iter().chain(held).chain(snapshot).min()
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        if let Some(connection) = &self.connection
            && now - connection.heard >= self.options.keepalive.dead
        {
            let error = connection.wire.error(Fault::Silent(self.options.keepalive.dead));
            self.disconnected(&error);
        }
        if self.listener().is_none() {
            if now - self.alone_since >= self.options.held_grace {
                for call in self.held.take() {
                    self.refuse(call);
                }
            }
            return;
        }
        for rank in self.changed.clone() {
            if self.reported.get(&rank).is_none_or(|(_, at)| now - *at >= SNAPSHOT_INTERVAL) {
                self.tell_snapshot(rank);
            }
        }
    }

    fn message(&mut self, message: ToNode) -> Result<(), LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        connection.heard = Instant::now();
        match (connection.session, message) {
            (None, ToNode::Hello { version: LINK_VERSION, session }) => {
                connection.session = Some(session);
                self.greeted(session);
                Ok(())
            }
            (_, ToNode::Hello { version, .. }) => {
                let error = connection.wire.error(Fault::Version(version));
                // It learns our version, which is the last that it hears.
                self.push(&FromNode::Hello { version: LINK_VERSION });
                if let Some(mut refused) = self.connection.take() {
                    self.alone_since = Instant::now();
                    self.options.tracker.spawn(async move { refused.wire.finish(LAST_FLUSH).await });
                }
                Err(error)
            }
            (None, _) => {
                let fault = Fault::Unexpected { expected: "a greeting", got: "another message" };
                Err(connection.wire.error(fault))
            }
            (Some(_), ToNode::Ping) => {
                self.push(&FromNode::Pong);
                Ok(())
            }
            (Some(session), ToNode::Ask { id, ask }) => {
                self.asked(session, id, ask);
                Ok(())
            }
        }
    }

    fn greeted(&mut self, session: Uuid) {
        self.push(&FromNode::Hello { version: LINK_VERSION });
        for call in self.held.connected(session) {
            self.refuse(call);
        }
        if self.session.replace(session) != Some(session) {
            self.recent.clear();
            self.recent_bytes = 0;
        }
        for call in self.held.tell(session) {
            self.event(NodeEvent::Held(call));
        }
        self.reported.clear();
        self.changed = self.services.ranks.iter().map(|handle| handle.rank).collect();
    }

    fn push(&mut self, message: &FromNode) {
        match frame(message) {
            Ok(frame) => {
                if let Some(connection) = &mut self.connection {
                    connection.wire.push(frame);
                }
            }
            Err(error) => tracing::error!(error, "a message of the link"),
        }
    }

    // === events ===

    /// Tells whoever listens. What the state does not make up for costs a slow reader its connection.
    fn event(&mut self, event: NodeEvent) {
        let Some((connection, _)) = self.listener() else {
            return;
        };
        let waiting = connection.wire.waiting();
        if waiting >= SPARE && event.can_be_spared() {
            return;
        }
        if waiting >= FULL {
            let error = connection.wire.error(Fault::Overflow("events"));
            return self.disconnected(&error);
        }
        match frame(&FromNode::Event(event)) {
            Ok(frame) => connection.wire.push(frame),
            Err(error) => tracing::error!(error, "an event of the link"),
        }
    }

    fn happened(&mut self, event: NodeEvent) {
        if !(mutation::is(Mutation::KeepRoutes) && matches!(event, NodeEvent::RouteLost(_))) {
            self.known.apply_event(&event);
        }
        match event {
            NodeEvent::Held(call) => return self.hold(call),
            // What a link that is passed on has missed comes as events, its state is in ours.
            NodeEvent::Connected(_) | NodeEvent::Disconnected { .. } => return,
            NodeEvent::RouteLost(ref loss) => self.held.frontend_gone(loss.rank, loss.frontend),
            _ => {}
        }
        self.event(event);
    }

    /// Ranks whose snapshots change.
    fn snapshots(&self) -> SelectAll<Pin<Box<dyn Stream<Item = EngineIndex> + Send>>> {
        let changes = self.services.ranks.iter().map(|handle| {
            let changes =
                stream::unfold((handle.rank, handle.snapshot.clone()), |(rank, mut snapshot)| async move {
                    snapshot.changed().await.ok()?;
                    Some((rank, (rank, snapshot)))
                });
            Box::pin(changes) as Pin<Box<dyn Stream<Item = EngineIndex> + Send>>
        });
        changes.collect()
    }

    fn hold(&mut self, call: HeldCall) {
        let listener = self.listener().map(|(_, session)| session);
        let too_late = listener.is_none() && self.alone_since.elapsed() >= self.options.held_grace;
        if too_late || !self.held.add(call.clone(), listener) {
            return self.refuse(call);
        }
        self.event(NodeEvent::Held(call));
    }

    fn refuse(&mut self, call: HeldCall) {
        let HeldCall { rank, ticket, method, .. } = call;
        let text = format!("{method}: the sidecar that decides it is not connected; try again");
        tracing::info!(%rank, ticket, "{text}");
        self.tell(rank, Release { ticket, verdict: Verdict::Refuse(text) }.into());
    }

    fn snapshot(&mut self, rank: EngineIndex) {
        let Some(handle) = self.services.ranks.iter().find(|handle| handle.rank == rank) else {
            return;
        };
        let now = Reported::of(&handle.snapshot.borrow());
        self.changed.insert(rank);
        if self.reported.get(&rank).is_none_or(|(told, _)| *told != now) {
            self.tell_snapshot(rank);
        }
    }

    fn tell_snapshot(&mut self, rank: EngineIndex) {
        let Some((connection, _)) = self.listener() else {
            return;
        };
        let full = connection.wire.waiting() >= SPARE;
        let handle = self.services.ranks.iter().find(|handle| handle.rank == rank);
        let Some(snapshot) = handle.map(|handle| handle.snapshot.borrow().clone()) else {
            return;
        };
        let told = Reported::of(&snapshot);
        let urgent = self.reported.get(&rank).is_none_or(|(last, _)| *last != told);
        if full && !urgent {
            // Later, in a newer version.
            if let Some((_, at)) = self.reported.get_mut(&rank) {
                *at = Instant::now();
            }
            return;
        }
        self.changed.remove(&rank);
        self.reported.insert(rank, (told, Instant::now()));
        self.event(NodeEvent::Snapshot(RankSnapshot { rank, ..snapshot }));
    }

    // === commands ===

    /// Asks a rank for something on our own account.
    fn tell(&self, rank: EngineIndex, ask: RankAsk) {
        let limit = ask.about().limit;
        let envelope = Envelope { ask: NodeAsk::Rank(rank, ask), limit, reply: ReplyTo::NOWHERE };
        if let Err(error) = self.services.submit(envelope) {
            tracing::warn!(%rank, %error, "a rank was not told");
        }
    }

    fn asked(&mut self, session: Uuid, id: u64, ask: NodeAsk) {
        // Asked again after a reconnect.
        if self.running_ids.contains(&(session, id)) && !mutation::is(Mutation::ForgetRunning) {
            return;
        }
        if let Some((_, frame)) = self.recent.iter().find(|(of, _)| *of == id) {
            let frame = frame.clone();
            if let Some(connection) = &mut self.connection {
                connection.wire.push(frame);
            }
            return;
        }
        let about = ask.about();
        tracing::trace!(id, what = about.name, "command");
        let limit = match &ask {
            NodeAsk::Link(LinkAsk::GetState(_)) => STATE_LIMIT,
            _ => about.limit.saturating_add(MARGIN),
        };
        let (reply, answered) = ReplyTo::channel();
        let submitted = if self.running.len() < MAX_RUNNING {
            self.services.submit(Envelope { ask: ask.clone(), limit, reply })
        } else {
            Err(HandleError::failed(format!("{MAX_RUNNING} commands run already")))
        };
        if let Err(error) = submitted {
            let error = HandleError::failed(format!("{}: {}: {error}", self.options.name, about.name));
            return self.respond(session, id, &ask, Err(error));
        }
        self.known.apply_ask(&ask);
        match &ask {
            NodeAsk::Rank(rank, RankAsk::CloseRoutes(close)) => {
                self.held.frontend_gone(*rank, close.frontend)
            }
            NodeAsk::Rank(rank, RankAsk::Release(release)) => self.held.released(*rank, release.ticket),
            _ => {}
        }
        self.running_ids.insert((session, id));
        self.running.push(Box::pin(async move {
            let result = match timeout(limit, answered).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(HandleError::failed("the task that should do it has ended")),
                Err(_) => Err(HandleError::failed(format!("no answer within {limit:?}"))),
            };
            Finished { session, id, ask, result }
        }));
    }

    fn finished(&mut self, finished: Finished) {
        let Finished { session, id, ask, result } = finished;
        self.running_ids.remove(&(session, id));
        if let (NodeAsk::Rank(rank, RankAsk::OpenRoute(route)), Ok(_)) = (&ask, &result)
            && self.session != Some(session)
        {
            // Who asked for it is dead: nobody would ever use it.
            let close = CloseRoutes { frontend: route.frontend, orphaned: true };
            return self.tell(*rank, close.into());
        }
        self.known.apply_answer(&ask, result.as_ref());
        let result = match ask {
            NodeAsk::Link(LinkAsk::GetState(_)) => {
                let stage = result.ok().filter(|_| self.services.stage.is_some());
                let stage = stage.and_then(|stage| decode::<StageState>(&stage).ok());
                encode(&self.state(stage)).map_err(HandleError::failed)
            }
            _ => result,
        };
        self.ending |= matches!(ask, NodeAsk::Link(LinkAsk::Shutdown(_)));
        self.respond(session, id, &ask, result);
    }

    /// Answers the asker, if it is still the one who is connected, and keeps the answer for it if it may have to
    /// ask again.
    fn respond(&mut self, session: Uuid, id: u64, ask: &NodeAsk, result: Result<Bytes, HandleError>) {
        if self.session != Some(session) {
            return;
        }
        let result = result.map_err(|error| error.to_string());
        let answer = frame(&FromNode::Answer { id, result }).or_else(|error| {
            frame(&FromNode::Answer { id, result: Err(format!("{}: {error}", self.options.name)) })
        });
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return tracing::error!(error, "an answer of the link"),
        };
        let forget = mutation::is(Mutation::ForgetAnswers);
        if !forget && !matches!(ask, NodeAsk::Link(LinkAsk::GetState(_))) {
            self.recent_bytes += answer.len();
            self.recent.push_back((id, answer.clone()));
            while self.recent.len() > RECENT || self.recent_bytes > RECENT_BYTES {
                let Some((_, dropped)) = self.recent.pop_front() else {
                    break;
                };
                self.recent_bytes -= dropped.len();
            }
        }
        if let Some((connection, _)) = self.listener() {
            connection.wire.push(answer);
        }
    }

    fn state(&self, stage: Option<StageState>) -> NodeState {
        let mut state = self.known.clone();
        for handle in &self.services.ranks {
            let known = state.ranks.entry(handle.rank).or_default();
            known.snapshot = RankSnapshot { rank: handle.rank, ..handle.snapshot.borrow().clone() };
        }
        if let Some(edge) = &self.services.edge_state {
            let edge = edge.borrow();
            state.wave = edge.wave.or(state.wave);
            for (rank, known) in &mut state.ranks {
                known.subscribed =
                    known.prepared.is_some() && edge.subscribed.get(rank).copied() == known.prepared;
            }
        }
        state.stage = stage;
        state
    }
}
