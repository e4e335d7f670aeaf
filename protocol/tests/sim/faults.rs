//! What comes from outside: requests, aborts, pauses, crashes.

use dp_sidecar_protocol::machine::coordinator::{Action, Event, Exclude};
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};

use super::super::engine_model::{Input, PauseMode, Phase, RequestId, Version};
use super::super::frontend_model::Frontend;
use super::{Control, Happening, Link, Request, Topology, World};

impl World {
    pub(super) fn outside(&mut self) {
        let stock = self.topology == Topology::Stock;
        if stock && self.engines.iter().any(|e| e.phase == Phase::Starting) {
            // vLLM's frontends serve when all engines are ready.
            self.schedule(1_000, Happening::Outside);
            return;
        }
        self.outside_left -= 1;
        if self.outside_left > 0 {
            let gap = match self.rng.below(10) {
                0..4 => self.rng.below(400),
                4..8 => self.rng.below(5_000),
                _ => self.rng.below(80_000),
            };
            self.schedule(gap, Happening::Outside);
        }
        let hosted = self.topology == Topology::Hosted;
        match self.rng.below(100) {
            0..65 => self.submit(),
            65..73 => self.abort(),
            73..85 => self.pause(),
            85..89 if hosted => self.crash_group(),
            89..94 if hosted => self.crash_frontend(),
            94..96 if hosted && self.connected() => self.add_frontend(),
            96..100 if hosted => self.kill_sidecar(),
            _ => self.submit(),
        }
    }

    fn some_frontend(&mut self) -> Option<usize> {
        let count = u64::try_from(self.frontends.len()).unwrap();
        (count > 0).then(|| usize::try_from(self.rng.below(count)).unwrap())
    }

    fn submit(&mut self) {
        if self.fragile && self.control != Control::Free {
            return;
        }
        let Some(at) = self.some_frontend() else {
            return;
        };
        let rank = u16::try_from(self.rng.below(u64::from(self.size))).unwrap();
        let steps = 1 + u32::try_from(self.rng.below(12)).unwrap();
        let id = RequestId::try_from(self.requests.len()).unwrap();
        let request =
            Request { rank, ended: false, life: (self.topology == Topology::Stock).then_some(self.life) };
        self.requests.insert(id, request);
        let frontend = &mut self.frontends[at];
        frontend.requests.push(id);
        let (from, wave) = (frontend.id, frontend.wave);
        let first = !frontend.running && self.version < Version::V33;
        frontend.running |= first;
        self.note(|| format!("    -> request {id} of {from} for {rank}, wave {wave}, first {first}"));
        let hosted = self.topology == Topology::Hosted;
        if hosted {
            let what = Happening::AtRelay { rank, from, id, steps, wave };
            self.send(Link::ToRelay(from, rank), what);
        } else {
            let input = Input::Add { id, steps, wave };
            self.send_to_engine(Link::Slot(from, rank), rank, input);
        }
        if first {
            let event =
                Event::FirstRequest { target: Some(Exclude::Index(EngineIndex(rank))), wave: Wave(wave) };
            let what = if hosted {
                Happening::ToTheirs(from, event)
            } else {
                Happening::ToMachine(self.session, event)
            };
            self.send(Link::FrontendToMachine(from), what);
        }
    }

    fn abort(&mut self) {
        let Some(at) = self.some_frontend() else {
            return;
        };
        let open: Vec<RequestId> =
            self.frontends[at].requests.iter().copied().filter(|id| !self.requests[id].ended).collect();
        let Some(id) = open.last().copied() else {
            return;
        };
        let (from, rank) = (self.frontends[at].id, self.requests[&id].rank);
        self.end(id);
        if self.topology == Topology::Hosted {
            let what = Happening::AbortAtRelay { rank, from, id };
            self.send(Link::ToRelay(from, rank), what);
        } else {
            self.send_to_engine(Link::Slot(from, rank), rank, Input::Abort { id });
        }
    }

    /// One controller, all ranks: pause, and when all have answered, resume.
    fn pause(&mut self) {
        let ready = self.topology == Topology::Stock || self.admitted;
        if self.control != Control::Free || !ready {
            return;
        }
        let outside = u64::from(self.outside_left > 0);
        if self.fragile && (self.pending > outside || self.requests.values().any(|r| !r.ended)) {
            return;
        }
        let mode = match self.rng.below(3) {
            0 => PauseMode::Abort,
            1 => PauseMode::Wait,
            _ => PauseMode::Keep,
        };
        self.control = Control::Pausing((0..self.size).collect());
        for rank in 0..self.size {
            self.send_to_engine(Link::Slot(FrontendId(0), rank), rank, Input::Pause(mode));
        }
    }

    fn crash_group(&mut self) {
        if !self.up {
            return;
        }
        self.up = false;
        self.barrier = false;
        let rank = u16::try_from(self.rng.below(u64::from(self.size))).unwrap();
        let (delay, life) = (self.delay(), self.life);
        self.schedule(delay, Happening::CrashSeen { rank, life });
    }

    pub(super) fn crash_seen(&mut self, first: u16, life: u64) {
        if life != self.life {
            return;
        }
        if !self.connected() {
            // The node task is away, too.
            self.schedule(1_000, Happening::CrashSeen { rank: first, life });
            return;
        }
        for request in self.requests.values_mut() {
            request.ended |= request.life == Some(life);
        }
        self.control = Control::Free;
        // The node may start a rank again before it has told of all others, but not if the group was
        // still forming: the DP coordinator could not tell the two groups apart.
        let together = !self.admitted || self.rng.chance(50);
        self.create_group();
        let ranks = (0..self.size).map(|offset| (first + offset) % self.size);
        let ranks: Vec<u16> = ranks.collect();
        let session = self.session;
        let down = |rank: u16| {
            let event = Event::EngineDown { rank: EngineIndex(rank), incarnation: Incarnation(life) };
            Happening::ToMachine(session, event)
        };
        for rank in &ranks {
            self.send(Link::NodeCommands, down(*rank));
            if !together {
                self.start_later(*rank);
            }
        }
        if together {
            for rank in ranks {
                self.start_later(rank);
            }
        }
    }

    fn start_later(&mut self, rank: u16) {
        let life = self.life;
        self.send(Link::NodeCommands, Happening::EngineStarts { rank, life });
    }

    pub(super) fn admit(&mut self, life: u64) {
        if life != self.life {
            return;
        }
        if self.up && self.engines.iter().any(|e| e.phase == Phase::Starting) {
            // Its handshake is complete only after it has READY of the DP coordinator.
            self.schedule(1_000, Happening::Admit { life });
            return;
        }
        self.admitted = true;
        for rank in 0..self.size {
            let event = Event::Admitted { rank: EngineIndex(rank) };
            self.send(Link::NodeCommands, Happening::ToMachine(self.session, event));
        }
        for (from, rank, id, steps, wave) in std::mem::take(&mut self.held) {
            self.relay(from, rank, id, steps, wave);
        }
    }

    pub(super) fn add_frontend(&mut self) {
        let id = FrontendId(self.next_frontend);
        self.next_frontend += 1;
        if self.topology == Topology::Stock {
            self.frontends.push(Frontend::direct(id));
            return;
        }
        let frontend = Frontend::attached(id, self.version, self.size, self.time());
        self.frontends.push(frontend);
        self.join(id, self.session);
    }

    fn crash_frontend(&mut self) {
        let Some(at) = self.some_frontend() else {
            return;
        };
        let frontend = self.frontends.remove(at);
        let from = frontend.id;
        for id in frontend.requests {
            let request = &self.requests[&id];
            if request.ended {
                continue;
            }
            let rank = request.rank;
            self.end(id);
            self.held.retain(|held| held.2 != id);
            if self.admitted {
                self.send_to_engine(Link::Slot(from, rank), rank, Input::Abort { id });
            }
        }
        let event = Event::FrontendDetached { frontend: from };
        self.send(Link::FromTheirs(from), Happening::ToMachine(self.session, event));
        if self.rng.chance(80) {
            self.add_frontend();
        }
    }

    /// The DP coordinator of an attached frontend handles an event, or its timer.
    pub(super) fn theirs(&mut self, id: FrontendId, event: Option<Event>) {
        let now = self.time();
        let Some(at) = self.frontends.iter().position(|f| f.id == id) else {
            return;
        };
        let frontend = &mut self.frontends[at];
        let Some(machine) = &mut frontend.coordinator else {
            return;
        };
        match event {
            Some(event) => machine.handle_event(now, event),
            None => {
                frontend.timer_set = false;
                machine.handle_timeout(now);
            }
        }
        let actions: Vec<Action> = std::iter::from_fn(|| machine.poll_action()).collect();
        let publications: Vec<_> = std::iter::from_fn(|| machine.poll_publication()).collect();
        let due = machine.poll_timeout();
        if let Some(due) = due
            && !std::mem::replace(&mut frontend.timer_set, true)
        {
            let due = u64::try_from(due.since_start().as_micros()).unwrap();
            self.schedule_at(due.max(self.now), Happening::TheirTimer(id));
        }
        for action in actions {
            self.note(|| format!("    -> frontend {id}: {action:?}"));
            if let Action::SendStartWave { wave, .. } = action {
                // Each virtual engine hears it; how many of them pass it on must not matter.
                for _ in 0..1 + self.rng.below(u64::from(self.size)) {
                    let event = Event::StartWave { frontend: id, wave };
                    if self.frontends[at].joined == self.session {
                        self.send(Link::FromTheirs(id), Happening::ToMachine(self.session, event));
                    }
                }
            }
        }
        for publication in publications {
            let (wave, running) = (publication.wave.0, publication.running);
            self.note(|| format!("    -> frontend {id}: publish wave {wave} running {running}"));
            self.send(Link::MachineToFrontend(id), Happening::View { to: id, wave, running });
        }
    }
}
