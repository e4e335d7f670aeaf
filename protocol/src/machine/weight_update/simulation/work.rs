//! What the leader does for the machine.

use super::*;

impl World {
    pub(super) fn act(&mut self, action: Action) {
        let mut epoch = self.epoch;
        if is_work(&action) && self.fault(0.01) {
            self.lost += 1;
            let lost = Event::JobLost { action: Box::new(action.clone()), error: "panicked".to_owned() };
            self.after(50, Happening::Event(epoch, lost));
            if self.chance(0.5) {
                self.unwritten |= matches!(action, Action::SaveLedger { .. } | Action::Conclude { .. });
                return;
            }
            epoch = 0; // it has its effect, but nobody hears of it
        }
        match action {
            Action::Accept { run, .. } => {
                self.open.insert(run);
            }
            Action::Join => self.joined += 1,
            Action::Repeat(record) => self.repeated(&record),
            Action::Refuse { run, .. } => {
                self.refused += 1;
                if let Some(run) = run {
                    self.open.remove(&run);
                }
            }
            Action::Acquire { run, .. } => {
                let result = if self.fault(0.03) {
                    Err("engines are controlled by the operator".to_owned())
                } else {
                    self.frontend_acts();
                    let paused_by = self.paused_before.then_some(PausedBy::Operator);
                    let there = self.engines.iter().enumerate().filter(|(_, engine)| engine.alive);
                    let memory = there.map(|(rank, engine)| (index(rank), engine.memory)).collect();
                    Ok(Grant { paused_by, external_weights: self.external, memory })
                };
                self.after(50, Happening::Event(epoch, Event::Acquired { run, result }));
            }
            Action::Answer { ticket, result } => self.answered(ticket, result.is_ok()),
            Action::CloseGates { run, ranks } => {
                for rank in ranks {
                    self.gates[usize::from(rank.0)] = false;
                    self.gates_due.remove(&usize::from(rank.0));
                }
                if self.fault(0.02) {
                    return;
                }
                let failed = Answer::AdmissionFailed { error: "no".to_owned() };
                let event = if self.fault(0.02) { failed } else { Answer::AdmissionClosed };
                self.answer(None, (epoch, run), 20, event);
            }
            Action::Stage { run, nodes, .. } => self.stage(epoch, run, &nodes),
            Action::StageCommitted { run, node, .. } => self.stage_committed(epoch, run, node),
            Action::SaveLedger { .. } => {
                if self.fault(0.01) {
                    self.unwritten = true;
                } else {
                    self.write(epoch, action);
                }
            }
            Action::WriteCommit { .. } => {
                // Else the disk hangs, and nothing is ever written.
                if !self.fault(0.02) {
                    self.after(50, Happening::Work(epoch, Box::new(action)));
                }
            }
            Action::Inspect { .. } => self.after(500, Happening::Work(epoch, Box::new(action))),
            Action::Restore { .. } => self.after(3_000, Happening::Work(epoch, Box::new(action))),
            Action::Forget { .. } | Action::TakeOver { .. } | Action::OpenGates { .. } => {
                self.after(50, Happening::Work(epoch, Box::new(action)));
            }
            Action::Conclude { ref conclusion, attempt, .. } => {
                if attempt == 1 {
                    let known = !conclusion.ledger.external_weights;
                    self.ended(&conclusion.record, Some(&conclusion.version).filter(|_| known));
                }
                self.write(epoch, action);
            }
            Action::Ended { run } => self.closed(run),
            Action::Step { run, action, .. } => self.take_step((epoch, run), action),
        }
    }

    fn write(&mut self, epoch: u64, action: Action) {
        let delay = Duration::from_millis(self.rng.random_range(0..=50));
        self.disk = self.disk.max(self.now + delay);
        self.at(self.disk, Happening::Work(epoch, Box::new(action)));
    }

    fn take_step(&mut self, caller: Caller, step: Step) {
        match step {
            Step::Pause { call, .. }
            | Step::Load { call, .. }
            | Step::SetVersion { call, .. }
            | Step::ResetCaches { call, .. }
            | Step::Resume { call } => self.call(usize::from(call.rank.0), caller, step),
            Step::Fence { rank, incarnation, .. } => {
                let at = usize::from(rank.0);
                if self.is_away(at) {
                    self.fences_due.insert((at, incarnation.0));
                    return;
                }
                if self.engines[at].incarnation == incarnation.0 {
                    self.stop(at);
                }
                self.answer(Some(at), caller, 20, Answer::Fenced { rank, incarnation });
            }
            _ => {}
        }
    }

    /// A frontend pauses the engines, or loads weights by itself, before the lock is taken.
    fn frontend_acts(&mut self) {
        let quiet = !self.engines.iter().any(|engine| engine.hung) && self.away.is_empty();
        let settled = self.tickets.is_empty()
            && self.ledger.begun.is_none()
            && !self.queued(|action| matches!(action, Action::SaveLedger { .. }));
        if !quiet || !settled || self.engines.iter().any(|e| !e.admitted || !e.pausing.is_empty()) {
            return;
        }
        if !self.paused_before && self.chance(0.1) {
            self.paused_before = true;
            self.after(5_000, Happening::FrontendResumes);
            for engine in &mut self.engines {
                engine.paused = true;
                engine.request = None;
            }
        }
        if !self.paused_before && self.chance(0.2) {
            self.frontend_sleeps();
        } else if self.chance(0.05) {
            self.external = true;
            // What a leader does not live to write is not known to the next one.
            self.ledger.external_weights = true;
            for engine in &mut self.engines {
                engine.weights = Weights::Whole("external".to_owned());
                engine.request = None;
                engine.cache = None;
            }
        }
    }

    /// A frontend puts the engines to sleep, and may have woken up the weights again.
    fn frontend_sleeps(&mut self) {
        let (discards, weights_sleep) = (self.chance(0.5), self.chance(0.4));
        self.paused_before = true;
        self.external |= discards;
        self.after(8_000, Happening::FrontendResumes);
        for engine in &mut self.engines {
            (engine.paused, engine.request, engine.cache) = (true, None, None);
            (engine.memory.weights_sleep, engine.memory.cache_sleeps) = (weights_sleep, true);
            if discards {
                (engine.weights, engine.memory.weights) = (Weights::Torn, memory::Weights::Gone);
            }
        }
    }

    fn stage(&mut self, epoch: u64, run: RunId, nodes: &BTreeSet<NodeId>) {
        if self.fault(0.05) {
            return; // never answers
        }
        let source = self.source_of_run();
        let mut staging = Staging { model_path: self.model.clone(), ..Staging::default() };
        let mut failed = None;
        for &node in nodes {
            if self.fault(0.05) || self.away.contains(&node.0) {
                failed = Some((node, "missing tensor".to_owned()));
            }
            let mut new = checkpoint(&source);
            if self.fault(0.02) {
                new.digest = Some("other".to_owned());
            }
            let previous = Some(self.committed());
            let gone = self.fault(0.03);
            staging.nodes.insert(node, (new, previous.filter(|_| !gone)));
        }
        let result = failed.map_or_else(|| Ok(Box::new(staging)), Err);
        self.after(3_000, Happening::Event(epoch, Event::Staged { run, result }));
    }

    fn source_of_run(&self) -> String {
        let id = self.machine.snapshot().running.unwrap_or_default();
        format!("dir{}", id.0.trim_start_matches('u'))
    }

    fn stage_committed(&mut self, epoch: u64, run: RunId, node: NodeId) {
        if self.fault(0.03) || (self.away.contains(&node.0) && self.chance(0.5)) {
            return;
        }
        let blind = self.journal.is_some() && self.blind.contains(&node.0);
        let event = if blind || self.fault(0.05) || self.away.contains(&node.0) {
            Answer::StageFailed { node, error: "cannot be had".to_owned() }
        } else {
            let mut new = self.committed();
            if self.fault(0.02) {
                new.digest = Some("other".to_owned());
            }
            Answer::Staged { node, new, previous: None }
        };
        self.answer(None, (epoch, run), 3_000, event);
    }

    /// Work takes effect, and the leader hears of it, if it is still the same.
    pub(super) fn work(&mut self, epoch: u64, action: Action) {
        let event = match action {
            Action::Inspect { ticket, engines, directory, .. } => {
                let mut found = super::super::updates::Found::default();
                for (rank, life) in engines {
                    let at = usize::from(rank.0);
                    let silent = !self.living(at, life.0) || self.is_away(at) || self.fault(0.02);
                    let model = if silent { Err("no answer".to_owned()) } else { Ok(self.model.clone()) };
                    found.models.insert(rank, model);
                    let engine = &self.engines[at];
                    if !silent {
                        found.stamps.insert(rank, WeightVersion(engine.stamp.clone()));
                    }
                    if silent || engine.paused || !engine.pausing.is_empty() {
                        found.paused.insert(rank);
                    }
                    found.missing |= directory.is_some() && self.blind.contains(&self.node_of(at).0);
                }
                Event::Inspected { ticket, found }
            }
            Action::Forget { ticket, .. } => {
                let fails = self.fault(0.05);
                if !fails {
                    self.journal = None;
                    self.forgotten += 1;
                }
                let result = if fails { Err("disk full".to_owned()) } else { Ok(()) };
                Event::Forgotten { ticket, result }
            }
            Action::Restore { ticket, engines, committed } => {
                let result = self.restore(&engines, &committed.commit);
                Event::Restored { ticket, result }
            }
            Action::TakeOver { ticket, engines, inherit } => {
                self.open_gates(engines.keys().copied());
                self.inherit(inherit.is_some());
                // Whoever has put them to sleep comes back.
                self.after(1_000, Happening::FrontendResumes);
                Event::TakenOver { ticket }
            }
            Action::OpenGates { engines, .. } => {
                self.open_gates(engines.keys().copied());
                return;
            }
            Action::SaveLedger { ledger, begun } => {
                let fails = self.fault(0.03);
                if fails {
                    self.unwritten = true;
                } else {
                    self.ledger = *ledger;
                }
                let Some(run) = begun else {
                    return;
                };
                let result = if fails { Err("disk full".to_owned()) } else { Ok(()) };
                Event::Reported { run, event: Answer::BegunWritten { result } }
            }
            Action::WriteCommit { run, committed, attempt } => {
                // A lost write is known to be in force when it is done again; not when that fails.
                let fails = attempt == 1 && self.fault(0.05);
                if !fails {
                    self.journal = Some(Committed { record: None, ..*committed.clone() });
                }
                let result = if fails { Err("disk full".to_owned()) } else { Ok(None) };
                Event::CommitWritten { run, committed, result }
            }
            Action::Conclude { run, conclusion, .. } => {
                if let Some(committed) = &conclusion.committed {
                    self.journal = Some(committed.clone());
                }
                self.ledger = conclusion.ledger.clone();
                self.open_gates(conclusion.gates.iter().copied());
                if conclusion.weights_known {
                    self.external = false;
                }
                self.inherit(conclusion.inherit.is_some());
                self.concluding = Some(conclusion);
                Event::Concluded { run }
            }
            _ => return,
        };
        if epoch == self.epoch {
            self.tell(event);
        }
    }

    pub(super) fn open_gates(&mut self, ranks: impl Iterator<Item = EngineIndex>) {
        for rank in ranks {
            let at = usize::from(rank.0);
            if self.is_away(at) {
                self.gates_due.insert(at);
            } else {
                self.gates[at] = true;
            }
        }
    }

    /// The control task learns of a pause that its predecessor knew of.
    fn inherit(&mut self, inherits: bool) {
        if inherits && self.leader {
            self.paused_before = true;
            self.after(1_000, Happening::FrontendResumes);
        }
    }

    fn restore(&mut self, engines: &Engines, commit: &Commit) -> Result<(), (EngineIndex, String)> {
        let mut result = Ok(());
        for (rank, life) in engines {
            let at = usize::from(rank.0);
            let blind = self.blind.contains(&self.node_of(at).0);
            if !self.living(at, life.0) || self.is_away(at) || blind || self.fault(0.03) {
                result = Err((*rank, "does not load".to_owned()));
                continue;
            }
            self.engines[at].weights = Weights::Whole(commit.checkpoint.path.clone());
            self.engines[at].stamp.clone_from(&commit.version.0);
        }
        result
    }

    fn repeated(&mut self, record: &Record) {
        let id = record.id.clone();
        let earlier = self.done.get(&id).and_then(|records| records.iter().rfind(|r| r.committed));
        let same = earlier.is_none_or(|earlier| {
            let partial = |record: &Record| record.recovered || record.total_ms == 0;
            earlier == record || partial(earlier) || partial(record)
        });
        self.law(Law::RepeatsAreAnswered, same, || format!("{id} gave another record the second time"));
    }

    fn ended(&mut self, record: &Record, version: Option<&WeightVersion>) {
        let id = record.id.clone();
        self.log.push(format!("{:?} done {id} {:?} {:?}", self.now, record.outcome, record.error));
        if record.recovered {
            self.recovered[usize::from(record.committed)] += 1;
        }
        let in_journal = self.journal.as_ref().is_some_and(|committed| committed.commit.id == id);
        let committed = record.committed;
        let hanging = record.error.as_deref().is_some_and(|error| {
            error.starts_with("commit record was not written") // what the journal holds is unknown
        });
        self.commit_unknown |= hanging && committed != in_journal;
        self.law(Law::RecordFollowsJournal, committed == in_journal || hanging, || {
            format!("{id}: committed is {committed}, in the journal {in_journal}")
        });
        let current = self.version();
        let same = version.is_none_or(|version| *version == current);
        self.law(Law::RecordFollowsJournal, same || hanging || self.commit_unknown, || {
            format!("machine says {version:?}, journal {current}")
        });
        if matches!(record.outcome, Outcome::Aborted | Outcome::RefusedInvalid) {
            let loaded = record.ranks.values().any(|rank| rank.times.load_ms.is_some());
            self.law(Law::RefusalsTouchNothing, !loaded, || {
                format!("{id}: {:?} after loads", record.outcome)
            });
        }
        for (rank, state) in &record.ranks {
            let rank = usize::from(rank.0);
            let engine = &self.engines[rank];
            let gone =
                matches!(state.times.state, RankProgress::Fenced | RankProgress::Lost) || self.is_away(rank);
            if !engine.alive || !engine.admitted || engine.hung || gone {
                continue;
            }
            let left = engine.paused && !record.left_paused;
            let in_barrier = engine.resuming.is_some();
            let lost_pause = record.left_paused && !engine.paused;
            self.law(Law::NothingStaysPaused, !left && !in_barrier && !lost_pause, || {
                format!("{id}: rank {rank} left paused={left} barrier={in_barrier} unpaused={lost_pause}")
            });
        }
        self.done.entry(id).or_default().push(record.clone());
    }

    /// Everything about a run is done.
    fn closed(&mut self, run: RunId) {
        self.open.remove(&run);
        for rank in self.concluding.take().into_iter().flat_map(|conclusion| conclusion.gates) {
            let at = usize::from(rank.0);
            let serves = self.engines[at].alive && self.engines[at].admitted && !self.is_away(at);
            let open =
                self.gates[at] || !serves || self.queued(|action| matches!(action, Action::OpenGates { .. }));
            self.law(Law::GatesOpen, open, || format!("{run:?} left rank {rank} closed"));
        }
    }

    pub(super) fn queued(&self, which: impl Fn(&Action) -> bool) -> bool {
        self.queue.values().any(|happening| matches!(happening, Happening::Work(_, action) if which(action)))
    }
}

/// It takes its time in the background, and may be lost there.
const fn is_work(action: &Action) -> bool {
    !matches!(
        action,
        Action::Accept { .. }
            | Action::Join
            | Action::Repeat(_)
            | Action::Refuse { .. }
            | Action::Answer { .. }
            | Action::Ended { .. }
            | Action::Step { action: Step::Progress, .. }
    )
}
