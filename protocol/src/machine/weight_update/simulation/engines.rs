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
        engine.inbox.clear();
        self.schedule_restart(rank);
    }

    pub(super) fn schedule_restart(&mut self, rank: usize) {
        if !self.engines[rank].restarting {
            self.engines[rank].restarting = true;
            self.after(8_000, Happening::Restart(rank));
        }
    }

    /// The node brings a new engine up, and has it brought to the committed weights.
    pub(super) fn restart(&mut self, rank: usize) {
        self.engines[rank].restarting = false;
        if self.engines[rank].alive || !self.leader {
            return; // the next leader schedules it again
        }
        if self.is_away(rank) || (self.lockstep && !self.away.is_empty()) {
            self.schedule_restart(rank);
            return;
        }
        let group: Vec<usize> = if self.lockstep { (0..self.engines.len()).collect() } else { vec![rank] };
        for &member in &group {
            let restarting = self.engines[member].restarting;
            self.engines[member] = Engine { restarting, ..Engine::new(self.engines[member].incarnation + 1) };
        }
        self.ask_for(&group, false);
    }

    pub(super) fn dies(&mut self, rank: usize, incarnation: u64) {
        if !self.engines[rank].alive || self.engines[rank].incarnation != incarnation {
            return;
        }
        self.stop(rank);
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
        self.look();
    }

    /// Sends a call to an engine; calls reach it in order.
    pub(super) fn call(&mut self, rank: usize, caller: Caller, action: Step) {
        if self.is_away(rank) {
            // Either the link says so, or nobody says anything.
            if self.chance(0.5) {
                let error = "the node is not reached".to_owned();
                if let Some(event) = super::super::updates::lost::failure(action, error) {
                    self.answer(None, caller, 100, event);
                }
            }
            return;
        }
        self.send(rank, Happening::Arrives(rank, caller, action));
    }

    pub(super) fn arrives(&mut self, rank: usize, caller: Caller, action: Step) {
        let life = match &action {
            Step::Pause { call, .. }
            | Step::Load { call, .. }
            | Step::SetVersion { call, .. }
            | Step::ResetCaches { call, .. }
            | Step::Resume { call } => call.incarnation.0,
            _ => return,
        };
        if !self.living(rank, life) {
            return;
        }
        if self.now < self.engines[rank].loads_until {
            self.at(self.engines[rank].loads_until, Happening::Arrives(rank, caller, action));
            return;
        }
        if self.engines[rank].resuming.is_some() {
            self.engines[rank].inbox.push_back((caller, action));
            return;
        }
        match action {
            Step::Pause { call, mode, clear_cache } => {
                self.law(Law::CachesAreResetExplicitly, !clear_cache, || {
                    "pause asked to clear caches".to_owned()
                });
                self.pause_arrives(rank, caller, call, mode);
            }
            Step::Load { .. } => self.load_arrives(rank, caller, action),
            Step::SetVersion { call, version } => {
                if self.fault(0.01) {
                    self.engines[rank].hung = true;
                    return;
                }
                let result = if self.fault(0.1) {
                    Err("broken".to_owned())
                } else {
                    self.engines[rank].stamp = version.0;
                    Ok(true)
                };
                self.answer(Some(rank), caller, 50, Answer::VersionSet { call, result });
            }
            Step::ResetCaches { call, reset_running_requests } => {
                let result = if self.fault(0.03) {
                    Err("broken".to_owned())
                } else if self.fault(0.03)
                    || (self.engines[rank].request.is_some() && !reset_running_requests)
                {
                    Ok(false)
                } else {
                    self.engines[rank].cache = None;
                    Ok(true)
                };
                self.answer(Some(rank), caller, 50, Answer::CachesReset { call, result });
            }
            Step::Resume { call } => self.resume_arrives(rank, caller, call),
            _ => {}
        }
    }

    fn pause_arrives(&mut self, rank: usize, caller: Caller, call: Call, mode: PauseMode) {
        if self.fault(0.01) {
            self.engines[rank].hung = true;
            return;
        }
        if self.fault(0.02) {
            self.answer(Some(rank), caller, 50, Answer::Paused { call, result: Err("no".to_owned()) });
            return;
        }
        let engine = &mut self.engines[rank];
        engine.pausing.push((caller, call, mode));
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
        self.after(drain, Happening::Drained(rank, call.incarnation.0));
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
        let keep = engine.pausing.iter().all(|(_, _, mode)| *mode == PauseMode::Keep);
        if !keep {
            let finished = engine.request.take();
            self.response(finished);
        }
        let engine = &mut self.engines[rank];
        engine.paused = true;
        for (caller, call, _) in std::mem::take(&mut engine.pausing) {
            self.answer(Some(rank), caller, 20, Answer::Paused { call, result: Ok(()) });
        }
    }

    /// The engine does nothing else meanwhile.
    fn load_arrives(&mut self, rank: usize, caller: Caller, action: Step) {
        let paused = self.engines[rank].paused;
        self.law(Law::LoadedWhilePaused, paused, || format!("rank {rank} is loaded while it is not paused"));
        let there = !self.engines[rank].memory.weights_sleep;
        self.law(Law::MemoryIsThere, there, || format!("rank {rank} is loaded while its weights sleep"));
        let before = std::mem::replace(&mut self.engines[rank].weights, Weights::Torn);
        let end = self.now + Duration::from_millis(self.rng.random_range(0..4_000));
        self.links[rank] = self.links[rank].max(end);
        self.engines[rank].loads_until = end;
        self.seq += 1;
        self.queue.insert((end, self.seq), Happening::LoadEnds(rank, caller, action, before));
    }

    pub(super) fn load_ends(&mut self, rank: usize, caller: Caller, action: Step, before: Weights) {
        let Step::Load { call, target, checkpoint: wanted } = action else {
            return;
        };
        if !self.living(rank, call.incarnation.0) {
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
                    weights = before;
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
        let gone = weights == Weights::Torn;
        let kept =
            matches!(&result, Ok(reports) if reports.iter().all(|r| r.state == WorkerState::Unchanged));
        let engine = &mut self.engines[rank];
        engine.weights = weights;
        engine.memory.weights = match engine.memory.weights {
            before if kept => before,
            _ if gone => memory::Weights::Gone,
            _ => memory::Weights::Known,
        };
        self.answer(Some(rank), caller, 20, Answer::Loaded { call, target, result });
    }

    fn resume_arrives(&mut self, rank: usize, caller: Caller, call: Call) {
        let torn = self.engines[rank].weights == Weights::Torn;
        self.law(Law::NothingTornServes, !torn, || format!("rank {rank} is resumed while torn"));
        let there = !self.engines[rank].memory.sleeps();
        self.law(Law::MemoryIsThere, there, || format!("rank {rank} is resumed while it sleeps"));
        let fails = self.fault(0.02) || (self.lockstep && !self.engines[rank].pausing.is_empty());
        if fails {
            let result = Err("in flight".to_owned());
            self.answer(Some(rank), caller, 20, Answer::Resumed { call, result });
            return;
        }
        if !self.lockstep {
            self.engines[rank].paused = false;
            self.engines[rank].pausing.clear();
            self.answer(Some(rank), caller, 20, Answer::Resumed { call, result: Ok(()) });
            return;
        }
        let paused = self.engines[rank].paused;
        self.law(Law::LockstepInStep, paused, || {
            format!("lockstep rank {rank} is resumed, but was not paused")
        });
        self.engines[rank].resuming = Some((caller, call));
        if self.engines.iter().all(|engine| engine.resuming.is_some()) {
            for at in 0..self.engines.len() {
                let engine = &mut self.engines[at];
                engine.paused = false;
                let (caller, call) = engine.resuming.take().unwrap();
                self.answer(Some(at), caller, 20, Answer::Resumed { call, result: Ok(()) });
            }
            for at in 0..self.engines.len() {
                for (caller, action) in std::mem::take(&mut self.engines[at].inbox) {
                    self.arrives(at, caller, action);
                }
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
            self.law(Law::NothingTornServes, false, || format!("rank {rank} steps with torn weights"));
            return;
        };
        let begins = self.gates[rank] && engine.pausing.is_empty();
        if let Some(cache) = engine.cache.clone()
            && cache != weights
            && !self.external
        {
            self.law(Law::CachesMatchWeights, false, || {
                format!("rank {rank} serves {weights} with the cache of {cache}")
            });
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
        self.law(Law::ResponsesAreNotMixed, !mixed, || "a response mixes weights without keep".to_owned());
    }

    /// The leader sees what has become of engines.
    pub(super) fn look(&mut self) {
        if self.leader {
            self.show();
            self.perform();
        }
    }

    /// What holds at every moment.
    pub(super) fn check(&mut self) {
        if self.external {
            return;
        }
        let (said, committed) = (self.said(), self.in_force());
        if self.leader {
            let in_doubt = self.machine.snapshot().in_doubt;
            let lied = (0..self.engines.len()).find(|rank| {
                let engine = &self.engines[*rank];
                (engine.alive && engine.admitted && self.is_in_service(*rank))
                    && !self.is_asked_for(*rank)
                    && !in_doubt.contains(&index(*rank))
                    && engine.weights != Weights::Whole(said.clone())
            });
            if let Some(rank) = lied {
                let holds = self.engines[rank].weights.clone();
                self.law(Law::ReportsAreTrue, false, || {
                    format!("rank {rank} is said to hold {said}, and holds {holds:?}")
                });
            }
        }
        let looked_at = self.leader && self.machine.run().is_none();
        let wrong = (0..self.engines.len()).find(|rank| {
            let engine = &self.engines[*rank];
            (!(self.state_lost || self.commit_unknown) || (looked_at && self.is_in_service(*rank)))
                && engine.alive
                && engine.admitted
                && !engine.hung
                && !engine.paused
                && engine.weights != Weights::Whole(committed.clone())
        });
        if let Some(rank) = wrong {
            let holds = self.engines[rank].weights.clone();
            self.law(Law::OneVersion, false, || {
                format!("rank {rank} serves {holds:?}, committed is {committed}")
            });
        }
    }
}
