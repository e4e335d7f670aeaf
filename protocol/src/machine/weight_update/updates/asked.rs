//! An update from its request to its end.

use super::super::{Begin, Commit, Participant};
use super::*;
use crate::machine::memory::Weights;

impl Updates {
    pub(super) fn ask(&mut self, ask: Ask) {
        let version = match &ask.version {
            Some(version) => version.clone(),
            None if ask.weights => ask.made_up_version.clone(),
            None => self.machine.snapshot().version,
        };
        if let Some(asked) = &self.asked {
            let action = if asked.is_the_same(&ask) {
                Action::Join
            } else {
                let phase = self.machine.snapshot().phase;
                let refusal = Refusal::Busy { running: asked.id.clone(), phase };
                Action::Refuse { run: None, refusal }
            };
            self.actions.push_back(action);
            return;
        }
        let unlocked = Grant { external_weights: self.control.1, ..Grant::default() };
        match self.machine.check(&self.begin(&ask, &version, &unlocked)) {
            Ok(None) => {}
            Ok(Some(record)) => {
                self.actions.push_back(Action::Repeat(Box::new(record)));
                return;
            }
            // Engines that are just being brought up will be there when it begins.
            Err(Refusal::NoEngines) if !self.jobs.is_empty() || !self.waiting.is_empty() => {}
            Err(refusal) => {
                self.actions.push_back(Action::Refuse { run: None, refusal });
                return;
            }
        }
        let (id, patience) = (ask.id.clone(), ask.patience);
        let owner = format!("update {id}");
        let run = self.take_up(id, version.clone(), Kind::Update(Box::new(ask)));
        self.actions.push_back(Action::Accept { run, version });
        self.actions.push_back(Action::Acquire { run, owner, patience });
    }

    pub(super) fn take_up(&mut self, id: UpdateId, version: WeightVersion, kind: Kind) -> RunId {
        self.runs += 1;
        let run = RunId(self.runs);
        self.asked =
            Some(Asked { run, id, version, kind, stage: Stage::Locking, staging: None, commit_lost: false });
        run
    }

    fn begin(&self, ask: &Ask, version: &WeightVersion, grant: &Grant) -> Begin {
        let participant = |(rank, life): (&EngineIndex, &Life)| {
            (*rank, Participant { incarnation: life.incarnation, node: self.node_of(*rank) })
        };
        Begin {
            id: ask.id.clone(),
            from_version: ask.from_version.clone(),
            to_version: version.clone(),
            source: ask.source.clone(),
            mode: ask.mode,
            pause_deadline: ask.pause_deadline,
            participants: self.lives.iter().map(participant).collect(),
            paused_before: grant.paused_by.is_some() || grant.asleep(),
            asleep: grant.asleep(),
            external_weights: grant.external_weights || self.ledger.external_weights,
            forward_only: ask.forward_only,
        }
    }

    pub(super) fn acquired(&mut self, now: Time, run: RunId, result: Result<Grant, String>) {
        let Some(asked) = self.current(run).filter(|asked| matches!(asked.stage, Stage::Locking)) else {
            return;
        };
        match (&asked.kind, result) {
            (Kind::Recovery(recovery), _) => {
                let recover = recovery.recover.clone();
                asked.stage = Stage::Running;
                self.machine.handle_event(now, Answer::Recover(recover));
            }
            (Kind::Update(_), Err(holder)) => self.refuse_asked(Refusal::Controlled { holder }),
            (Kind::Update(_), Ok(grant))
                if !grant.weights_asleep().is_empty() && !mutated(Mutation::UpdateAsleep) =>
            {
                self.refuse_asked(Refusal::Asleep { ranks: grant.weights_asleep() });
            }
            (Kind::Update(ask), Ok(grant)) if grant.without_weights() && !ask.weights => {
                self.refuse_asked(Refusal::NoWeights);
            }
            (Kind::Update(_), Ok(grant)) => asked.stage = Stage::Locked(grant),
        }
    }

    /// The update that waits does not begin.
    pub(super) fn refuse_asked(&mut self, refusal: Refusal) {
        if let Some(asked) = self.asked.take() {
            self.actions.push_back(Action::Refuse { run: Some(asked.run), refusal });
        }
    }

    pub(super) fn begin_asked(&mut self, now: Time) {
        let Some(Asked { kind: Kind::Update(ask), stage: Stage::Locked(grant), version, .. }) = &self.asked
        else {
            return;
        };
        let absent = self.nodes.keys().copied().filter(|rank| !self.lives.contains_key(rank));
        let (unreached, missing): (Vec<_>, Vec<_>) = absent.partition(|rank| {
            let seen = self.seen.get(rank).cloned().unwrap_or_default();
            seen.admitted || seen.incarnation == Incarnation(0)
        });
        let begin = self.begin(ask, version, grant);
        if !unreached.is_empty() {
            self.refuse_asked(Refusal::Unreached { ranks: unreached });
        } else if self.config.kind.is_lockstep() && !missing.is_empty() {
            self.refuse_asked(Refusal::Incomplete { ranks: missing });
        } else {
            if let Some(asked) = &mut self.asked {
                asked.stage = Stage::Running;
            }
            self.machine.handle_event(now, Answer::Begin(begin));
        }
    }

    /// Passes on what the transaction wants done.
    pub(super) fn relay(&mut self) {
        while let Some(step) = self.machine.poll_action() {
            let Some(run) = self.asked.as_ref().map(|asked| asked.run) else {
                continue;
            };
            match step {
                Step::Stage { node, .. } => self.stage(run, node),
                Step::WriteBegun { begun } => {
                    self.ledger.begun = Some(*begun);
                    self.save_ledger(Some(run));
                }
                Step::CloseAdmission => {
                    // Ranks that start again are not admitted before the update has ended.
                    let ranks = self.machine.running_ranks().into_keys().collect();
                    self.actions.push_back(Action::CloseGates { run, ranks });
                }
                Step::OpenAdmission => self.open_gates = true,
                Step::WriteCommit { commit } => {
                    let committed = Box::new(self.to_commit(commit));
                    self.actions.push_back(Action::WriteCommit { run, committed, attempt: 1 });
                }
                Step::Refuse { refusal, .. } => self.refuse_asked(refusal),
                Step::Done(record) => self.conclude(*record),
                action => {
                    if let Step::Fence { rank, .. } = &action {
                        self.lives.remove(rank);
                    }
                    self.actions.push_back(Action::Step { run, action, attempt: 1 });
                }
            }
        }
        let nodes = std::mem::take(&mut self.to_stage);
        if let Some(asked) = self.asked.as_ref().filter(|_| !nodes.is_empty()) {
            let committed = self.committed.clone().map(Box::new);
            self.actions.push_back(Action::Stage { run: asked.run, nodes, committed });
        }
    }

    fn stage(&mut self, run: RunId, node: NodeId) {
        let Some(Asked { kind: Kind::Recovery(recovery), .. }) = &self.asked else {
            self.to_stage.insert(node);
            return;
        };
        let before = recovery.begun.as_ref().and_then(|begun| begun.previous.get(&node)).cloned();
        let committed = self.committed.clone().map(Box::new);
        self.actions.push_back(Action::StageCommitted { run, node, committed, before });
    }

    pub(super) fn staged(&mut self, now: Time, run: RunId, result: Result<Box<Staging>, (NodeId, String)>) {
        let result = result.and_then(|staging| self.version_is_new(staging));
        let Some(asked) = self.current(run) else {
            return;
        };
        match result {
            Ok(staging) => {
                let nodes = staging.nodes.clone();
                asked.staging = Some(staging);
                for (node, (new, previous)) in nodes {
                    self.machine.handle_event(now, Answer::Staged { node, new, previous });
                }
            }
            Err((node, error)) => self.machine.handle_event(now, Answer::StageFailed { node, error }),
        }
    }

    /// One version is that of one checkpoint: engines are told apart by it.
    fn version_is_new(&self, staging: Box<Staging>) -> Result<Box<Staging>, (NodeId, String)> {
        let committed = self.committed.as_ref().map(|committed| &committed.commit);
        let (Some(Asked { kind: Kind::Update(ask), version, .. }), Some(commit)) = (&self.asked, committed)
        else {
            return Ok(staging);
        };
        let other = staging.nodes.iter().find_map(|(node, (new, _))| {
            let (given, known) = new.digest.as_ref().zip(commit.checkpoint.digest.as_ref())?;
            (given != known).then_some((*node, given, known))
        });
        match other {
            Some((node, given, known)) if ask.weights && *version == commit.version => {
                let text = format!(
                    "version {version} is that of the committed weights, digest {known}, and these are others, digest {given}: give them a version of their own"
                );
                Err((node, text))
            }
            _ => Ok(staging),
        }
    }

    /// Adapters stay over an update of the weights, and the weights over one of adapters.
    fn to_commit(&self, mut commit: Commit) -> Committed {
        let before = self.committed.as_ref().map(|committed| committed.commit.clone());
        let Some(Asked { kind: Kind::Update(ask), staging: Some(staging), .. }) = &self.asked else {
            return Committed::new(String::new(), commit);
        };
        if !ask.weights {
            let base = before.clone().unwrap_or_else(|| Commit {
                checkpoint: staging.startup.clone().unwrap_or_default(),
                source: staging.model_path.clone(),
                ..Commit::default()
            });
            commit.weights = before.as_ref().map(|before| before.weights_id().clone());
            commit = Commit { checkpoint: base.checkpoint, nodes: base.nodes, source: base.source, ..commit };
        }
        commit.adapters = before.map(|before| before.adapters).unwrap_or_default();
        for (name, adapter) in &staging.adapters {
            match adapter {
                Some(adapter) => commit.adapters.insert(name.clone(), adapter.clone()),
                None => commit.adapters.remove(name),
            };
        }
        Committed::new(staging.model_path.clone(), commit)
    }

    pub(super) fn commit_written(
        &mut self,
        now: Time,
        run: RunId,
        committed: Committed,
        result: Result<Option<String>, String>,
    ) {
        let asked = self.current(run);
        let (runs, lost) = (asked.is_some(), asked.is_some_and(|asked| asked.commit_lost));
        if let (true, Err(error)) = (lost, &result) {
            let error = error.clone();
            self.reported(now, run, Answer::CommitUnknown { error });
            return;
        }
        if result.is_ok() {
            self.machine.is_committed(runs, &committed.commit);
            self.committed = Some(committed);
            if !runs {
                let engines = self.lives().collect();
                self.start_again(run, engines, "the commit record of an update was written too late");
            }
        }
        self.reported(now, run, Answer::CommitWritten { result });
    }

    fn conclude(&mut self, mut record: Record) {
        let staging = self.asked.as_ref().and_then(|asked| asked.staging.as_ref());
        if let (true, Some(staging)) = (record.committed, staging) {
            record.warnings.extend(staging.warnings.iter().cloned());
        }
        self.ledger.end(&record);
        let loaded = record.committed || record.ranks.values().any(|rank| rank.times.rollback_ms.is_some());
        let weights_known = match self.asked.as_ref().map(|asked| &asked.kind) {
            // Adapters alone leave the weights of the model as they were, known or not.
            Some(Kind::Update(ask)) => ask.weights && loaded,
            // It has loaded all of its engines, or fenced them; the others must be there and known to hold ours.
            Some(Kind::Recovery(_)) => {
                self.ledger.suspects.is_empty()
                    && self.lives.keys().all(|rank| {
                        let memory = self.seen.get(rank).map(|seen| seen.memory).unwrap_or_default();
                        let ours = !self.ledger.external_weights && memory.weights == Weights::Known;
                        record.ranks.contains_key(rank) || ours
                    })
            }
            None => loaded,
        };
        self.ledger.external_weights &= !weights_known;
        let written = self.committed.as_mut().filter(|committed| committed.commit.id == record.id);
        let committed = written.map(|committed| {
            committed.record = Some(record.clone());
            committed.clone()
        });
        let gates = match std::mem::take(&mut self.open_gates) {
            true => record.ranks.keys().copied().collect(),
            false => BTreeSet::new(),
        };
        // A trainer's, or none: then nothing was touched.
        let version = match self.ledger.external_weights {
            true => WeightVersion::unknown(),
            false => self.machine.snapshot().version,
        };
        let Some(asked) = &mut self.asked else {
            return;
        };
        let (recovery, inherits, adapters) = match &asked.kind {
            Kind::Recovery(recovery) => (true, recovery.recover.begin.paused_before, true),
            // What a failed update has brought is left for its next try.
            Kind::Update(ask) => (false, false, record.committed && !ask.adapters.is_empty()),
        };
        let kept = self.committed.as_ref().map(|committed| &committed.commit.adapters);
        let kept = kept.into_iter().flatten().filter_map(|(_, adapter)| adapter.checkpoint.digest.clone());
        let conclusion = Box::new(Conclusion {
            version,
            recovery,
            committed,
            ledger: self.ledger.clone(),
            gates,
            weights_known,
            inherit: self.ledger.pause.clone().filter(|_| inherits),
            adapters: adapters.then(|| kept.collect()),
            record,
        });
        asked.stage = Stage::Concluding(conclusion.clone());
        self.actions.push_back(Action::Conclude { run: asked.run, conclusion, attempt: 1 });
    }

    pub(super) fn concluded(&mut self, run: RunId) {
        let concludes = |asked: &mut Asked| asked.run == run && matches!(asked.stage, Stage::Concluding(_));
        let Some(asked) = self.asked.take_if(|asked| concludes(asked)) else {
            return;
        };
        if let (Kind::Recovery(recovery), Stage::Concluding(conclusion)) = (asked.kind, asked.stage) {
            self.recovered(*recovery, &conclusion.record);
        }
        self.actions.push_back(Action::Ended { run });
    }
}

impl Asked {
    /// Asked for again, in other words: it runs already.
    fn is_the_same(&self, ask: &Ask) -> bool {
        let same = match &self.kind {
            Kind::Update(own) => (&own.source, &own.adapters) == (&ask.source, &ask.adapters),
            Kind::Recovery(recovery) => {
                recovery.recover.begin.source == ask.source && ask.adapters.is_empty()
            }
        };
        let version = ask.version.as_ref().is_none_or(|version| *version == self.version);
        same && version && self.id == ask.id
    }
}
