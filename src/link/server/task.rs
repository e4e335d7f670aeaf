//! The loop of a link's serving side.

mod requests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use super::held::Held;
use super::known::Known;
use super::lanes::Lanes;
use super::sources::{Happened, Happenings, merge};
use super::{SNAPSHOT_INTERVAL, ServeEnd, ServerOptions, Services, Sources};
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeCommand, EdgeEvent, Expectation, HandleError, HandshakeCommand, HeldCall, OpenRoute, ProcessCommand,
    RankCommand, RankSnapshot, RouteLost, StageCommand, StageEvent, StageRequest, StageState, Verdict,
};
use crate::link::codec::{LinkError, LinkStream, Wire, encode};
use crate::link::is_wave_edge;
use crate::link::wire::{Answer, Down, Event, LINK_VERSION, Request, Up};

/// Requests that run at the same time.
const MAX_RUNNING: usize = 2048;
/// Frames waiting to be written before what can be spared is dropped.
const SPARE: usize = 256;
/// Frames waiting to be written before the connection is given up.
const FULL: usize = 4096;
/// Losses of routes waiting.
const LOSSES: usize = 256;
/// Answers that are kept for an asker that reconnects: so many, of so many bytes together.
const RECENT: usize = 256;
const RECENT_BYTES: usize = 4 << 20;
/// For a task behind the link to answer. The asker's own limit is shorter as a rule.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// For the staging area, which may have to look through a directory.
const STAGE_LIMIT: Duration = Duration::from_secs(300);
/// For the staging area to tell its state.
const STATE_LIMIT: Duration = Duration::from_secs(2);
/// A released control call is answered by the engine; whoever asks has the deadline.
const RELEASE_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// On top of the limits that a request carries.
const MARGIN: Duration = Duration::from_secs(2);
/// For the last frames of a connection to get out.
const LAST_FLUSH: Duration = Duration::from_secs(1);

/// What else is to be done when a request was answered.
enum After {
    Nothing,
    Prepared(EngineIndex, Incarnation),
    Route(EngineIndex, FrontendId, u32),
    Spawned(EngineIndex, Incarnation),
    /// The staging area's part of the whole state is the answer.
    State,
}

struct Finished {
    session: Uuid,
    id: u64,
    after: After,
    result: Result<Answer, String>,
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
struct Told {
    incarnation: Incarnation,
    admitted: bool,
    admission_open: bool,
}

impl Told {
    const fn of(snapshot: &RankSnapshot) -> Self {
        Self {
            incarnation: snapshot.incarnation,
            admitted: snapshot.admitted,
            admission_open: snapshot.admission_open,
        }
    }
}

pub(super) struct Task {
    options: ServerOptions,
    services: Services,
    lanes: Lanes,
    known: Known,
    held: Held,
    losses: mpsc::Sender<RouteLost>,
    inbox: Option<mpsc::Receiver<RouteLost>>,
    connection: Option<Connection>,
    /// Since when nobody has been connected.
    alone_since: Instant,
    /// Who was connected last.
    session: Option<Uuid>,
    running: Running,
    running_ids: BTreeSet<(Uuid, u64)>,
    recent: VecDeque<(u64, Bytes)>,
    recent_bytes: usize,
    told: BTreeMap<EngineIndex, (Told, Instant)>,
    changed: BTreeSet<EngineIndex>,
    ending: bool,
}

impl Task {
    pub(super) fn new(options: ServerOptions, services: Services) -> Self {
        let (losses, inbox) = mpsc::channel(LOSSES);
        Self {
            lanes: Lanes::start(&services, &options.tracker),
            known: Known::new(options.initial.clone()),
            options,
            services,
            held: Held::default(),
            losses,
            inbox: Some(inbox),
            connection: None,
            alone_since: Instant::now(),
            session: None,
            running: Running::new(),
            running_ids: BTreeSet::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            told: BTreeMap::new(),
            changed: BTreeSet::new(),
            ending: false,
        }
    }

    pub(super) async fn run(mut self, mut streams: mpsc::Receiver<LinkStream>, sources: Sources) -> ServeEnd {
        let Some(losses) = self.inbox.take() else {
            return ServeEnd::Stopped;
        };
        let mut happenings: Happenings = merge(sources, losses, &self.services.ranks);
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
                message = receive(&mut self.connection) => {
                    let handled = match message {
                        Ok(message) => self.message(message),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = handled {
                        self.disconnected(&error);
                    }
                }
                Some(happened) = happenings.next() => self.happened(happened),
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
            tracing::info!(peer = old.wire.peer(), "its connection is replaced by a newer one");
            self.alone_since = Instant::now();
        }
        let wire = Wire::new(stream);
        self.connection = Some(Connection { wire, heard: Instant::now(), session: None });
    }

    fn disconnected(&mut self, error: &LinkError) {
        if self.connection.take().is_some() {
            tracing::info!(%error, "nobody is connected to the link any more");
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
        let dead = connection.map(|connection| connection.heard + self.options.tempo.dead);
        let listening = connection.is_some_and(|connection| connection.session.is_some());
        let held = (!listening && !self.held.is_empty()).then(|| self.alone_since + self.options.held_grace);
        let snapshot = self.changed.iter().filter(|_| listening).map(|rank| match self.told.get(rank) {
            Some((_, at)) => *at + SNAPSHOT_INTERVAL,
            None => Instant::now(),
        });
        dead.into_iter().chain(held).chain(snapshot).min()
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        if let Some(connection) = &self.connection
            && now - connection.heard >= self.options.tempo.dead
        {
            let error = LinkError::Silent { peer: connection.wire.peer(), limit: self.options.tempo.dead };
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
            if self.told.get(&rank).is_none_or(|(_, at)| now - *at >= SNAPSHOT_INTERVAL) {
                self.tell_snapshot(rank);
            }
        }
    }

    fn message(&mut self, message: Down) -> Result<(), LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        connection.heard = Instant::now();
        match (connection.session, message) {
            (None, Down::Hello { version: LINK_VERSION, session }) => {
                connection.session = Some(session);
                self.greeted(session);
                Ok(())
            }
            (_, Down::Hello { version, .. }) => {
                let peer = connection.wire.peer();
                // It learns our version, which is the last that it hears.
                self.push(&Up::Hello { version: LINK_VERSION });
                if let Some(mut refused) = self.connection.take() {
                    self.alone_since = Instant::now();
                    self.options.tracker.spawn(async move { refused.wire.finish(LAST_FLUSH).await });
                }
                Err(LinkError::Version { peer, theirs: version })
            }
            (None, _) => Err(LinkError::Unexpected {
                peer: connection.wire.peer(),
                expected: "a greeting",
                got: "another message",
            }),
            (Some(_), Down::Ping) => {
                self.push(&Up::Pong);
                Ok(())
            }
            (Some(session), Down::Request { id, request }) => {
                self.request(session, id, request);
                Ok(())
            }
        }
    }

    fn greeted(&mut self, session: Uuid) {
        self.push(&Up::Hello { version: LINK_VERSION });
        for call in self.held.connected(session) {
            self.refuse(call);
        }
        if self.session.replace(session) != Some(session) {
            self.recent.clear();
            self.recent_bytes = 0;
        }
        for call in self.held.tell(session) {
            self.event(Event::Held(call));
        }
        self.told.clear();
        self.changed = self.services.ranks.iter().map(|handle| handle.rank).collect();
    }

    fn push(&mut self, message: &Up) {
        match encode(message) {
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
    fn event(&mut self, event: Event) {
        let Some((connection, _)) = self.listener() else {
            return;
        };
        let waiting = connection.wire.waiting();
        if waiting >= SPARE && can_be_spared(&event) {
            return;
        }
        if waiting >= FULL {
            let error = LinkError::Overflow { peer: connection.wire.peer(), what: "events" };
            return self.disconnected(&error);
        }
        match encode(&Up::Event(event)) {
            Ok(frame) => connection.wire.push(frame),
            Err(error) => tracing::error!(error, "an event of the link"),
        }
    }

    fn happened(&mut self, happened: Happened) {
        match happened {
            Happened::Rank(event) => {
                self.known.rank_event(&event);
                self.event(Event::Rank(event));
            }
            Happened::Held(call) => self.hold(call),
            Happened::Wake(rank) => self.event(Event::Wake(rank)),
            Happened::Edge(event) => {
                self.known.edge_event(&event);
                self.event(Event::Edge(event));
            }
            Happened::Handshake(event) => {
                self.known.handshake_event(&event);
                self.event(Event::Handshake(event));
            }
            Happened::Process(event) => {
                self.known.process_event(&event);
                self.event(Event::Process(event));
            }
            Happened::Stage(event) => self.event(Event::Stage(event)),
            Happened::State(state) => self.known.replace(state),
            Happened::RouteLost(loss) => {
                self.known.route_lost(&loss);
                self.held.frontend_gone(loss.rank, loss.frontend);
                self.event(Event::RouteLost(loss));
            }
            Happened::Snapshot(rank) => self.snapshot(rank),
        }
    }

    fn hold(&mut self, call: HeldCall) {
        let listener = self.listener().map(|(_, session)| session);
        let too_late = listener.is_none() && self.alone_since.elapsed() >= self.options.held_grace;
        if too_late || !self.held.add(call.clone(), listener) {
            return self.refuse(call);
        }
        self.event(Event::Held(call));
    }

    fn refuse(&mut self, call: HeldCall) {
        let HeldCall { rank, ticket, method, .. } = call;
        let text = format!("{method}: the sidecar that decides about it is not there; try again");
        tracing::info!(%rank, ticket, "{text}");
        let (reply, _) = oneshot::channel();
        let release = RankCommand::Release { ticket, verdict: Verdict::Refuse(text), reply };
        if let Err(error) = self.lanes.rank(rank, release) {
            tracing::warn!(error, "a control call could not be refused");
        }
    }

    fn snapshot(&mut self, rank: EngineIndex) {
        let Some(handle) = self.services.ranks.iter().find(|handle| handle.rank == rank) else {
            return;
        };
        let now = Told::of(&handle.snapshot.borrow());
        self.changed.insert(rank);
        if self.told.get(&rank).is_none_or(|(told, _)| *told != now) {
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
        let told = Told::of(&snapshot);
        let urgent = self.told.get(&rank).is_none_or(|(last, _)| *last != told);
        if full && !urgent {
            // Later, in a newer version.
            if let Some((_, at)) = self.told.get_mut(&rank) {
                *at = Instant::now();
            }
            return;
        }
        self.changed.remove(&rank);
        self.told.insert(rank, (told, Instant::now()));
        self.event(Event::Snapshot(RankSnapshot { rank, ..snapshot }));
    }

    // === requests ===
}

/// How to ask a task behind the link.
struct Ask {
    session: Uuid,
    id: u64,
    limit: Duration,
    after: After,
}

enum Begun {
    /// Answered at once.
    Done(Answer),
    /// Answered later.
    Runs,
}

fn done((): ()) -> Answer {
    Answer::Done
}

fn slot(slot: Slot) -> Answer {
    Answer::Slot(slot.0)
}

/// What is soon told again, or matters only at once.
fn can_be_spared(event: &Event) -> bool {
    match event {
        Event::Wake(_) | Event::Snapshot(_) | Event::Stage(StageEvent::Progress { .. }) => true,
        Event::Edge(EdgeEvent::Report { frame, .. }) => !is_wave_edge(frame),
        _ => false,
    }
}

/// The next message; waits for ever while there is no connection.
async fn receive(connection: &mut Option<Connection>) -> Result<Down, LinkError> {
    match connection {
        Some(connection) => connection.wire.next().await,
        None => std::future::pending().await,
    }
}
