//! What the serving side knows, for [`Request::State`](crate::link::wire::Request::State).

use std::collections::BTreeMap;

use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation};

use crate::driver::handles::{EdgeEvent, HandshakeEvent, ProcessEvent, RankEvent, RouteLost};
use crate::driver::handles::{NodeState, RankReport};
use crate::link::is_wave_edge;
use crate::link::wire::Request;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Known {
    state: NodeState,
    /// Whose coordinator sockets are open.
    edges: BTreeMap<EngineIndex, Incarnation>,
}

impl Known {
    pub(super) fn new(state: NodeState) -> Self {
        let edges = state.ranks.iter();
        let edges = edges.filter_map(|(rank, state)| Some((*rank, state.prepared?))).collect();
        Self { state, edges }
    }

    /// Another link's state takes the place of what it is about. Processes and handshakes are this node's own.
    pub(super) fn replace(&mut self, mut state: NodeState) {
        for (rank, known) in std::mem::take(&mut self.state.ranks) {
            let of = state.ranks.entry(rank).or_default();
            of.pid = known.pid;
            of.process = known.process;
            of.stopping = known.stopping;
            of.ended = known.ended;
            of.expected = known.expected;
            of.handshake = known.handshake;
        }
        state.wave = state.wave.or(self.state.wave);
        state.about = self.state.about.take();
        *self = Self::new(state);
    }

    pub(super) fn state(&self) -> NodeState {
        self.state.clone()
    }

    pub(super) fn rank(&mut self, rank: EngineIndex) -> &mut RankReport {
        self.state.ranks.entry(rank).or_default()
    }

    /// A request is handed on.
    pub(super) fn requested(&mut self, request: &Request) {
        match request {
            Request::Prepare { rank, incarnation } => {
                let known = self.rank(*rank);
                if known.prepared != Some(*incarnation) {
                    clear(known);
                    known.prepared = Some(*incarnation);
                    self.edges.remove(rank);
                }
            }
            Request::EngineReady { rank, incarnation, facts } => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    known.facts = Some(facts.clone());
                }
            }
            Request::EngineDown { rank, incarnation, .. } => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    clear(known);
                }
            }
            Request::CloseRoutes { rank, frontend } => {
                self.rank(*rank).routes.retain(|(of, _)| of != frontend);
            }
            Request::EdgePrepare { rank, incarnation } => self.edge_prepared(*rank, *incarnation),
            Request::EdgeClose { rank, incarnation } if self.edges.get(rank) == Some(incarnation) => {
                self.edges.remove(rank);
                self.rank(*rank).subscribed = false;
            }
            Request::Expect { rank, incarnation, .. } => {
                let known = self.rank(*rank);
                known.expected = Some(*incarnation);
                known.handshake.clear();
            }
            Request::Forget { rank, incarnation } => {
                let known = self.rank(*rank);
                if known.expected == Some(*incarnation) {
                    known.expected = None;
                    known.handshake.clear();
                }
            }
            Request::StopEngine { rank } => {
                let known = self.rank(*rank);
                known.stopping = known.process.is_some();
            }
            Request::EdgeNote { wave, running } => self.state.wave = Some((*wave, *running)),
            _ => {}
        }
    }

    /// The sockets of an incarnation could not be made.
    pub(super) fn not_prepared(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        let known = self.rank(rank);
        if known.prepared == Some(incarnation) {
            clear(known);
        }
    }

    pub(super) fn route_open(&mut self, rank: EngineIndex, frontend: FrontendId, api_server: u32) {
        let known = self.rank(rank);
        if !known.routes.contains(&(frontend, api_server)) {
            known.routes.push((frontend, api_server));
        }
    }

    pub(super) fn route_lost(&mut self, loss: &RouteLost) {
        self.rank(loss.rank).routes.retain(|route| *route != (loss.frontend, loss.api_server));
    }

    pub(super) fn rank_event(&mut self, event: &RankEvent) {
        match event {
            RankEvent::Registered { rank, incarnation, frame } => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    known.registered = Some(frame.clone());
                }
            }
            RankEvent::Lost { rank, incarnation, reason } => {
                let known = self.rank(*rank);
                if known.prepared == Some(*incarnation) {
                    clear(known);
                }
                known.lost = Some((*incarnation, reason.clone()));
            }
        }
    }

    pub(super) fn edge_event(&mut self, event: &EdgeEvent) {
        match event {
            EdgeEvent::Subscribed { rank, incarnation } => {
                if self.edges.get(rank) == Some(incarnation) {
                    self.rank(*rank).subscribed = true;
                }
            }
            EdgeEvent::Report { rank, incarnation, frame } => {
                if self.edges.get(rank) == Some(incarnation) && is_wave_edge(frame) {
                    self.rank(*rank).wave_report = Some(frame.clone());
                }
            }
        }
    }

    pub(super) fn handshake_event(&mut self, event: &HandshakeEvent) {
        let (HandshakeEvent::Connected { rank, incarnation }
        | HandshakeEvent::Ready { rank, incarnation, .. }) = event
        else {
            return;
        };
        let known = self.rank(*rank);
        if known.expected == Some(*incarnation) {
            known.handshake.push(event.clone());
        }
    }

    pub(super) fn spawned(&mut self, rank: EngineIndex, incarnation: Incarnation, pid: u32) {
        let known = self.rank(rank);
        // Its exit may have been told before the answer to its start.
        if known.ended.as_ref().is_some_and(|(ended, _)| *ended >= incarnation) {
            return;
        }
        known.pid = Some(pid);
        known.process = Some(incarnation);
        known.stopping = false;
    }

    fn edge_prepared(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if self.edges.insert(rank, incarnation) != Some(incarnation) {
            let known = self.rank(rank);
            known.subscribed = false;
            known.wave_report = None;
        }
    }

    pub(super) fn process_event(&mut self, event: &ProcessEvent) {
        match event {
            ProcessEvent::Exited { rank, incarnation, reason, .. } => {
                let known = self.rank(*rank);
                no_process(known);
                known.ended = Some((*incarnation, reason.clone()));
            }
            ProcessEvent::KeeperLost => self.state.ranks.values_mut().for_each(no_process),
            ProcessEvent::KeeperAway | ProcessEvent::NodeStops { .. } => {}
        }
    }
}

fn no_process(known: &mut RankReport) {
    known.process = None;
    known.pid = None;
    known.stopping = false;
}

/// Nothing is there of an engine; the rank's routes stay.
fn clear(known: &mut RankReport) {
    known.prepared = None;
    known.registered = None;
    known.facts = None;
    known.subscribed = false;
    known.wave_report = None;
}
