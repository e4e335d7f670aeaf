//! What happens when.

use super::*;

impl World {
    fn ask(&mut self, ask: Ask) {
        if !self.leader {
            return; // nobody listens
        }
        let running = self.machine.snapshot().running;
        let (before, id) = (self.refused, ask.id.clone());
        self.tell(Event::Asked(ask));
        if let Some(running) = running
            && running != id
            && self.leader
        {
            let refused = self.refused > before;
            self.law(Law::OneAtATime, refused, || format!("{id} was taken while {running} runs"));
        }
    }

    pub(super) fn plan(&mut self) {
        let updates = self.rng.random_range(1..=3u64);
        let modes = [PauseMode::Wait, PauseMode::Abort, PauseMode::Keep];
        for n in 0..updates {
            let mode = modes[self.rng.random_range(0..3)];
            let ask = Box::new(Ask {
                id: UpdateId(format!("u{n}")),
                version: Some(WeightVersion(format!("v{n}"))),
                made_up_version: WeightVersion::default(),
                from_version: None,
                source: format!("dir{n}"),
                weights: true,
                adapters: Vec::new(),
                mode,
                pause_deadline: Duration::from_millis(self.rng.random_range(10..5_000)),
                forward_only: self.chance(0.2),
                patience: Duration::from_secs(5),
            });
            // The engines are up by then, as a rule.
            let at = self.now + Duration::from_secs(30 + n * 200);
            self.at(at, Happening::Asked(ask.clone()));
            if self.chance(0.3) {
                let again = at + Duration::from_millis(self.rng.random_range(0..190_000));
                self.at(again, Happening::Asked(ask.clone()));
            }
            if self.chance(0.1) {
                let other = Ask { id: UpdateId(format!("u{n}{n}")), ..*ask };
                let then = at + Duration::from_millis(self.rng.random_range(0..10_000));
                self.at(then, Happening::Asked(Box::new(other)));
            }
            for _ in 0..2 {
                if self.fault(0.35) {
                    let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                    let rank = self.rng.random_range(0..self.engines.len());
                    self.at(at, Happening::Dies(rank, u64::MAX));
                }
            }
            if self.chance(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.at(at, Happening::OperatorAbort);
            }
            if self.frailty > 0.0 && self.chance(0.2) {
                let at = at + Duration::from_millis(self.rng.random_range(0..20_000));
                self.at(at, Happening::LeaderDies);
            }
            if self.fault(0.2) {
                let node = self.rng.random_range(0..self.nodes);
                let cut = at + Duration::from_millis(self.rng.random_range(0..15_000));
                let heal = cut + Duration::from_millis(self.rng.random_range(0..60_000));
                self.at(cut, Happening::Cut(node));
                self.at(heal, Happening::Heal(node));
            }
            if self.fault(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.at(at, Happening::ControllerDies);
            }
            for _ in 0..30 {
                let at = at + Duration::from_millis(self.rng.random_range(0..15_000));
                let rank = self.rng.random_range(0..self.engines.len());
                self.at(at, Happening::Step(rank));
            }
        }
    }

    pub(super) fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Answer(rank, (epoch, run), event) => {
                let lost = rank.is_some_and(|rank| self.is_away(rank));
                if epoch == self.epoch && !lost {
                    self.tell(Event::Reported { run, event });
                }
            }
            Happening::Event(epoch, event) => {
                if epoch == self.epoch {
                    self.tell(event);
                }
            }
            Happening::Work(epoch, action) => self.work(epoch, *action),
            Happening::Arrives(rank, caller, action) => self.arrives(rank, caller, action),
            Happening::Drained(rank, life) => self.drained(rank, life),
            Happening::LoadEnds(rank, caller, action, before) => self.load_ends(rank, caller, action, before),
            Happening::Step(rank) => self.step(rank),
            Happening::Dies(rank, life) => {
                let life = if life == u64::MAX { self.engines[rank].incarnation } else { life };
                self.dies(rank, life);
            }
            Happening::Restart(rank) => self.restart(rank),
            Happening::Asked(ask) => self.ask(*ask),
            Happening::OperatorAbort => self.tell(Event::Abort),
            Happening::FrontendResumes
                if self.machine.snapshot().running.is_some() || !self.away.is_empty() =>
            {
                self.after(1_000, Happening::FrontendResumes);
            }
            Happening::FrontendResumes => self.frontend_resumes(),
            Happening::ControllerDies => self.controller_dies(),
            Happening::LeaderDies => self.leader_dies(),
            Happening::LeaderStarts => self.leader_starts(),
            Happening::Adopt(ranks) => self.adopt(&ranks),
            Happening::Cut(node) => {
                self.away.insert(node);
            }
            Happening::Mounted(node) => {
                self.blind.remove(&node);
            }
            Happening::Heal(node) => self.heal(node),
        }
        self.check();
    }

    /// The pause of a frontend ends, or it wakes up what sleeps: with weights of its own, where there are none.
    fn frontend_resumes(&mut self) {
        let asleep = |engine: &Engine| engine.alive && engine.memory.sleeps();
        if !self.leader || !(self.paused_before || self.engines.iter().any(asleep)) {
            if self.engines.iter().any(asleep) {
                self.after(1_000, Happening::FrontendResumes);
            }
            return;
        }
        self.paused_before = false;
        // Such calls pass the leader.
        for rank in 0..self.engines.len() {
            if !self.is_in_service(rank) || self.is_away(rank) {
                continue;
            }
            let engine = &mut self.engines[rank];
            engine.paused = false;
            engine.pausing.clear();
            if engine.memory.weights == memory::Weights::Gone {
                engine.weights = Weights::Whole("external".to_owned());
                engine.memory.weights = memory::Weights::External;
                self.external = true;
            }
            (engine.memory.weights_sleep, engine.memory.cache_sleeps) = (false, false);
        }
        if self.engines.iter().any(asleep) {
            self.after(1_000, Happening::FrontendResumes);
        }
    }

    pub(super) fn run(&mut self) {
        self.plan();
        for _ in 0..20_000 {
            if self.broken.is_some() {
                return;
            }
            let due = self.machine.poll_timeout().filter(|_| self.leader);
            let next = self.queue.first_key_value().map(|(key, _)| *key);
            match (due, next) {
                (Some(due), next) if next.is_none_or(|(at, _)| due <= at) => {
                    self.now = self.now.max(due);
                    self.machine.handle_timeout(self.now);
                    self.perform();
                }
                (_, Some(key)) => {
                    let Some(happening) = self.queue.remove(&key) else {
                        return;
                    };
                    self.now = key.0;
                    self.happen(happening);
                }
                (_, None) => {
                    self.quiet();
                    return;
                }
            }
        }
        self.law(Law::ComesToRest, false, || "it does not come to rest".to_owned());
    }

    /// Nothing is going to happen any more.
    pub(super) fn quiet(&mut self) {
        let running = self.machine.snapshot().running;
        let open = self.open.len();
        self.law(Law::EveryUpdateEnds, running.is_none() && open == 0, || {
            format!("{running:?} never ended, {open} wait")
        });
        let tickets: Vec<Ticket> = self.tickets.keys().copied().collect();
        self.law(Law::EveryEngineIsAnswered, tickets.is_empty(), || format!("{tickets:?} never answered"));
        // Where a write failed the next leader trusts an engine less than it could.
        let (leader, open) = (self.leader, self.ledger.begun.is_some() && !self.unwritten);
        self.law(Law::ComesToRest, leader && !open, || format!("leader {leader}, an update is open: {open}"));
        let serves = |engine: &Engine| engine.alive && engine.admitted && !engine.hung;
        let closed = (0..self.engines.len()).find(|rank| serves(&self.engines[*rank]) && !self.gates[*rank]);
        self.law(Law::GatesOpen, closed.is_none(), || format!("rank {closed:?} is closed for ever"));
        let stuck = self.engines.iter().position(|engine| serves(engine) && engine.paused);
        self.law(Law::NothingStaysPaused, stuck.is_none(), || format!("rank {stuck:?} is paused for ever"));
        let down = self.engines.iter().position(|engine| !engine.alive || !engine.admitted);
        self.law(Law::EveryEngineIsAnswered, down.is_none(), || format!("rank {down:?} stays down"));
        if self.external {
            return;
        }
        let committed = Weights::Whole(self.in_force());
        for rank in 0..self.engines.len() {
            let engine = &self.engines[rank];
            if !engine.admitted || engine.hung {
                continue;
            }
            let holds = engine.weights.clone();
            self.law(Law::OneVersion, holds == committed, || {
                format!("at the end rank {rank} holds {holds:?}, committed is {committed:?}")
            });
        }
    }
}
