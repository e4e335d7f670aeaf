//! A node as a whole: what can be asked of it, what it reports, and what is known of it. Both ends of a link and a
//! restarted sidecar go on from the same [`NodeState`].

use std::collections::BTreeMap;

use bytes::Bytes;
use dp_sidecar_protocol::output::{OutputsView, reports_load};
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};
use serde::{Deserialize, Serialize};

use super::ask::asks;
use super::{
    About, Ask, EdgeAsk, EdgeEvent, EngineFacts, HandleError, HandshakeAsk, HandshakeEvent, HeldCall,
    ProcessAsk, ProcessEvent, RankAsk, RankEvent, RankSnapshot, RouteLost, Spawn, StageEvent, StageRequest,
    StageState, decode,
};

pub use dp_sidecar_protocol::machine::weight_update::NodeId;

/// Version of the link that carries these commands and events. Another one is refused.
pub const LINK_VERSION: u32 = 6;

/// What can be asked of a node: the commands of its tasks, and what is about all of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeAsk {
    /// Of the data path of a rank.
    Rank(EngineIndex, RankAsk),
    /// Of the engine-facing sockets of the DP coordinator.
    Edge(EdgeAsk),
    /// Of the handshake listeners. Peer link only.
    Handshake(HandshakeAsk),
    /// Of who starts vLLM. Peer link only.
    Process(ProcessAsk),
    /// Of the staging area. Peer link only.
    Stage(StageRequest),
    /// Of the link itself.
    Link(LinkAsk),
}

impl NodeAsk {
    /// What its way depends on.
    pub fn about(&self) -> About {
        match self {
            Self::Rank(_, ask) => ask.about(),
            Self::Edge(ask) => ask.about(),
            Self::Handshake(ask) => ask.about(),
            Self::Process(ask) => ask.about(),
            Self::Stage(ask) => About::of(ask),
            Self::Link(ask) => ask.about(),
        }
    }

    /// What `earlier` asked for is over once this is done: who repeats the one must not leave out the other.
    pub fn ends(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::Rank(rank, RankAsk::EngineDown(down)), Self::Rank(of, RankAsk::Prepare(ask))) => {
                rank == of && down.incarnation == ask.incarnation
            }
            (Self::Rank(rank, RankAsk::Prepare(later)), Self::Rank(of, RankAsk::Prepare(ask))) => {
                rank == of && later.incarnation > ask.incarnation
            }
            (Self::Edge(EdgeAsk::EdgeClose(close)), Self::Edge(EdgeAsk::EdgePrepare(ask))) => {
                close.rank == ask.rank && close.incarnation == ask.incarnation
            }
            (Self::Edge(EdgeAsk::EdgePrepare(later)), Self::Edge(EdgeAsk::EdgePrepare(ask))) => {
                later.rank == ask.rank && later.incarnation > ask.incarnation
            }
            (Self::Handshake(HandshakeAsk::Forget(forget)), Self::Handshake(HandshakeAsk::Expect(ask))) => {
                forget.rank == ask.rank && forget.incarnation == ask.incarnation
            }
            _ => false,
        }
    }
}

asks! {
    /// What is asked of the serving side of a link itself.
    LinkAsk {
        GetState -> NodeState, "state", Repeat;
        Shutdown -> (), "shutdown", End;
    }
}

/// Everything the node knows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct GetState {}

/// Relay link: end everything and exit. Peer link: the deployment stops; the follower stops its engines and ends.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Shutdown {}

/// Something that happened on a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeEvent {
    /// To an engine, as its rank task sees it.
    Rank(RankEvent),
    /// A rank's numbers have changed.
    Snapshot(RankSnapshot),
    /// A control call of a frontend is held. Refused when nobody releases it and the link is lost.
    Held(HeldCall),
    /// A request went to a lockstep engine. Dropped when there is no room: those that wait come later than the
    /// request, which is enough.
    Wake(EngineIndex),
    /// A route ended without being closed.
    RouteLost(RouteLost),
    /// From the engine-facing sockets of the DP coordinator.
    Edge(EdgeEvent),
    /// Of the handshake task.
    Handshake(HandshakeEvent),
    /// Of its engines' processes.
    Process(ProcessEvent),
    /// Of the staging area.
    Stage(StageEvent),
    /// The link to it was made (again); this is what it knows. What happened in between to engines and routes that
    /// were known is reported before it as if it came now. Never sent over a link.
    Connected(Box<NodeState>),
    /// The link to it is lost. Its engines go on; commands wait in the link, under their deadlines. Never sent over a
    /// link.
    Disconnected { reason: String },
}

impl NodeEvent {
    /// It is soon reported again, or matters only at once: it may be left out for a reader that is behind.
    pub fn can_be_spared(&self) -> bool {
        match self {
            Self::Wake(_) | Self::Snapshot(_) | Self::Stage(StageEvent::Progress { .. }) => true,
            Self::Edge(EdgeEvent::Report { frame, .. }) => wave_edge(frame).is_none(),
            _ => false,
        }
    }
}

/// The wave that ends or begins with a report of an engine, see [`OutputsView::wave_edge`]: what a sidecar must not
/// miss.
pub fn wave_edge(frame: &[u8]) -> Option<(Wave, bool)> {
    if reports_load(frame) { None } else { OutputsView::parse(frame).ok()?.wave_edge() }
}

/// What a node knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeState {
    pub ranks: BTreeMap<EngineIndex, RankReport>,
    /// What the serving process was started for; another purpose makes it useless. Relay link only.
    pub about: Option<String>,
    /// Newest wave known there: noted by the DP coordinator ([`EdgeNote`](super::EdgeNote)), or a later one that an
    /// engine reported.
    pub wave: Option<(Wave, bool)>,
    /// The staging area. Peer link only.
    pub stage: Option<StageState>,
}

/// What a node knows about a rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RankReport {
    /// Its numbers.
    pub snapshot: RankSnapshot,
    /// The incarnation whose sockets are open: none before the first [`Prepare`](super::Prepare), and after the engine
    /// was lost or is [down](super::EngineDown).
    pub prepared: Option<Incarnation>,
    /// The incarnation for which the DP coordinator's sockets are open.
    pub edge: Option<Incarnation>,
    /// Its registration frame, see [`RankEvent::Registered`].
    pub registered: Option<Bytes>,
    /// The last incarnation that was lost, and why, see [`RankEvent::Lost`].
    pub lost: Option<(Incarnation, String)>,
    /// From [`EngineReady`](super::EngineReady); none while an engine starts, or is down.
    pub facts: Option<EngineFacts>,
    /// Its engine subscribed to the DP coordinator.
    pub subscribed: bool,
    /// The last report of its engine with a wave edge (wave complete, or start wave), since it was prepared.
    pub wave_report: Option<Bytes>,
    /// Open routes: attachment and API server.
    pub routes: Vec<(FrontendId, u32)>,
    /// The engine's process, if it is ours and runs. Peer link only.
    pub pid: Option<u32>,
    /// Which incarnation that process is. Peer link only.
    pub process: Option<Incarnation>,
    /// It was told to stop. Peer link only.
    pub stopping: bool,
    /// How the last process ended, if no sidecar was there to hear of it. Peer link only.
    pub ended: Option<(Incarnation, String)>,
    /// The incarnation that the handshake task of this process expects or carries on, see [`Expect`](super::Expect);
    /// none after a restart of the sidecar: that handshake cannot be completed any more. Peer link only.
    pub expected: Option<Incarnation>,
    /// What the handshake task has reported about that incarnation. Peer link only.
    pub handshake: Vec<HandshakeEvent>,
}

impl NodeState {
    fn rank(&mut self, rank: EngineIndex) -> &mut RankReport {
        self.ranks.entry(rank).or_default()
    }

    /// A command is handed to its task, or will be: what it ends is over.
    pub fn apply_ask(&mut self, ask: &NodeAsk) {
        match ask {
            NodeAsk::Rank(rank, ask) => self.rank(*rank).apply_ask(ask),
            NodeAsk::Edge(EdgeAsk::EdgePrepare(ask)) => {
                let known = self.rank(ask.rank);
                // It may come after the preparation of a later life, which it is of no interest to: the two are asked
                // of different tasks.
                if known.prepared.is_none_or(|prepared| prepared <= ask.incarnation)
                    && known.edge.is_none_or(|edge| edge < ask.incarnation)
                {
                    known.edge = Some(ask.incarnation);
                    known.subscribed = false;
                    known.wave_report = None;
                }
            }
            NodeAsk::Edge(EdgeAsk::EdgeClose(ask)) => {
                let known = self.rank(ask.rank);
                if known.edge == Some(ask.incarnation) {
                    known.edge = None;
                    known.subscribed = false;
                }
            }
            NodeAsk::Edge(EdgeAsk::EdgeNote(note)) => self.wave = Some((note.wave, note.running)),
            NodeAsk::Handshake(HandshakeAsk::Expect(ask)) => {
                let known = self.rank(ask.rank);
                known.expected = Some(ask.incarnation);
                known.handshake.clear();
            }
            NodeAsk::Handshake(HandshakeAsk::Forget(ask)) => {
                let known = self.rank(ask.rank);
                if known.expected == Some(ask.incarnation) {
                    known.expected = None;
                    known.handshake.clear();
                }
            }
            NodeAsk::Process(ProcessAsk::StopEngine(ask)) => {
                let known = self.rank(ask.rank);
                known.stopping = known.process.is_some();
            }
            NodeAsk::Edge(EdgeAsk::EdgePublish(_) | EdgeAsk::EdgeVersion(_))
            | NodeAsk::Process(ProcessAsk::Spawn(_))
            | NodeAsk::Stage(_)
            | NodeAsk::Link(_) => {}
        }
    }

    /// A command was answered: what it makes is there, or is not.
    pub fn apply_answer(&mut self, ask: &NodeAsk, answer: Result<&Bytes, &HandleError>) {
        match (ask, answer) {
            (NodeAsk::Rank(rank, RankAsk::Prepare(ask)), Err(_)) => {
                let known = self.rank(*rank);
                if known.prepared == Some(ask.incarnation) {
                    known.clear();
                }
            }
            (NodeAsk::Rank(rank, RankAsk::OpenRoute(ask)), Ok(_)) => {
                self.rank(*rank).route_open((ask.frontend, ask.api_server));
            }
            (NodeAsk::Rank(rank, RankAsk::AdoptRoute(ask)), Ok(_)) => {
                self.rank(*rank).route_open((ask.frontend, ask.api_server));
            }
            // One that was being opened when the command came is closed, too.
            (NodeAsk::Rank(rank, ask @ RankAsk::CloseRoutes(_)), Ok(_)) => self.rank(*rank).apply_ask(ask),
            (NodeAsk::Process(ProcessAsk::Spawn(ask)), Ok(answer)) => {
                let known = self.rank(ask.rank);
                // Its exit may have been reported before the answer to its start.
                let ended = known.ended.as_ref().is_some_and(|(ended, _)| *ended >= ask.incarnation);
                if let Ok(pid) = decode::<<Spawn as Ask>::Answer>(answer)
                    && !ended
                {
                    known.pid = Some(pid);
                    known.process = Some(ask.incarnation);
                    known.stopping = false;
                }
            }
            _ => {}
        }
    }

    /// The engine that a command makes room for is there already: only the answer is outstanding.
    pub fn is_begun(&self, ask: &NodeAsk) -> bool {
        match ask {
            NodeAsk::Rank(rank, RankAsk::Prepare(ask)) => self.ranks.get(rank).is_some_and(|known| {
                let there = known.registered.is_some() || known.subscribed;
                known.prepared == Some(ask.incarnation) && there
            }),
            _ => false,
        }
    }

    pub fn apply_event(&mut self, event: &NodeEvent) {
        match event {
            NodeEvent::Rank(RankEvent::Registered { rank, incarnation, frame }) => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    known.registered = Some(frame.clone());
                }
            }
            NodeEvent::Rank(RankEvent::Lost { rank, incarnation, reason }) => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    known.clear();
                }
                known.lost = Some((*incarnation, reason.clone()));
            }
            NodeEvent::Snapshot(snapshot) => self.rank(snapshot.rank).snapshot = snapshot.clone(),
            NodeEvent::RouteLost(loss) => {
                let route = (loss.frontend, loss.api_server);
                self.rank(loss.rank).routes.retain(|known| *known != route);
            }
            NodeEvent::Edge(EdgeEvent::Subscribed { rank, incarnation }) => {
                let known = self.rank(*rank);
                known.subscribed |= known.edge == Some(*incarnation);
            }
            NodeEvent::Edge(EdgeEvent::Report { rank, incarnation, frame }) => {
                if wave_edge(frame).is_some() && self.rank(*rank).edge == Some(*incarnation) {
                    self.rank(*rank).wave_report = Some(frame.clone());
                }
            }
            NodeEvent::Handshake(
                event @ (HandshakeEvent::Connected { rank, incarnation }
                | HandshakeEvent::Ready { rank, incarnation, .. }),
            ) => {
                let known = self.rank(*rank);
                if known.expected == Some(*incarnation) {
                    known.handshake.push(event.clone());
                }
            }
            NodeEvent::Process(ProcessEvent::Exited { rank, incarnation, reason, .. }) => {
                let known = self.rank(*rank);
                known.no_process();
                known.ended = Some((*incarnation, reason.clone()));
            }
            NodeEvent::Process(ProcessEvent::KeeperLost) => {
                self.ranks.values_mut().for_each(RankReport::no_process);
            }
            NodeEvent::Connected(state) => self.replace((**state).clone()),
            NodeEvent::Held(_)
            | NodeEvent::Wake(_)
            | NodeEvent::Handshake(HandshakeEvent::Refused { .. })
            | NodeEvent::Process(ProcessEvent::KeeperAway | ProcessEvent::NodeStops { .. })
            | NodeEvent::Stage(_)
            | NodeEvent::Disconnected { .. } => {}
        }
    }

    /// The state of a link that is passed on takes the place of what it is about. Processes and handshakes are this
    /// node's own.
    fn replace(&mut self, mut state: Self) {
        for (rank, known) in std::mem::take(&mut self.ranks) {
            let of = state.ranks.entry(rank).or_default();
            of.pid = known.pid;
            of.process = known.process;
            of.stopping = known.stopping;
            of.ended = known.ended;
            of.expected = known.expected;
            of.handshake = known.handshake;
        }
        state.wave = state.wave.or(self.wave);
        state.about = self.about.take();
        *self = state;
    }

    /// What must have happened to engines and routes from this state to a later one: what is reported after a link
    /// was lost and made again. `where_from` names the node in reasons.
    pub fn missed(&self, now: &Self, where_from: &str) -> Vec<NodeEvent> {
        let mut missed = Vec::new();
        let none = RankReport::default();
        for (&rank, before) in &self.ranks {
            let now = now.ranks.get(&rank).unwrap_or(&none);
            for &(frontend, api_server) in &before.routes {
                if !now.routes.contains(&(frontend, api_server)) {
                    let reason = "it was lost while the link was down".to_owned();
                    missed.push(NodeEvent::RouteLost(RouteLost { frontend, rank, api_server, reason }));
                }
            }
            let Some(incarnation) = before.prepared else {
                continue;
            };
            if now.prepared != Some(incarnation) {
                let reason = now.lost.clone().filter(|(of, _)| *of == incarnation).map(|(_, reason)| reason);
                let reason = reason.unwrap_or_else(|| format!("its sockets are gone from {where_from}"));
                missed.push(NodeEvent::Rank(RankEvent::Lost { rank, incarnation, reason }));
                continue;
            }
            if let Some(frame) = now.registered.clone().filter(|_| before.registered.is_none()) {
                missed.push(NodeEvent::Rank(RankEvent::Registered { rank, incarnation, frame }));
            }
            if now.subscribed && !before.subscribed {
                missed.push(NodeEvent::Edge(EdgeEvent::Subscribed { rank, incarnation }));
            }
            if let Some(frame) = now.wave_report.clone().filter(|_| before.wave_report != now.wave_report) {
                missed.push(NodeEvent::Edge(EdgeEvent::Report { rank, incarnation, frame }));
            }
        }
        missed
    }

    /// The process with the data path is dead, and what it had is gone.
    pub fn gone(&mut self, reason: &str) -> Vec<NodeEvent> {
        let mut lost = Vec::new();
        for (&rank, known) in &mut self.ranks {
            for (frontend, api_server) in std::mem::take(&mut known.routes) {
                let reason = reason.to_owned();
                lost.push(NodeEvent::RouteLost(RouteLost { frontend, rank, api_server, reason }));
            }
            known.edge = None;
            if let Some(incarnation) = known.prepared {
                known.clear();
                lost.push(NodeEvent::Rank(RankEvent::Lost { rank, incarnation, reason: reason.to_owned() }));
            }
        }
        lost
    }
}

impl RankReport {
    fn apply_ask(&mut self, ask: &RankAsk) {
        match ask {
            // After a reconnect it is asked for again, to be answered: one that was lost or replaced meanwhile is not
            // made again.
            RankAsk::Prepare(ask)
                if self.prepared.is_none_or(|prepared| prepared < ask.incarnation)
                    && self.lost.as_ref().is_none_or(|(lost, _)| *lost < ask.incarnation) =>
            {
                self.clear();
                self.prepared = Some(ask.incarnation);
                // The coordinator's sockets may have been prepared before.
                self.edge = self.edge.filter(|edge| *edge >= ask.incarnation);
            }
            RankAsk::EngineReady(ask) if self.prepared == Some(ask.incarnation) => {
                self.facts = Some((*ask.facts).clone());
            }
            RankAsk::EngineDown(ask) if self.prepared == Some(ask.incarnation) => self.clear(),
            RankAsk::CloseRoutes(ask) => self.routes.retain(|(of, _)| *of != ask.frontend),
            _ => {}
        }
    }

    fn route_open(&mut self, route: (FrontendId, u32)) {
        if !self.routes.contains(&route) {
            self.routes.push(route);
        }
    }

    fn no_process(&mut self) {
        self.process = None;
        self.pid = None;
        self.stopping = false;
    }

    /// Nothing is left of an engine; the rank's routes stay.
    fn clear(&mut self) {
        self.prepared = None;
        self.registered = None;
        self.facts = None;
        self.subscribed = false;
        self.wave_report = None;
    }
}
