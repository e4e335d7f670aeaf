//! Restarts of the sidecar in front of living engines: what its edges keep meanwhile, and how its successor begins. Every
//! engine has an edge of its own, as if each ran on another node.

use std::collections::VecDeque;

use dp_sidecar_protocol::machine::coordinator::{Adopted, Coordinator, Event};
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};

use super::{Happening, Link, World};

/// Wave edges an edge keeps.
const KEPT: usize = 16;

/// `src/driver/edge.rs`, as far as it matters.
#[derive(Debug)]
pub(super) struct Edge {
    /// The sidecar's life it is connected to.
    session: Option<u64>,
    /// The DP coordinator of that life has heard what stands here.
    adopted: bool,
    /// What sidecars of these lives and before had on its way is lost.
    lost: u64,
    wave: Wave,
    kept: VecDeque<Event>,
}

impl Edge {
    pub(super) fn new(session: u64) -> Self {
        Self { session: Some(session), adopted: true, lost: 0, wave: Wave(0), kept: VecDeque::new() }
    }

    pub(super) fn connected(&self, session: u64) -> bool {
        self.session == Some(session)
    }

    /// The DP coordinator has heard what stands here.
    pub(super) fn adopted(&mut self) {
        self.adopted = true;
    }

    pub(super) fn missed(&self, session: u64) -> bool {
        session <= self.lost
    }
}

impl World {
    /// The sidecar is killed. Engines, frontends and edges go on.
    pub(super) fn kill_sidecar(&mut self) {
        // Starting a group over is the node task's affair.
        if !self.admitted || !self.up || !self.connected() {
            return;
        }
        let dead = self.session;
        self.session += 1;
        for rank in 0..self.size {
            let lost = self.rng.chance(50);
            let edge = &mut self.edges[usize::from(rank)];
            edge.session = None;
            edge.adopted = false;
            if lost {
                edge.lost = dead;
            }
        }
        // The successor must not be behind what is known outside; that is checked when it begins.
        self.machine = Coordinator::new(self.config.clone());
        self.wave_seen = Wave(0);
        self.handled = None;
        let away = self.delay() + self.rng.below(20_000);
        self.schedule(away, Happening::SidecarStarts);
    }

    /// Whether the sidecar is up and has heard of all engines.
    pub(super) fn connected(&self) -> bool {
        self.edges.iter().all(|edge| edge.connected(self.session) && edge.adopted)
    }

    pub(super) fn sidecar_starts(&mut self) {
        let session = self.session;
        for rank in 0..self.size {
            let delay = self.delay();
            self.schedule(delay, Happening::EdgeRead { rank, session });
        }
        let delay = self.delay();
        self.schedule(delay, Happening::Rejoin { session });
    }

    /// From here on its events flow. The way of its state to the DP coordinator is another one.
    pub(super) fn edge_read(&mut self, rank: u16, session: u64) {
        if session != self.session {
            return;
        }
        let edge = &mut self.edges[usize::from(rank)];
        edge.session = Some(session);
        let kept: Vec<Event> = edge.kept.drain(..).collect();
        let engine = Adopted {
            rank: EngineIndex(rank),
            incarnation: Incarnation(self.sockets[usize::from(rank)]),
            ready: true,
            admitted: true,
        };
        let state = Event::Adopted { wave: edge.wave, engines: vec![engine] };
        self.send(Link::NodeCommands, Happening::ToMachine(session, state));
        for event in kept {
            self.send(Link::FromEdge(rank), Happening::ToMachine(session, event));
        }
    }

    pub(super) fn at_edge(&mut self, rank: u16, event: Event) {
        let session = self.session;
        let edge = &mut self.edges[usize::from(rank)];
        if let Event::Report { report, .. } = &event {
            let wave = report.wave_complete.map(|wave| Wave(wave.0 + 1)).or(report.start_wave);
            edge.wave = edge.wave.max(wave.unwrap_or_default());
        }
        if edge.connected(session) {
            self.send(Link::FromEdge(rank), Happening::ToMachine(session, event));
        } else {
            if edge.kept.len() == KEPT {
                edge.kept.pop_front();
            }
            edge.kept.push_back(event);
        }
    }

    pub(super) fn noted(&mut self, rank: u16, session: u64, wave: Wave) {
        let edge = &mut self.edges[usize::from(rank)];
        if !edge.missed(session) {
            edge.wave = edge.wave.max(wave);
        }
    }

    /// All frontends that are there are attached again.
    pub(super) fn rejoin(&mut self, session: u64) {
        if session != self.session {
            return;
        }
        let attached: Vec<FrontendId> = self.frontends.iter().map(|frontend| frontend.id).collect();
        for frontend in attached {
            self.join(frontend, session);
        }
    }

    pub(super) fn join(&mut self, id: FrontendId, session: u64) {
        if let Some(frontend) = self.frontends.iter_mut().find(|frontend| frontend.id == id) {
            frontend.joined = session;
            let event = Event::FrontendAttached { frontend: id };
            self.send(Link::FromTheirs(id), Happening::ToMachine(session, event));
        }
    }
}
