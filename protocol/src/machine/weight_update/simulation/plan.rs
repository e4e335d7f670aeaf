//! What happens when.

use super::*;

impl World {
    pub(super) fn begin(&mut self, begin: Begin) {
        let idle = self.machine.snapshot().running.is_none();
        let serving: BTreeMap<_, _> = self
            .engines
            .iter()
            .enumerate()
            .filter(|(rank, _)| self.lives.contains(rank))
            .map(|(rank, engine)| {
                let participant =
                    Participant { incarnation: Incarnation(engine.incarnation), node: self.node_of(rank) };
                (EngineIndex(u16::try_from(rank).unwrap()), participant)
            })
            .collect();
        let repeated =
            self.done.get(&begin.id).is_some_and(|records| records.iter().any(|record| record.committed))
                || self.journal.id == begin.id;
        if !self.leader {
            return; // nobody listens
        }
        let unseen =
            |(rank, engine): (usize, &Engine)| engine.alive && engine.admitted && !self.lives.contains(&rank);
        if idle && !repeated && self.engines.iter().enumerate().any(unseen) {
            return; // the driver refuses: an engine may be serving that it does not reach
        }
        if self.lockstep && serving.len() < self.engines.len() && idle && !repeated {
            return; // the driver refuses: the group is not complete
        }
        let mut begin = begin;
        begin.participants = serving;
        begin.external_weights = self.external;
        if idle && !repeated && !begin.participants.is_empty() {
            let quiet = !self.engines.iter().any(|engine| engine.hung) && self.away.is_empty();
            begin.paused_before = self.paused_before;
            if quiet && !self.paused_before && self.chance(0.1) {
                // A frontend had paused all ranks.
                begin.paused_before = true;
                self.paused_before = true;
                for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                    engine.paused = true;
                    engine.request = None;
                }
            }
            if self.chance(0.05) {
                begin.external_weights = true;
                begin.from_version = None;
                self.external = true;
                self.ledger.external_weights = true;
                for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                    engine.weights = Weights::Whole("external".to_owned());
                    engine.request = None;
                    engine.cache = None;
                }
            }
        }
        let before = self.refused;
        self.repeating = idle && repeated;
        self.tell(Event::Begin(begin));
        self.repeating = false;
        if !idle {
            let refused = self.refused > before;
            self.law(refused, || "a second update was taken".to_owned());
        }
    }

    pub(super) fn plan(&mut self) {
        let updates = self.rng.random_range(1..=3u64);
        let modes = [PauseMode::Wait, PauseMode::Abort, PauseMode::Keep];
        for n in 0..updates {
            let mode = modes[self.rng.random_range(0..3)];
            let begin = Begin {
                id: UpdateId(format!("u{n}")),
                from_version: None,
                to_version: WeightVersion(format!("v{n}")),
                source: format!("dir{n}"),
                mode,
                pause_deadline: Duration::from_millis(self.rng.random_range(10..5_000)),
                participants: BTreeMap::new(),
                paused_before: false,
                external_weights: false,
                forward_only: false,
            };
            let forward_only = self.chance(0.2);
            let begin = Begin { forward_only, ..begin };
            let begin = Box::new(begin);
            let at = self.now + Duration::from_secs(n * 200);
            self.seq += 1;
            self.queue.insert((at, self.seq), Happening::Begin(begin.clone()));
            if self.chance(0.3) {
                let at = at + Duration::from_millis(self.rng.random_range(0..190_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::Begin(begin));
            }
            for _ in 0..2 {
                if self.fault(0.35) {
                    let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                    let rank = self.rng.random_range(0..self.engines.len());
                    self.seq += 1;
                    self.queue.insert((at, self.seq), Happening::Dies(rank, u64::MAX));
                }
            }
            if self.chance(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::OperatorAbort);
            }
            if self.frailty > 0.0 && self.chance(0.2) {
                let at = at + Duration::from_millis(self.rng.random_range(0..20_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::LeaderDies);
            }
            if self.fault(0.2) {
                let node = self.rng.random_range(0..self.nodes);
                let cut = at + Duration::from_millis(self.rng.random_range(0..15_000));
                let heal = cut + Duration::from_millis(self.rng.random_range(0..60_000));
                self.seq += 2;
                self.queue.insert((cut, self.seq - 1), Happening::Cut(node));
                self.queue.insert((heal, self.seq), Happening::Heal(node));
            }
            if self.fault(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::ControllerDies);
            }
            for _ in 0..30 {
                let at = at + Duration::from_millis(self.rng.random_range(0..15_000));
                let rank = self.rng.random_range(0..self.engines.len());
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::Step(rank));
            }
        }
    }

    pub(super) fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Answer(rank, epoch, event) => {
                let lost = rank.is_some_and(|rank| self.is_away(rank));
                if epoch == self.epoch && !lost {
                    self.tell(event);
                }
            }
            Happening::Arrives(rank, epoch, action) => self.arrives(rank, epoch, action),
            Happening::Drained(rank, life) => self.drained(rank, life),
            Happening::LoadEnds(rank, epoch, action, before) => self.load_ends(rank, epoch, action, before),
            Happening::Step(rank) => self.step(rank),
            Happening::Dies(rank, life) => {
                let life = if life == u64::MAX { self.engines[rank].incarnation } else { life };
                self.dies(rank, life);
            }
            Happening::Restart(rank) => self.restart(rank),
            Happening::Begin(begin) => self.begin(*begin),
            Happening::OperatorAbort => self.tell(Event::Abort),
            Happening::FrontendResumes
                if self.machine.snapshot().running.is_some() || !self.away.is_empty() =>
            {
                self.after(1_000, Happening::FrontendResumes);
            }
            Happening::FrontendResumes if self.leader && self.paused_before => {
                self.paused_before = false;
                // Such calls pass the leader.
                for rank in 0..self.engines.len() {
                    if self.lives.contains(&rank) && !self.is_away(rank) {
                        self.engines[rank].paused = false;
                        self.engines[rank].pausing.clear();
                    }
                }
            }
            Happening::FrontendResumes => {}
            Happening::ControllerDies => self.controller_dies(),
            Happening::LeaderDies => self.leader_dies(),
            Happening::LeaderStarts => self.leader_starts(),
            Happening::Adopt(ranks) => self.adopt(ranks),
            Happening::Cut(node) => {
                self.away.insert(node);
            }
            Happening::Heal(node) => self.heal(node),
            Happening::BegunLands(begun, written) => {
                let result = if written {
                    self.ledger.begun = Some(*begun);
                    Ok(())
                } else {
                    Err("disk full".to_owned())
                };
                self.tell(Event::BegunWritten { result });
            }
            Happening::CommitLands(commit, written) => {
                let result = if written {
                    self.journal = commit;
                    Ok(())
                } else {
                    Err("disk full".to_owned())
                };
                self.tell(Event::CommitWritten { result });
            }
        }
        self.check();
    }

    pub(super) fn run(&mut self) {
        self.plan();
        for _ in 0..5_000 {
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
        self.law(false, || "it does not come to rest".to_owned());
    }

    /// Nothing is going to happen any more.
    pub(super) fn quiet(&mut self) {
        let running = self.machine.snapshot().running;
        self.law(running.is_none(), || format!("{running:?} never ended"));
        let (leader, open) = (self.leader, self.ledger.begun.is_some());
        self.law(leader && !open, || format!("leader {leader}, an update is open: {open}"));
        let gate_open = self.gate_open;
        self.law(gate_open, || "admission is closed for ever".to_owned());
        let stuck = self.engines.iter().position(|e| e.alive && e.admitted && !e.hung && e.paused);
        self.law(stuck.is_none(), || format!("rank {stuck:?} is paused for ever"));
        if self.external {
            return;
        }
        let committed = Weights::Whole(self.journal.checkpoint.path.clone());
        for rank in 0..self.engines.len() {
            let engine = &self.engines[rank];
            if !engine.admitted || engine.hung {
                continue;
            }
            let holds = engine.weights.clone();
            self.law(holds == committed, || {
                format!("at the end rank {rank} holds {holds:?}, committed is {committed:?}")
            });
        }
    }
}
