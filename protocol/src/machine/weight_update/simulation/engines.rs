//! The modelled engines.

use super::*;

impl World {
    pub(super) fn stop(&mut self, rank: usize) {
        let engine = &mut self.engines[rank];
        engine.alive = false;
        engine.admitted = false;
        engine.request = None;
        engine.pausing.clear();
        engine.resuming = None;
        self.schedule_restart(rank);
    }

    pub(super) fn schedule_restart(&mut self, rank: usize) {
        if !self.engines[rank].restarting {
            self.engines[rank].restarting = true;
            self.after(8_000, Happening::Restart(rank));
        }
    }

    /// The node brings a new engine up: with the committed weights, and not while an update runs.
    pub(super) fn restart(&mut self, rank: usize) {
        self.engines[rank].restarting = false;
        if self.engines[rank].admitted {
            return;
        }
        if self.machine.snapshot().running.is_some() {
            return; // `ended` schedules it again
        }
        let group: Vec<usize> = if self.lockstep { (0..self.engines.len()).collect() } else { vec![rank] };
        for member in group {
            let weights = Weights::Whole(self.journal.checkpoint.path.clone());
            let engine = &mut self.engines[member];
            *engine = Engine {
                incarnation: engine.incarnation + 1,
                alive: true,
                admitted: true,
                weights,
                paused: false,
                pausing: Vec::new(),
                resuming: None,
                request: None,
                cache: None,
                hung: false,
                restarting: false,
            };
        }
        if self.lockstep {
            self.external = false;
        }
    }

    pub(super) fn dies(&mut self, rank: usize, incarnation: u64) {
        if !self.engines[rank].alive || self.engines[rank].incarnation != incarnation {
            return;
        }
        self.stop(rank);
        let lost = |rank: usize, incarnation: u64| Event::EngineLost {
            rank: EngineIndex(u16::try_from(rank).unwrap()),
            incarnation: Incarnation(incarnation),
            reason: "killed".to_owned(),
        };
        if self.lockstep {
            for peer in 0..self.engines.len() {
                let life = self.engines[peer].incarnation;
                if peer != rank && self.engines[peer].alive {
                    // Its next collective fails; until then it does not step.
                    self.engines[peer].hung = true;
                    self.engines[peer].admitted = false;
                    self.after(1_500, Happening::Dies(peer, life));
                }
            }
        }
        self.tell(lost(rank, incarnation));
    }

    pub(super) fn pause_arrives(&mut self, rank: usize, incarnation: u64, attempt: u32, mode: PauseMode) {
        if !self.living(rank, incarnation) {
            return;
        }
        if self.fault(0.01) {
            self.engines[rank].hung = true;
            return;
        }
        if self.fault(0.02) {
            let event = Event::Paused {
                rank: EngineIndex(u16::try_from(rank).unwrap()),
                incarnation: Incarnation(incarnation),
                attempt,
                result: Err("no".to_owned()),
            };
            self.after(50, Happening::Answer(event));
            return;
        }
        let engine = &mut self.engines[rank];
        engine.pausing.push((attempt, mode));
        match mode {
            PauseMode::Abort => engine.request = None,
            PauseMode::Keep => {
                engine.paused = true;
                // Frozen requests may mix versions: forget what they have so far.
                engine.request = engine.request.take().map(|_| BTreeSet::new());
            }
            PauseMode::Wait => {}
        }
        let drain = if mode == PauseMode::Wait { 6_000 } else { 300 };
        self.after(drain, Happening::Drained(rank, incarnation));
    }

    pub(super) fn drained(&mut self, rank: usize, incarnation: u64) {
        if !self.living(rank, incarnation) || self.engines[rank].pausing.is_empty() {
            return;
        }
        let ready = |engine: &Engine| !engine.pausing.is_empty() || engine.paused;
        if self.lockstep && !self.engines.iter().all(|e| e.alive && !e.hung && ready(e)) {
            // Dummy batches until all ranks have the pause.
            self.after(200, Happening::Drained(rank, incarnation));
            return;
        }
        let engine = &mut self.engines[rank];
        let keep = engine.pausing.iter().all(|(_, mode)| *mode == PauseMode::Keep);
        if !keep {
            let finished = engine.request.take();
            self.response(finished);
        }
        let engine = &mut self.engines[rank];
        engine.paused = true;
        for (attempt, _) in std::mem::take(&mut engine.pausing) {
            let event = Event::Paused {
                rank: EngineIndex(u16::try_from(rank).unwrap()),
                incarnation: Incarnation(incarnation),
                attempt,
                result: Ok(()),
            };
            self.after(20, Happening::Answer(event));
        }
    }

    pub(super) fn load_ends(&mut self, rank: usize, incarnation: u64, target: Target, wanted: Checkpoint) {
        if !self.living(rank, incarnation) {
            return;
        }
        let report = |ok: bool, state: WorkerState, digest: Option<String>| WorkerReport {
            ok,
            state,
            tensors: wanted.tensors,
            bytes: wanted.bytes,
            digest,
            error: (!ok).then(|| "injected".to_owned()),
            ..WorkerReport::default()
        };
        let good = report(true, WorkerState::Loaded, wanted.digest.clone());
        let mut weights = Weights::Whole(wanted.path.clone());
        let rate = if target == Target::New { 0.06 } else { 0.03 };
        let result = if self.fault(rate) {
            match self.rng.random_range(0..5) {
                0 => {
                    weights = self.engines[rank].weights.clone();
                    Ok(vec![report(false, WorkerState::Unchanged, None)])
                }
                1 => {
                    weights = Weights::Torn;
                    Ok(vec![good, report(false, WorkerState::RestoredMeta, None)])
                }
                2 => {
                    weights = Weights::Torn;
                    Ok(vec![report(true, WorkerState::Loaded, Some("liar".to_owned()))])
                }
                3 => {
                    weights = Weights::Torn;
                    Err("worker failed".to_owned())
                }
                _ => {
                    self.engines[rank].weights = Weights::Torn;
                    self.engines[rank].hung = true;
                    return;
                }
            }
        } else {
            Ok(vec![good])
        };
        self.engines[rank].weights = weights;
        let event = Event::Loaded {
            rank: EngineIndex(u16::try_from(rank).unwrap()),
            incarnation: Incarnation(incarnation),
            target,
            result,
        };
        self.after(20, Happening::Answer(event));
    }

    pub(super) fn resume_arrives(&mut self, rank: usize, incarnation: u64, attempt: u32) {
        if !self.living(rank, incarnation) {
            return;
        }
        let index = EngineIndex(u16::try_from(rank).unwrap());
        let answer = |rank: EngineIndex, incarnation: u64, attempt, result| Event::Resumed {
            rank,
            incarnation: Incarnation(incarnation),
            attempt,
            result,
        };
        let torn = self.engines[rank].weights == Weights::Torn;
        self.law(!torn, || format!("rank {rank} is resumed while torn"));
        let fails = self.fault(0.02) || (self.lockstep && !self.engines[rank].pausing.is_empty());
        if fails {
            let event = answer(index, incarnation, attempt, Err("in flight".to_owned()));
            self.after(20, Happening::Answer(event));
            return;
        }
        if !self.lockstep {
            self.engines[rank].paused = false;
            self.engines[rank].pausing.clear();
            let event = answer(index, incarnation, attempt, Ok(()));
            self.after(20, Happening::Answer(event));
            return;
        }
        let paused = self.engines[rank].paused;
        self.law(paused, || format!("lockstep rank {rank} is resumed, but was not paused"));
        self.engines[rank].resuming = Some(attempt);
        if self.engines.iter().all(|engine| engine.resuming.is_some()) {
            for at in 0..self.engines.len() {
                let engine = &mut self.engines[at];
                engine.paused = false;
                let attempt = engine.resuming.take().unwrap();
                let life = engine.incarnation;
                let rank = EngineIndex(u16::try_from(at).unwrap());
                let event = answer(rank, life, attempt, Ok(()));
                self.after(20, Happening::Answer(event));
            }
        }
    }

    /// An engine makes a step: begins, goes on with or ends a request.
    pub(super) fn step(&mut self, rank: usize) {
        let engine = &self.engines[rank];
        if !engine.alive || !engine.admitted || engine.hung || engine.paused {
            return;
        }
        let Weights::Whole(weights) = engine.weights.clone() else {
            self.law(false, || format!("rank {rank} steps with torn weights"));
            return;
        };
        let begins = self.gate_open && engine.pausing.is_empty();
        if let Some(cache) = engine.cache.clone()
            && cache != weights
            && !self.external
        {
            self.law(false, || format!("rank {rank} serves {weights} with the cache of {cache}"));
        }
        let ends = self.chance(0.3);
        let engine = &mut self.engines[rank];
        engine.cache = Some(weights.clone());
        if engine.request.is_none() && begins {
            engine.request = Some(BTreeSet::new());
        }
        if let Some(request) = &mut engine.request {
            request.insert(weights);
        }
        if ends {
            let finished = self.engines[rank].request.take();
            self.response(finished);
        }
    }

    pub(super) fn response(&mut self, versions: Option<BTreeSet<String>>) {
        let mixed = versions.is_some_and(|versions| versions.len() > 1);
        self.law(!mixed, || "a response mixes weights without keep".to_owned());
    }

    /// What holds at every moment.
    pub(super) fn check(&mut self) {
        if self.external {
            return;
        }
        let committed = self.journal.checkpoint.path.clone();
        let wrong = self.engines.iter().position(|engine| {
            engine.alive
                && engine.admitted
                && !engine.hung
                && !engine.paused
                && engine.weights != Weights::Whole(committed.clone())
        });
        if let Some(rank) = wrong {
            let holds = self.engines[rank].weights.clone();
            self.law(false, || format!("rank {rank} serves {holds:?}, committed is {committed}"));
        }
    }
}
