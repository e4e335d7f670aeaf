//! The DP coordinator of the hosted engines: what it is told, and what becomes of what it says.

use dp_sidecar_protocol::machine::coordinator::{Action, Event, Exclude, Report};
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation};

use super::super::engine_model::{Input, RequestId};
use super::checks::law;
use super::{Happening, Link, Topology, World};

impl World {
    pub(super) fn relay(&mut self, from: FrontendId, rank: u16, id: RequestId, steps: u32, wave: u64) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.life = Some(self.life);
        }
        self.send_to_engine(Link::Slot(from, rank), rank, Input::Add { id, steps, wave });
        // Nobody keeps it while there is no sidecar.
        if self.edges[usize::from(rank)].connected(self.session) {
            let wake = Event::Wake { rank: EngineIndex(rank) };
            self.send(Link::RelayCommands(rank), Happening::ToMachine(self.session, wake));
        }
    }

    pub(super) fn tell_machine(&mut self, event: Event) {
        match &event {
            Event::Adopted { engines, .. } => {
                for engine in engines {
                    self.edges[usize::from(engine.rank.0)].adopted();
                }
            }
            Event::Report { report, .. } => self.handled = Some(*report),
            Event::Subscribed { rank, incarnation } => {
                self.sockets[usize::from(rank.0)] = incarnation.0;
            }
            _ => {}
        }
        self.machine.handle_event(self.time(), event);
        self.drain_machine();
        self.handled = None;
    }

    pub(super) fn drain_machine(&mut self) {
        let (wave, before) = (self.machine.wave(), self.wave_seen);
        if wave < before {
            self.fail(format!("{}: from {before} to {wave}", law::FORWARD));
        }
        if wave > before && self.topology == Topology::Hosted {
            for rank in 0..self.size {
                let what = Happening::Noted { rank, session: self.session, wave };
                self.send(Link::ToSubscriber(rank), what);
            }
        }
        self.wave_seen = wave;
        while let Some(action) = self.machine.poll_action() {
            self.note(|| format!("    -> {action:?}"));
            self.perform(action);
        }
        while let Some(publication) = self.machine.poll_publication() {
            let (wave, running) = (publication.wave.0, publication.running);
            self.note(|| format!("    -> publish wave {wave} running {running}"));
            for at in 0..self.frontends.len() {
                let to = self.frontends[at].id;
                self.send(Link::MachineToFrontend(to), Happening::View { to, wave, running });
            }
        }
        let due = self.machine.poll_timeout().map(|at| u64::try_from(at.since_start().as_micros()).unwrap());
        // One periodic publish after another is no progress: in stock topology the timer stops with
        // the rest of the world.
        if let Some(due) = due
            && self.machine_timer.is_none_or(|planned| due < planned)
            && (self.topology == Topology::Hosted || due < self.now + 1_000_000)
        {
            self.machine_timer = Some(due);
            self.schedule_at(due.max(self.now), Happening::MachineTimer);
        }
        if self.topology == Topology::Hosted
            && !self.admit_planned
            && self.sockets.iter().all(|life| *life == self.life)
            && self.machine.snapshot().in_step
        {
            self.admit_planned = true;
            let (delay, life) = (self.delay(), self.life);
            self.schedule(delay, Happening::Admit { life });
        }
    }

    /// What the DP coordinator publishes goes to the life whose sockets it has.
    fn publish_to_engine(&mut self, rank: u16, input: Input) {
        let life = self.sockets[usize::from(rank)];
        let what = Happening::Published { rank, session: self.session, life, input };
        self.send(Link::ToSubscriber(rank), what);
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::SendReady { to } => {
                for rank in to {
                    self.publish_to_engine(rank.0, Input::Ready);
                }
            }
            Action::SendStartWave { wave, exclude } => {
                let exclude = match exclude {
                    Some(Exclude::Index(rank)) => Some(rank.0),
                    _ => None,
                };
                for rank in 0..self.size {
                    let input = Input::StartWave { wave: wave.0, exclude };
                    self.publish_to_engine(rank, input);
                }
            }
            Action::Forward { rank } => {
                let report = self.handled.expect("only a report is forwarded");
                self.tell(None, rank, report);
            }
            Action::Tell { frontend, rank, report } => self.tell(frontend, rank, report),
            Action::Note(_) => {}
        }
    }

    fn tell(&mut self, frontend: Option<FrontendId>, rank: EngineIndex, report: Report) {
        for at in 0..self.frontends.len() {
            let id = self.frontends[at].id;
            if frontend.is_none_or(|only| only == id) && self.frontends[at].joined == self.session {
                let event = Event::Report { rank, incarnation: Incarnation(1), report };
                self.send(Link::ToTheirs(id, rank.0), Happening::ToTheirs(id, event));
            }
        }
    }
}
