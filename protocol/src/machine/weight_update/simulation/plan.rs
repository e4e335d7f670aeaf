//! What happens when.

use super::*;

impl World {
    pub(super) fn begin(&mut self, begin: Begin) {
        let idle = self.machine.snapshot().running.is_none();
        let serving: BTreeMap<_, _> = self
            .engines
            .iter()
            .enumerate()
            .filter(|(_, engine)| engine.alive && engine.admitted)
            .map(|(rank, engine)| {
                let participant =
                    Participant { incarnation: Incarnation(engine.incarnation), node: self.node_of(rank) };
                (EngineIndex(u16::try_from(rank).unwrap()), participant)
            })
            .collect();
        let repeated =
            self.done.get(&begin.id).is_some_and(|records| records.iter().any(|record| record.committed))
                || self.journal.id == begin.id;
        if self.lockstep && serving.len() < self.engines.len() && idle && !repeated {
            return; // the driver refuses: the group is not complete
        }
        let mut begin = begin;
        begin.participants = serving;
        begin.external_weights = self.external;
        if idle && !repeated && !begin.participants.is_empty() {
            let quiet = !self.engines.iter().any(|engine| engine.hung);
            if quiet && self.chance(0.1) {
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
                for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                    engine.weights = Weights::Whole("external".to_owned());
                    engine.request = None;
                    engine.cache = None;
                }
            }
        }
        let before = self.refused;
        self.tell(Event::Begin(begin));
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
            };
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
            Happening::Answer(event) => self.tell(event),
            Happening::PauseArrives(rank, life, attempt, mode) => {
                self.pause_arrives(rank, life, attempt, mode);
            }
            Happening::Drained(rank, life) => self.drained(rank, life),
            Happening::LoadEnds(rank, life, target, wanted) => {
                self.load_ends(rank, life, target, wanted);
            }
            Happening::ResumeArrives(rank, life, attempt) => {
                self.resume_arrives(rank, life, attempt);
            }
            Happening::Step(rank) => self.step(rank),
            Happening::Dies(rank, life) => {
                let life = if life == u64::MAX { self.engines[rank].incarnation } else { life };
                self.dies(rank, life);
            }
            Happening::Restart(rank) => self.restart(rank),
            Happening::Begin(begin) => self.begin(*begin),
            Happening::OperatorAbort => self.tell(Event::Abort),
            Happening::ControllerDies => {
                // Its engines are stopped with it (by the keeper, when the grace is over), and start
                // again by the journal. Answers of the old life reach nobody.
                self.queue.retain(|_, happening| matches!(happening, Happening::Begin(_)));
                let last = self
                    .journal_record
                    .clone()
                    .filter(|record| record.id == self.journal.id)
                    .unwrap_or_else(|| Record::of_commit(&self.journal));
                self.machine =
                    WeightUpdate::new(config(self.lockstep), self.journal.version.clone(), Some(last));
                self.machine.mutation = self.mutation;
                self.gate_open = true;
                self.external = false;
                self.paused_before = false;
                for rank in 0..self.engines.len() {
                    self.engines[rank].admitted = false;
                    self.engines[rank].restarting = false;
                    self.restart(rank);
                }
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
            let due = self.machine.poll_timeout();
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
