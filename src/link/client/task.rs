//! The loop of a link's client.

mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, Incarnation, Wave};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::requests::{Asked, Command, Commands, RouteKey, Waiter, is_idempotent, translate};
use super::sinks::{Full, Sinks};
use super::{ClientOptions, Link, LinkStatus};
use crate::driver::handles::{EdgeEvent, HandleError, RankEvent, RankSnapshot, RouteLost};
use crate::driver::handles::{NodeState, RankReport};
use crate::link::codec::{LinkError, LinkStream, Wire, encode};
use crate::link::is_wave_edge;
use crate::link::wire::{Answer, Down, Event, LINK_VERSION, Request, Up};

/// Requests without an answer. Askers wait when there are more.
const MAX_PENDING: usize = 1024;
/// Held calls that may be waiting for a decision.
const MAX_HELD: usize = 4096;
/// For the last frames to get out when the client ends.
const LAST_FLUSH: Duration = Duration::from_millis(500);
/// For somebody to take the loss of a route.
const LOSS_LIMIT: Duration = Duration::from_secs(10);

/// What becomes of a request when the process that should answer it is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It fails: what it is about is gone.
    Fail,
    /// It is done: what it should end has ended.
    Done,
    /// Its successor is asked.
    Keep,
}

const fn fate(request: &Request) -> Fate {
    match request {
        Request::Prepare { .. }
        | Request::EdgePrepare { .. }
        | Request::Admission { .. }
        | Request::Expect { .. }
        | Request::Stage(_)
        | Request::State => Fate::Keep,
        Request::CloseRoutes { .. }
        | Request::EngineDown { .. }
        | Request::EdgeClose { .. }
        | Request::Forget { .. }
        | Request::StopEngine { .. }
        | Request::EdgeNote { .. }
        | Request::Shutdown => Fate::Done,
        _ => Fate::Fail,
    }
}

struct Pending {
    frame: Bytes,
    waiter: Waiter,
    what: &'static str,
    idempotent: bool,
    fate: Fate,
    limit: Duration,
    until: Instant,
    /// The rank and the incarnation it prepares.
    prepares: Option<(EngineIndex, Incarnation)>,
    route: Option<RouteKey>,
    is_note: bool,
}

struct Connection {
    wire: Wire,
    heard: Instant,
    said: Instant,
    /// When the unanswered ping was sent.
    pinged: Option<Instant>,
    greeted: bool,
    /// The request whose answer makes this connection complete.
    state: u64,
}

/// What was told about a rank.
struct View {
    publish: watch::Sender<RankSnapshot>,
    /// The incarnation whose sockets are open over there.
    known: Option<Incarnation>,
    registered: bool,
    subscribed: bool,
    wave_report: Option<Bytes>,
}

impl View {
    fn forget(&mut self) {
        self.known = None;
        self.registered = false;
        self.subscribed = false;
        self.wave_report = None;
    }
}

struct Route {
    lost: mpsc::Sender<RouteLost>,
    /// The other side has said that it is open.
    open: bool,
}

pub(super) struct Task {
    options: ClientOptions,
    session: Uuid,
    sinks: Sinks,
    views: BTreeMap<EngineIndex, View>,
    publish: watch::Sender<LinkStatus>,
    connection: Option<Connection>,
    ever_connected: bool,
    pending: BTreeMap<u64, Pending>,
    next_id: u64,
    routes: BTreeMap<RouteKey, Route>,
    held: BTreeSet<(EngineIndex, u64)>,
    /// The wave as it was last noted: a new relay process is told.
    note: Option<(Wave, bool)>,
    reports: JoinSet<()>,
}

impl Task {
    pub(super) fn new(
        options: ClientOptions,
        sinks: Sinks,
        views: Vec<(EngineIndex, watch::Sender<RankSnapshot>)>,
        publish: watch::Sender<LinkStatus>,
    ) -> Self {
        let views = views.into_iter().map(|(rank, publish)| {
            let view = View { publish, known: None, registered: false, subscribed: false, wave_report: None };
            (rank, view)
        });
        Self {
            options,
            session: Uuid::new_v4(),
            sinks,
            views: views.collect(),
            publish,
            connection: None,
            ever_connected: false,
            pending: BTreeMap::new(),
            next_id: 0,
            routes: BTreeMap::new(),
            held: BTreeSet::new(),
            note: None,
            reports: JoinSet::new(),
        }
    }

    pub(super) async fn run(mut self, mut links: mpsc::Receiver<Link>, mut commands: Commands) {
        let stop = self.options.stop.clone();
        let mut tick = interval((self.options.tempo.ping / 4).max(Duration::from_millis(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut links_open = true;
        loop {
            let room = self.connection.is_none() || self.pending.len() < MAX_PENDING;
            tokio::select! {
                () = stop.cancelled() => break,
                link = links.recv(), if links_open => match link {
                    Some(Link::Stream(stream)) => self.connected(stream),
                    Some(Link::Gone(reason)) => self.gone(&reason),
                    None => links_open = false,
                },
                message = receive(&mut self.connection) => {
                    let handled = match message {
                        Ok(message) => self.message(message),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = handled {
                        self.disconnected(&error);
                    }
                }
                command = commands.next(), if room => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                Some(_) = self.reports.join_next() => {}
                _ = tick.tick() => self.tick(),
            }
        }
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.wire.finish(LAST_FLUSH).await
        {
            tracing::debug!(%error, "the last messages of a link");
        }
        self.reports.shutdown().await;
        for pending in std::mem::take(&mut self.pending).into_values() {
            pending.waiter.fail(HandleError::Gone { task: "link" });
        }
    }

    // === connections ===

    fn connected(&mut self, stream: LinkStream) {
        if self.connection.is_some() {
            let peer = stream.peer().to_owned();
            self.disconnected(&LinkError::Closed { peer });
        }
        let now = Instant::now();
        let mut wire = Wire::new(stream);
        let hello = Down::Hello { version: LINK_VERSION, session: self.session };
        match encode(&hello) {
            Ok(frame) => wire.push(frame),
            Err(error) => return tracing::error!(error, "greeting of a link"),
        }
        self.connection =
            Some(Connection { wire, heard: now, said: now, pinged: None, greeted: false, state: 0 });
        // First of all: events are worth something only to who knows the state. Then what was asked before.
        let earlier: Vec<Bytes> = self.pending.values().map(|pending| pending.frame.clone()).collect();
        let state = self.ask(Asked::client(Request::State));
        if let Some(connection) = &mut self.connection {
            connection.state = state.unwrap_or_default();
            for frame in earlier {
                connection.wire.push(frame);
            }
        }
    }

    fn disconnected(&mut self, error: &LinkError) {
        if self.connection.take().is_none() {
            return;
        }
        let was_connected = self.publish.borrow().connected;
        if was_connected {
            tracing::warn!(%error, "link lost");
        } else {
            tracing::debug!(%error, "link not made");
        }
        let name = self.options.name.clone();
        let failed = self.take_pending(|pending| !pending.idempotent || is_client(&pending.waiter));
        for pending in failed {
            let what = pending.what;
            self.fail(pending, HandleError::failed(format!("{name}: {what}: the connection was lost")));
        }
        self.publish.send_modify(|status| {
            status.connected = false;
            status.lost += 1;
            status.detail = Some(error.to_string());
        });
    }

    /// The process at the other end is dead.
    fn gone(&mut self, reason: &str) {
        let peer = self.options.name.clone();
        self.disconnected(&LinkError::Closed { peer });
        let ranks: Vec<EngineIndex> = self.views.keys().copied().collect();
        for rank in ranks {
            self.rank_gone(rank, reason);
        }
        self.held.clear();
        for (key, route) in std::mem::take(&mut self.routes) {
            if route.open {
                self.report_loss(key, route, reason);
            }
        }
        for pending in self.take_pending(|pending| pending.fate != Fate::Keep) {
            match pending.fate {
                Fate::Done => pending.waiter.answer(&self.options.name, Ok(Answer::Done)),
                Fate::Keep | Fate::Fail => self.fail(pending, HandleError::failed(reason)),
            }
        }
    }

    fn rank_gone(&mut self, rank: EngineIndex, reason: &str) {
        let Some(view) = self.views.get_mut(&rank) else {
            return;
        };
        let known = view.known;
        view.forget();
        view.publish.send_modify(|snapshot| {
            snapshot.admitted = false;
            snapshot.in_flight.clear();
            snapshot.held = 0;
            snapshot.slots = (0, 0, snapshot.slots.2);
        });
        if let Some(incarnation) = known {
            let lost = RankEvent::Lost { rank, incarnation, reason: reason.to_owned() };
            if let Err(Full(what)) = self.sinks.rank(lost) {
                tracing::error!(%rank, what, "nobody takes the loss of an engine");
            }
        }
    }

    fn take_pending(&mut self, wanted: impl Fn(&Pending) -> bool) -> Vec<Pending> {
        let all = std::mem::take(&mut self.pending);
        let (taken, left) = all.into_iter().partition(|(_, pending)| wanted(pending));
        self.pending = left;
        let taken: BTreeMap<u64, Pending> = taken;
        taken.into_values().collect()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let tempo = self.options.tempo;
        if let Some(connection) = &mut self.connection {
            if now - connection.heard >= tempo.dead {
                let error = LinkError::Silent { peer: connection.wire.peer(), limit: tempo.dead };
                self.disconnected(&error);
            } else if now - connection.said >= tempo.ping
                && connection.wire.waiting() == 0
                && let Ok(frame) = encode(&Down::Ping)
            {
                connection.said = now;
                connection.pinged.get_or_insert(now);
                connection.wire.push(frame);
            }
        }
        for pending in self.take_pending(|pending| pending.waiter.is_gone() || pending.until <= now) {
            let what = format!("{} of {}", pending.what, self.options.name);
            let limit = pending.limit;
            self.fail(pending, HandleError::Deadline { what, limit });
        }
    }

    // === requests ===

    fn command(&mut self, command: Command) {
        let Some(asked) = translate(command) else {
            return;
        };
        let name = &self.options.name;
        if self.connection.is_none() {
            let refused = if !is_idempotent(&asked.request) {
                Some(HandleError::failed(format!("{name}: not connected")))
            } else if self.pending.len() >= MAX_PENDING {
                Some(HandleError::failed(format!("{name}: not connected, and {MAX_PENDING} requests wait")))
            } else {
                None
            };
            if let Some(error) = refused {
                return asked.waiter.fail(error);
            }
        }
        self.ask(asked);
    }

    /// Keeps a request until it is answered, and sends it if there is a connection. Its number.
    fn ask(&mut self, asked: Asked) -> Option<u64> {
        self.next_id += 1;
        let id = self.next_id;
        let Asked { request, waiter, limit, route } = asked;
        self.requested(&request);
        let what = request.name();
        let (idempotent, fate) = (is_idempotent(&request), fate(&request));
        let prepares = match request {
            Request::Prepare { rank, incarnation } => Some((rank, incarnation)),
            _ => None,
        };
        let is_note = matches!(request, Request::EdgeNote { .. });
        let frame = match encode(&Down::Request { id, request }) {
            Ok(frame) => frame,
            Err(error) => {
                waiter.fail(HandleError::failed(format!("{}: {what}: {error}", self.options.name)));
                return None;
            }
        };
        let route = route.map(|(key, lost)| {
            self.routes.insert(key, Route { lost, open: false });
            key
        });
        if let Some(connection) = &mut self.connection {
            connection.said = Instant::now();
            connection.wire.push(frame.clone());
        } else if is_note {
            // Only the newest one counts.
            self.pending.retain(|_, earlier| !earlier.is_note);
        }
        let until = Instant::now() + limit;
        let pending =
            Pending { frame, waiter, what, idempotent, fate, limit, until, prepares, route, is_note };
        self.pending.insert(id, pending);
        Some(id)
    }

    /// Keeps in mind what a request changes over there.
    fn requested(&mut self, request: &Request) {
        match request {
            Request::Prepare { rank, incarnation } => {
                if let Some(view) = self.views.get_mut(rank)
                    && view.known != Some(*incarnation)
                {
                    view.forget();
                }
            }
            Request::EngineDown { rank, incarnation, .. } => {
                if let Some(view) = self.views.get_mut(rank)
                    && view.known == Some(*incarnation)
                {
                    view.forget();
                }
            }
            Request::CloseRoutes { rank, frontend } => {
                self.routes.retain(|(on, of, _), _| on != rank || of != frontend);
            }
            Request::Release { rank, ticket, .. } => {
                self.held.remove(&(*rank, *ticket));
            }
            Request::EdgeNote { wave, running } => self.note = Some((*wave, *running)),
            _ => {}
        }
    }

    fn fail(&mut self, pending: Pending, error: HandleError) {
        if let Some(key) = pending.route {
            self.routes.remove(&key);
        }
        pending.waiter.fail(error);
    }

    // === messages ===

    fn message(&mut self, message: Up) -> Result<(), LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        connection.heard = Instant::now();
        match message {
            Up::Hello { version: LINK_VERSION } => {
                connection.greeted = true;
                Ok(())
            }
            Up::Hello { version } => {
                Err(LinkError::Version { peer: connection.wire.peer(), theirs: version })
            }
            _ if !connection.greeted => Err(LinkError::Unexpected {
                peer: connection.wire.peer(),
                expected: "a greeting",
                got: "another message",
            }),
            Up::Pong => {
                if let Some(sent) = connection.pinged.take() {
                    self.publish.send_modify(|status| status.rtt = Some(sent.elapsed()));
                }
                Ok(())
            }
            Up::Answer { id, result } => {
                let is_state = connection.state == id;
                match result {
                    Ok(Answer::State(state)) if is_state => {
                        self.pending.remove(&id);
                        let applied = self.state(*state);
                        self.taken(applied)
                    }
                    Err(error) if is_state => {
                        tracing::warn!(error, "the state behind a link");
                        Err(LinkError::Unexpected {
                            peer: self.options.name.clone(),
                            expected: "its state",
                            got: "an error",
                        })
                    }
                    result => {
                        self.answered(id, result);
                        Ok(())
                    }
                }
            }
            Up::Event(event) => {
                let taken = self.event(event);
                self.taken(taken)
            }
        }
    }

    fn taken(&self, taken: Result<(), Full>) -> Result<(), LinkError> {
        taken.map_err(|Full(what)| LinkError::Overflow { peer: self.options.name.clone(), what })
    }

    fn answered(&mut self, id: u64, result: Result<Answer, String>) {
        // It may have run out of time.
        let Some(pending) = self.pending.remove(&id) else {
            return;
        };
        match (&result, pending.route) {
            (Ok(_), Some(key)) => {
                if let Some(route) = self.routes.get_mut(&key) {
                    route.open = true;
                }
            }
            (Err(_), Some(key)) => {
                self.routes.remove(&key);
            }
            (_, None) => {}
        }
        if let (Ok(_), Some((rank, incarnation))) = (&result, pending.prepares)
            && let Some(view) = self.views.get_mut(&rank)
        {
            view.known = Some(incarnation);
        }
        pending.waiter.answer(&self.options.name, result);
    }

    fn event(&mut self, event: Event) -> Result<(), Full> {
        match event {
            Event::Rank(event) => {
                match &event {
                    RankEvent::Registered { rank, incarnation, .. } => {
                        if let Some(view) = self.views.get_mut(rank) {
                            view.known = Some(*incarnation);
                            view.registered = true;
                        }
                    }
                    RankEvent::Lost { rank, incarnation, .. } => {
                        if let Some(view) = self.views.get_mut(rank)
                            && view.known == Some(*incarnation)
                        {
                            view.forget();
                        }
                    }
                }
                self.sinks.rank(event)
            }
            Event::Snapshot(snapshot) => {
                if let Some(view) = self.views.get(&snapshot.rank) {
                    view.publish.send_replace(snapshot);
                }
                Ok(())
            }
            Event::Held(call) => {
                // A call that was told before a reconnect is told again.
                if self.held.len() < MAX_HELD && self.held.insert((call.rank, call.ticket)) {
                    return self.sinks.held(call);
                }
                Ok(())
            }
            Event::Wake(rank) => {
                self.sinks.wake(rank);
                Ok(())
            }
            Event::RouteLost(loss) => {
                let key = (loss.rank, loss.frontend, loss.api_server);
                match self.routes.remove(&key) {
                    Some(route) => self.report_loss(key, route, &loss.reason),
                    None => return self.sinks.route_lost(loss),
                }
                Ok(())
            }
            Event::Edge(event) => {
                match &event {
                    EdgeEvent::Subscribed { rank, .. } => {
                        if let Some(view) = self.views.get_mut(rank) {
                            view.subscribed = true;
                        }
                    }
                    EdgeEvent::Report { rank, frame, .. } => {
                        if let Some(view) = self.views.get_mut(rank)
                            && is_wave_edge(frame)
                        {
                            view.wave_report = Some(frame.clone());
                        }
                    }
                }
                self.sinks.edge(event)
            }
            Event::Handshake(event) => self.sinks.handshake(event),
            Event::Process(event) => self.sinks.process(event),
            Event::Stage(event) => self.sinks.stage(event),
        }
    }
}

const fn is_client(waiter: &Waiter) -> bool {
    matches!(waiter, Waiter::Client)
}

/// The next message; waits for ever while there is no connection.
async fn receive(connection: &mut Option<Connection>) -> Result<Up, LinkError> {
    match connection {
        Some(connection) => connection.wire.next().await,
        None => std::future::pending().await,
    }
}
