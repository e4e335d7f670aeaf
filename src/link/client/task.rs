//! The loop of a link's client.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, Wave};
use futures::stream::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::{ClientOptions, Commands, Link, LinkStatus};
use crate::driver::handles::{
    About, Delivery, EdgeAsk, EdgeNote, Envelope, GetState, HandleError, LinkAsk, NodeAsk, NodeEvent,
    NodeState, RankAsk, RankEvent, RankSnapshot, ReplyTo, Slots, decode, encode,
};
use crate::link::codec::{Fault, LinkError, LinkStream, Wire, frame};
use crate::link::mutation::{self, Mutation};
use crate::link::wire::{FromNode, LINK_VERSION, ToNode};

/// Commands without an answer. Askers wait when there are more.
const MAX_PENDING: usize = 1024;
/// Held calls that may be waiting for a decision.
const MAX_HELD: usize = 4096;
/// Events that wait for their reader. One that is further behind costs the connection: the state of the next one
/// makes up for what is lost.
const MAX_EVENTS: usize = 1024;
/// For the last frames to get out when the client ends.
const LAST_FLUSH: Duration = Duration::from_millis(500);

/// A command without an answer.
struct Pending {
    ask: NodeAsk,
    about: About,
    reply: ReplyTo,
    limit: Duration,
    until: Instant,
    /// The client's own, about this connection.
    own: bool,
}

struct Connection {
    wire: Wire,
    heard: Instant,
    said: Instant,
    /// When the unanswered ping was sent.
    pinged: Option<Instant>,
    greeted: bool,
    /// The command whose answer makes this connection complete.
    state: u64,
}

pub(super) struct Task {
    options: ClientOptions,
    session: Uuid,
    events: mpsc::Sender<NodeEvent>,
    /// Events that the reader had no room for: it may itself be waiting for an answer of this task.
    outbox: VecDeque<NodeEvent>,
    /// What the other side has told, as [`NodeState`].
    view: NodeState,
    snapshots: BTreeMap<EngineIndex, watch::Sender<RankSnapshot>>,
    publish: watch::Sender<LinkStatus>,
    connection: Option<Connection>,
    pending: BTreeMap<u64, Pending>,
    next_id: u64,
    held: BTreeSet<(EngineIndex, u64)>,
    /// The wave as it was last noted: a new relay process is told.
    note: Option<(Wave, bool)>,
}

impl Task {
    pub(super) fn new(
        options: ClientOptions,
        events: mpsc::Sender<NodeEvent>,
        snapshots: Vec<(EngineIndex, watch::Sender<RankSnapshot>)>,
        publish: watch::Sender<LinkStatus>,
    ) -> Self {
        Self {
            options,
            session: Uuid::new_v4(),
            events,
            outbox: VecDeque::new(),
            view: NodeState::default(),
            snapshots: snapshots.into_iter().collect(),
            publish,
            connection: None,
            pending: BTreeMap::new(),
            next_id: 0,
            held: BTreeSet::new(),
            note: None,
        }
    }

    pub(super) async fn run(mut self, mut links: mpsc::Receiver<Link>, mut commands: Commands) {
        let stop = self.options.stop.clone();
        let events = self.events.clone();
        let mut tick = interval((self.options.keepalive.ping / 4).max(Duration::from_millis(1)));
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
                message = Wire::next_of(self.connection.as_mut().map(|of| &mut of.wire)) => {
                    if let Err(error) = message.and_then(|message| self.message(message)) {
                        self.disconnected(&error);
                    }
                }
                command = commands.next(), if room => match command {
                    Some(envelope) => self.command(envelope),
                    None => break,
                },
                permit = events.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    // Nobody wants to know.
                    _ => self.outbox.clear(),
                },
                _ = tick.tick() => self.tick(),
            }
        }
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.wire.finish(LAST_FLUSH).await
        {
            tracing::debug!(%error, "the last messages of a link");
        }
        for pending in std::mem::take(&mut self.pending).into_values() {
            pending.reply.forward(Err(HandleError::Gone { task: "link" }));
        }
    }

    // === connections ===

    fn connected(&mut self, stream: LinkStream) {
        if self.connection.is_some() {
            let peer = stream.peer().to_owned();
            self.disconnected(&LinkError { peer, fault: Fault::Closed });
        }
        let now = Instant::now();
        let mut wire = Wire::new(stream);
        let hello = ToNode::Hello { version: LINK_VERSION, session: self.session };
        match frame(&hello) {
            Ok(frame) => wire.push(frame),
            Err(error) => return tracing::error!(error, "greeting of a link"),
        }
        self.connection =
            Some(Connection { wire, heard: now, said: now, pinged: None, greeted: false, state: 0 });
        // First of all: events are worth something only to who knows the state. Then what was asked before.
        let mut earlier: Vec<u64> = self.pending.keys().copied().collect();
        if mutation::is(Mutation::SendBackwards) {
            earlier.reverse();
        } else if mutation::is(Mutation::LoseAnswers) {
            earlier.clear();
        }
        let state = self.own(NodeAsk::Link(LinkAsk::GetState(GetState {})));
        if let Some(connection) = &mut self.connection {
            connection.state = state;
        }
        for id in earlier {
            self.send(id);
        }
    }

    fn error(&self, fault: Fault) -> LinkError {
        LinkError { peer: self.options.name.clone(), fault }
    }

    fn disconnected(&mut self, error: &LinkError) {
        if self.connection.take().is_none() {
            return;
        }
        let was_connected = self.publish.borrow().connected;
        if was_connected {
            tracing::warn!(%error, "link lost");
            self.outbox.push_back(NodeEvent::Disconnected { reason: error.to_string() });
        } else {
            tracing::debug!(%error, "link not made");
        }
        let name = self.options.name.clone();
        let keep = mutation::is(Mutation::AskSuccessor);
        for pending in
            self.take_pending(|pending| pending.about.delivery == Delivery::Once && !keep || pending.own)
        {
            let error = format!("{name}: {}: the connection was lost", pending.about.name);
            self.fail(pending, HandleError::failed(error));
        }
        self.publish.send_modify(|status| {
            status.connected = false;
            status.lost += 1;
            status.detail = Some(error.to_string());
        });
    }

    /// The process at the other end is dead.
    fn gone(&mut self, reason: &str) {
        self.disconnected(&self.error(Fault::Closed));
        self.held.clear();
        for publish in self.snapshots.values() {
            publish.send_modify(|snapshot| {
                snapshot.admitted = false;
                snapshot.in_flight.clear();
                snapshot.held = 0;
                snapshot.slots = Slots { all: snapshot.slots.all, ..Slots::default() };
            });
        }
        let failed = |delivery| matches!(delivery, Delivery::Life | Delivery::Once);
        let keep = mutation::is(Mutation::AskSuccessor);
        // What was given up again, or whose engine has come to the dead process, must not be made by the successor.
        let is_over = |(id, pending): &(&u64, &Pending)| {
            self.view.is_begun(&pending.ask)
                || self.pending.range(*id..).any(|(_, later)| later.ask.ends(&pending.ask))
        };
        let over: Vec<u64> = self.pending.iter().filter(is_over).map(|(id, _)| *id).collect();
        let lost = self.view.gone(reason);
        for id in over {
            if let Some(pending) = self.pending.remove(&id) {
                self.fail(pending, HandleError::failed(reason));
            }
        }
        for pending in self.take_pending(|pending| pending.about.delivery != Delivery::Repeat && !keep) {
            if failed(pending.about.delivery) {
                self.fail(pending, HandleError::failed(reason));
            } else {
                pending.reply.forward(encode(&()).map_err(HandleError::failed));
            }
        }
        // What the successor is asked for is not lost.
        for pending in self.pending.values() {
            self.view.apply_ask(&pending.ask);
        }
        let view = &self.view;
        self.outbox.extend(lost.into_iter().filter(|event| match event {
            NodeEvent::Rank(RankEvent::Lost { rank, incarnation, .. }) => {
                view.ranks.get(rank).is_none_or(|known| known.prepared != Some(*incarnation))
            }
            _ => true,
        }));
    }

    fn take_pending(&mut self, wanted: impl Fn(&Pending) -> bool) -> Vec<Pending> {
        self.pending.extract_if(.., |_, pending| wanted(pending)).map(|(_, pending)| pending).collect()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let keepalive = self.options.keepalive;
        if let Some(connection) = &mut self.connection {
            if now - connection.heard >= keepalive.dead {
                let error = connection.wire.error(Fault::Silent(keepalive.dead));
                self.disconnected(&error);
            } else if now - connection.said >= keepalive.ping
                && connection.wire.waiting() == 0
                && let Ok(frame) = frame(&ToNode::Ping)
            {
                connection.said = now;
                connection.pinged.get_or_insert(now);
                connection.wire.push(frame);
            }
        }
        for pending in self.take_pending(|pending| {
            (pending.reply.is_closed() || pending.until <= now) && !mutation::is(Mutation::NeverExpire)
        }) {
            let what = format!("{} of {}", pending.about.name, self.options.name);
            let limit = pending.limit;
            self.fail(pending, HandleError::Deadline { what, limit });
        }
    }

    // === commands ===

    fn command(&mut self, envelope: Envelope<NodeAsk>) {
        let about = envelope.ask.about();
        let name = &self.options.name;
        if self.connection.is_none() {
            let refused = if about.delivery == Delivery::Once {
                Some(format!("{name}: not connected"))
            } else if self.pending.len() >= MAX_PENDING {
                Some(format!("{name}: not connected, and {MAX_PENDING} commands wait"))
            } else {
                None
            };
            if let Some(error) = refused {
                return envelope.reply.forward(Err(HandleError::failed(error)));
            }
            if about.delivery == Delivery::Latest {
                let kind = std::mem::discriminant(&envelope.ask);
                self.pending.retain(|_, pending| {
                    pending.about.delivery != Delivery::Latest || std::mem::discriminant(&pending.ask) != kind
                });
            }
        }
        match &envelope.ask {
            NodeAsk::Rank(rank, RankAsk::Release(release)) => {
                self.held.remove(&(*rank, release.ticket));
            }
            NodeAsk::Edge(EdgeAsk::EdgeNote(note)) => self.note = Some((note.wave, note.running)),
            _ => {}
        }
        self.view.apply_ask(&envelope.ask);
        let Envelope { ask, limit, reply } = envelope;
        let until = Instant::now() + limit;
        self.ask(Pending { ask, about, reply, limit, until, own: false });
    }

    /// Asks for something itself. Its number.
    fn own(&mut self, ask: NodeAsk) -> u64 {
        let about = ask.about();
        let until = Instant::now() + about.limit;
        self.ask(Pending { ask, about, reply: ReplyTo::NOWHERE, limit: about.limit, until, own: true })
    }

    /// Keeps a command until it is answered, and sends it if there is a connection. Its number.
    fn ask(&mut self, pending: Pending) -> u64 {
        self.next_id += 1;
        self.pending.insert(self.next_id, pending);
        self.send(self.next_id);
        self.next_id
    }

    fn send(&mut self, id: u64) {
        let (Some(connection), Some(pending)) = (&mut self.connection, self.pending.get(&id)) else {
            return;
        };
        match frame(&ToNode::Ask { id, ask: pending.ask.clone() }) {
            Ok(frame) => {
                connection.said = Instant::now();
                connection.wire.push(frame);
            }
            Err(error) => {
                let error = format!("{}: {}: {error}", self.options.name, pending.about.name);
                if let Some(pending) = self.pending.remove(&id) {
                    self.fail(pending, HandleError::failed(error));
                }
            }
        }
    }

    fn fail(&mut self, pending: Pending, error: HandleError) {
        tracing::debug!(%error, "a command of the link failed");
        self.view.apply_answer(&pending.ask, Err(&error));
        pending.reply.forward(Err(error));
    }

    // === messages ===

    fn message(&mut self, message: FromNode) -> Result<(), LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        connection.heard = Instant::now();
        match message {
            FromNode::Hello { version: LINK_VERSION } => {
                connection.greeted = true;
                Ok(())
            }
            FromNode::Hello { version } => Err(connection.wire.error(Fault::Version(version))),
            _ if !connection.greeted => {
                let fault = Fault::Unexpected { expected: "a greeting", got: "another message" };
                Err(connection.wire.error(fault))
            }
            FromNode::Pong => {
                if let Some(sent) = connection.pinged.take() {
                    self.publish.send_modify(|status| status.rtt = Some(sent.elapsed()));
                }
                Ok(())
            }
            FromNode::Answer { id, result } if id == connection.state => {
                self.pending.remove(&id);
                self.state(result)
            }
            FromNode::Answer { id, result } => {
                self.answered(id, result);
                Ok(())
            }
            FromNode::Event(event) => self.event(event),
        }
    }

    /// The first answer on a connection: what was missed is reported.
    fn state(&mut self, result: Result<Bytes, String>) -> Result<(), LinkError> {
        let state = result.and_then(|state| decode::<NodeState>(&state));
        let mut state = state.map_err(|error| {
            tracing::warn!(error, "the state behind a link");
            self.error(Fault::Unexpected { expected: "its state", got: "an error" })
        })?;
        if let Some(wanted) = &self.options.about
            && state.about.as_ref() != Some(wanted)
        {
            let about = state.about.unwrap_or_else(|| "something unknown".to_owned());
            self.publish.send_modify(|status| status.stranger = true);
            return Err(self.error(Fault::Stranger { about, wanted: wanted.clone() }));
        }
        for (rank, publish) in &self.snapshots {
            let snapshot = state.ranks.get(rank).map(|known| known.snapshot.clone()).unwrap_or_default();
            publish.send_replace(RankSnapshot { rank: *rank, ..snapshot });
        }
        if let Some((wave, running)) = self.note
            && state.wave != self.note
        {
            self.own(NodeAsk::Edge(EdgeAsk::EdgeNote(EdgeNote { wave, running })));
        }
        let told = Arc::new(state.clone());
        // What was asked before is on its way to the other side, which will do it after it has told its state.
        for pending in self.pending.values() {
            state.apply_ask(&pending.ask);
        }
        if !mutation::is(Mutation::MissNothing) {
            for event in self.view.missed(&state, &self.options.name) {
                self.report(event)?;
            }
        }
        self.view = state;
        self.report(NodeEvent::Connected(Box::new((*told).clone())))?;
        tracing::debug!(peer = self.options.name, "link made");
        self.publish.send_modify(|status| {
            status.connected = true;
            status.stranger = false;
            status.state = Some(told);
            status.detail = None;
        });
        Ok(())
    }

    fn answered(&mut self, id: u64, result: Result<Bytes, String>) {
        // It may have run out of time.
        let Some(pending) = self.pending.remove(&id) else {
            return;
        };
        let result = result.map_err(HandleError::failed);
        self.view.apply_answer(&pending.ask, result.as_ref());
        pending.reply.forward(result);
    }

    fn event(&mut self, event: NodeEvent) -> Result<(), LinkError> {
        if self.outbox.len() >= MAX_EVENTS && !event.can_be_spared() {
            // Not applied: it is reported with the state of the next connection.
            return Err(self.error(Fault::Overflow("events")));
        }
        self.view.apply_event(&event);
        match event {
            NodeEvent::Snapshot(snapshot) => {
                if let Some(publish) = self.snapshots.get(&snapshot.rank) {
                    publish.send_replace(snapshot);
                }
                Ok(())
            }
            // One that was told before a reconnect is told again.
            NodeEvent::Held(call)
                if self.held.len() >= MAX_HELD || !self.held.insert((call.rank, call.ticket)) =>
            {
                Ok(())
            }
            // Of the other side's own links: what it means for engines and routes comes as their events.
            NodeEvent::Connected(_) | NodeEvent::Disconnected { .. } => Ok(()),
            event => self.report(event),
        }
    }

    fn report(&mut self, event: NodeEvent) -> Result<(), LinkError> {
        if self.outbox.len() < MAX_EVENTS {
            self.outbox.push_back(event);
            return Ok(());
        }
        if event.can_be_spared() {
            return Ok(());
        }
        Err(self.error(Fault::Overflow("events")))
    }
}
