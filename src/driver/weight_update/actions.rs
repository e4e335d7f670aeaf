//! The machine's actions, performed.

use dp_sidecar_protocol::machine::weight_update::{Adapter, WorkerReport, WorkerState};

use super::jobs::StageJob;
use super::nodes::NodesJob;
use super::*;

/// How often a node is told that what it staged is committed, before the next use at the latest.
const SETTLE_ATTEMPTS: u32 = 3;

impl Task {
    pub(super) async fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.act(action).await;
        }
        let nodes = std::mem::take(&mut self.to_stage);
        if !nodes.is_empty() {
            self.stage(nodes.into_iter().collect());
        }
    }

    pub(super) async fn act(&mut self, action: Action) {
        let run = self.run;
        let machine = &self.config.machine;
        match action {
            Action::Stage { node, .. } => {
                self.to_stage.insert(node);
            }
            Action::WriteBegun { begun } => self.write_begun(*begun),
            Action::CloseAdmission => {
                let limit = machine.admission_timeout;
                // Ranks that start again are not admitted before the update has ended.
                let taking_part = self.machine.running_ranks();
                let handles: Vec<RankHandle> =
                    taking_part.keys().filter_map(|rank| self.ranks.get(rank).cloned()).collect();
                self.jobs.spawn(async move {
                    let event = match admission(&handles, false, limit).await {
                        Ok(()) => Event::AdmissionClosed,
                        Err(error) => Event::AdmissionFailed { error },
                    };
                    Done::Event(run, event)
                });
            }
            Action::Pause { rank, incarnation, attempt, mode, clear_cache } => {
                let deadline = self.active.as_ref().map(|a| a.request.pause_deadline);
                let wait =
                    if mode == PauseMode::Abort { Duration::ZERO } else { deadline.unwrap_or_default() };
                let limit = wait + machine.abort_pause_timeout + SLACK;
                self.call(rank, async move |handle| Event::Paused {
                    rank,
                    incarnation,
                    attempt,
                    result: nothing(engine_calls::pause(&handle, mode, clear_cache, limit).await),
                });
            }
            Action::Load { rank, incarnation, target, checkpoint } => {
                let limit = machine.load_timeout + SLACK;
                if target == Target::Previous {
                    warn!(rank = rank.0, path = checkpoint.path, "loading the previous weights");
                }
                let load = self.load_on(rank, target, checkpoint, limit);
                self.call(rank, async move |handle| Event::Loaded {
                    rank,
                    incarnation,
                    target,
                    result: load.run(&handle).await,
                });
            }
            Action::WriteCommit { commit } => self.write_commit(commit),
            Action::SetVersion { rank, incarnation, version } => {
                let limit = machine.commit_timeout + SLACK;
                self.call(rank, async move |handle| {
                    let args = vec![version.0.as_str().into()];
                    let answer = handle.call("set_weight_version", args, limit).await;
                    Event::VersionSet { rank, incarnation, result: nothing(answer) }
                });
            }
            Action::ResetCaches { rank, incarnation, attempt, reset_running_requests } => {
                let limit = machine.commit_timeout + SLACK;
                let connector_answers = self
                    .active
                    .as_ref()
                    .and_then(|active| active.infos.get(&rank))
                    .is_some_and(EngineInfo::connector_answers);
                self.call(rank, async move |handle| {
                    let answer =
                        engine_calls::reset_caches(&handle, reset_running_requests, connector_answers, limit);
                    Event::CachesReset {
                        rank,
                        incarnation,
                        attempt,
                        result: answer.await.map_err(|error| error.to_string()),
                    }
                });
            }
            Action::Resume { rank, incarnation, attempt } => {
                let limit = machine.resume_timeout + SLACK;
                self.call(rank, async move |handle| Event::Resumed {
                    rank,
                    incarnation,
                    attempt,
                    result: nothing(engine_calls::resume(&handle, limit).await),
                });
            }
            Action::OpenAdmission => self.open_admission = true,
            Action::Fence { rank, incarnation, why } => self.fence(rank, incarnation, why).await,
            Action::Progress => self.progress(),
            Action::Refuse { refusal, .. } => {
                if let Some(active) = self.active.take() {
                    let outcome = types::outcome_of(&refusal);
                    self.refuse(active, outcome, refusal.to_string());
                }
            }
            Action::Done(record) => self.finish(*record),
        }
    }

    /// Calls a rank in the background; all ranks of a step are called at the same time.
    pub(super) fn call<F>(&mut self, rank: EngineIndex, call: impl FnOnce(RankHandle) -> F + Send + 'static)
    where
        F: Future<Output = Event> + Send + 'static,
    {
        let run = self.run;
        let Some(handle) = self.ranks.get(&rank).cloned() else {
            return;
        };
        let answer = call(handle);
        self.jobs.spawn(async move { Done::Event(run, answer.await) });
    }

    pub(super) fn stage(&mut self, nodes: Vec<NodeId>) {
        let Some(active) = &self.active else {
            return;
        };
        let run = active.run;
        if active.recovery.is_some() {
            for node in nodes {
                self.stage_committed(node);
            }
            return;
        }
        let nodes = self.stages.in_order(nodes);
        let engine = |rank: &EngineIndex, life: &Life| {
            Some((self.ranks.get(rank)?.clone(), self.place(*rank), life.info.clone()))
        };
        let job = StageJob {
            engines: self.lives.iter().filter_map(|(rank, life)| engine(rank, life)).collect(),
            call_timeout: self.config.call_timeout,
            nodes: NodesJob {
                id: active.id.clone(),
                version: active.version.clone(),
                request: active.request.clone(),
                committed: self.committed.as_ref().map(|c| c.commit.clone()),
                nodes: nodes.clone(),
                model_paths: BTreeMap::new(),
                stages: self.stages.clone(),
                known: self.known.clone(),
                cancel: self.cancel.flag(),
                limit: self.config.machine.stage_timeout + SLACK,
                notes: self.notes.clone(),
            },
        };
        let job = self.jobs.spawn(async move { Done::Staged(run, job.run().await) });
        if let Some(active) = &mut self.active {
            active.staged = nodes;
            active.stage_job = Some(job);
        }
    }

    fn load_on(&self, rank: EngineIndex, target: Target, checkpoint: Checkpoint, limit: Duration) -> Load {
        let active = self.active.as_ref();
        let takes_adapters = active
            .and_then(|active| active.infos.get(&rank))
            .is_some_and(|info| info.max_lora_rank.is_some());
        let recovery = active.is_some_and(|active| active.recovery.is_some());
        let node = self.place(rank);
        let committed = self.committed.as_ref().map(|c| c.commit.adapters.clone()).unwrap_or_default();
        Load {
            id: active.map(|active| active.id.clone()).unwrap_or_default(),
            target,
            checkpoint: active
                .is_none_or(|active| active.request.has_weights() || recovery)
                .then_some(checkpoint),
            changes: active
                .and_then(|active| active.adapters.on_nodes.get(&node).cloned())
                .unwrap_or_default(),
            bring: (recovery && takes_adapters).then_some(committed),
            place: (self.stages.clone(), node),
            limit,
        }
    }

    fn write_begun(&mut self, begun: Begun) {
        let run = self.run;
        self.ledger.begun = Some(begun);
        let write = self.write_ledger();
        self.jobs.spawn(async move {
            Done::Event(run, Event::BegunWritten { result: write.await.map_err(|error| error.to_string()) })
        });
    }

    /// Writes the ledger as it is now.
    pub(super) fn write_ledger(&mut self) -> impl Future<Output = std::io::Result<()>> + Send + 'static {
        self.ledger_number += 1;
        let (journal, number, ledger) = (self.journal.clone(), self.ledger_number, self.ledger.clone());
        let write = tokio::task::spawn_blocking(move || journal.write_ledger(number, &ledger));
        async move { write.await.map_err(std::io::Error::other)? }
    }

    pub(super) fn write_commit(&mut self, commit: Commit) {
        let run = self.run;
        let commit = self.with_adapters(commit);
        let journal = self.journal.clone();
        let model_path = self.active.as_ref().and_then(|a| a.model_path.clone());
        let committed = Committed::new(model_path.unwrap_or_default(), commit, None);
        self.jobs.spawn(async move {
            let written = {
                let committed = committed.clone();
                tokio::task::spawn_blocking(move || journal.write(&committed)).await
            };
            let result = match written {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            Done::Committed(run, Box::new(committed), result)
        });
    }

    /// Adapters stay over an update of the weights, and the weights over one of adapters.
    fn with_adapters(&self, mut commit: Commit) -> Commit {
        let before = self.committed.as_ref().map(|committed| committed.commit.clone());
        let Some(active) = &self.active else {
            return commit;
        };
        if !active.request.has_weights() {
            let base = before.clone().unwrap_or_else(|| Commit {
                checkpoint: active.startup.clone().unwrap_or_default(),
                source: active.model_path.clone().unwrap_or_default(),
                ..Commit::default()
            });
            commit.weights = before.as_ref().map(|before| before.weights_id().clone());
            commit = Commit { checkpoint: base.checkpoint, nodes: base.nodes, source: base.source, ..commit };
        }
        commit.adapters = before.map(|before| before.adapters).unwrap_or_default();
        for (name, adapter) in &active.adapters.changes {
            match adapter {
                Some(adapter) => commit.adapters.insert(name.clone(), adapter.clone()),
                None => commit.adapters.remove(name),
            };
        }
        commit
    }

    pub(super) async fn fence(&mut self, rank: EngineIndex, incarnation: Incarnation, why: String) {
        error!(rank = rank.0, "engine is fenced: {why}");
        self.lives.remove(&rank);
        let down = RankCommand::EngineDown { incarnation, reason: format!("fenced: {why}") };
        let request = FenceRequest { rank, incarnation, reason: why };
        let fences = self.fences.clone();
        let handle = self.ranks.get(&rank).cloned();
        let told = handle.clone();
        let tell = async move {
            if let Some(handle) = told
                && let Err(error) = handle.tell(down).await
            {
                error!(rank = rank.0, %error, "fenced engine");
            }
            if fences.send(request).await.is_err() {
                error!(rank = rank.0, "nobody starts the fenced engine again");
            }
        };
        if tokio::time::timeout(TELL_LIMIT, tell).await.is_err() {
            error!(rank = rank.0, limit = ?TELL_LIMIT, "fencing took too long");
        }
        let (run, limit) = (self.run, self.config.machine.admission_timeout * 2);
        if let Some(mut snapshot) = handle.map(|handle| handle.snapshot) {
            self.jobs.spawn(async move {
                let down = snapshot.wait_for(|now| now.incarnation > incarnation || !now.admitted);
                match tokio::time::timeout(limit, down).await {
                    Ok(_) => Done::Event(run, Event::Fenced { rank, incarnation }),
                    Err(_) => Done::Nothing,
                }
            });
        }
    }

    pub(super) fn progress(&self) {
        let Some(active) = &self.active else {
            return;
        };
        let snapshot = self.machine.snapshot();
        if let Some(guard) = &active.guard {
            guard.doing(snapshot.phase.as_str());
        }
        self.publish();
        if snapshot.phase == Phase::Idle {
            return; // the record follows
        }
        active.tell(&UpdateEvent::Progress { phase: snapshot.phase, ranks: snapshot.ranks });
    }

    pub(super) fn finish(&mut self, record: Record) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        let version = self.machine.snapshot().version;
        let known = record.committed || record.ranks.values().any(|rank| rank.rollback_ms.is_some());
        let ended = UpdateRecord::ended(record.clone(), version, active.started_unix_ms);
        match ended.outcome {
            UpdateOutcome::Committed => info!("{}", ended.message),
            _ => warn!("{}", ended.message),
        }
        for warning in &record.warnings {
            warn!(id = %record.id, "{warning}");
        }
        self.ledger.end(&record);
        self.ledger.external_weights &= !known;
        let ledger = self.write_ledger();
        let mut write = None;
        if let Some(committed) = &mut self.committed
            && committed.commit.id == record.id
        {
            committed.record = Some(record.clone());
            write = Some(committed.clone());
        }
        if let Some(job) = active.stage_job.take() {
            job.abort();
        }
        let recovery = active.recovery.take();
        let areas = Areas {
            stages: self.stages.clone(),
            nodes: if recovery.is_some() || !active.request.has_weights() {
                Vec::new()
            } else {
                std::mem::take(&mut active.staged)
            },
            id: active.id.clone(),
            commit: record.committed,
            // What a failed update has brought is left for its next try.
            adapters: (recovery.is_some() || record.committed && !active.request.adapters.is_empty()).then(
                || {
                    let committed = self.committed.as_ref().map(|committed| &committed.commit.adapters);
                    committed.map(adapters::digests).unwrap_or_default()
                },
            ),
        };
        let gates: Vec<RankHandle> = match std::mem::take(&mut self.open_admission) {
            true => record.ranks.keys().filter_map(|rank| self.ranks.get(rank).cloned()).collect(),
            false => Vec::new(),
        };
        let stay_paused = recovery.as_ref().is_some_and(|recovery| recovery.recover.stay_paused);
        let pause = self.ledger.pause.clone().filter(|_| stay_paused);
        let journal = self.journal.clone();
        let (followers, guard) = (std::mem::take(&mut active.followers), active.guard.take());
        // Until this is done the update counts as running.
        self.active = Some(active);
        self.jobs.spawn(async move {
            if let Err(error) = admission(&gates, true, TELL_LIMIT).await {
                error!("admission could not be opened: {error}");
            }
            let remembered = ended.clone();
            let written = tokio::task::spawn_blocking(move || {
                if let Some(committed) = write {
                    journal.write(&committed)?;
                }
                journal.remember(&remembered)
            });
            for written in [written.await.map_err(std::io::Error::other).and_then(|w| w), ledger.await] {
                if let Err(error) = written {
                    // The commit record itself is there; only details are lost, or an end is recovered again.
                    warn!(%error, "the update's record was not written");
                }
            }
            areas.settle().await;
            if let Some(guard) = guard {
                if known {
                    guard.weights_known().await;
                }
                if let Some(Pause { by, asleep }) = pause {
                    guard.inherit(by, asleep).await;
                }
                guard.release().await;
            }
            Done::Finished(Box::new(ended), followers, recovery)
        });
    }
}

/// What an engine is to load.
struct Load {
    id: UpdateId,
    target: Target,
    /// None: the weights of the model stay.
    checkpoint: Option<Checkpoint>,
    changes: adapters::Changes,
    /// Adapters to be brought to.
    bring: Option<BTreeMap<String, Adapter>>,
    place: (Stages, NodeId),
    limit: Duration,
}

impl Load {
    async fn run(self, handle: &RankHandle) -> Result<Vec<WorkerReport>, String> {
        let mut reports = match &self.checkpoint {
            Some(checkpoint) => shim::load(handle, &self.id, checkpoint, self.limit).await?,
            None => Vec::new(),
        };
        let wanted = self.checkpoint.clone().unwrap_or_default();
        if reports.iter().any(|report| report.fault(&wanted).is_some()) {
            return Ok(reports);
        }
        let changed = match (&self.bring, self.target) {
            (Some(committed), _) => {
                let place = (&self.place.0, self.place.1);
                adapters::bring(handle, &self.id, committed, place, self.limit).await?;
                None
            }
            (None, _) if self.changes.is_empty() => None,
            (None, Target::New) => Some(adapters::apply(handle, &self.id, &self.changes, self.limit).await),
            (None, Target::Previous) => {
                Some(adapters::undo(handle, &self.id, &self.changes, self.limit).await)
            }
        };
        match changed {
            Some(report) if report.ok && self.checkpoint.is_some() => {}
            // What it says of the weights holds no more when an adapter was not changed.
            Some(mut report) => {
                if self.checkpoint.is_some() && report.state == WorkerState::Unchanged {
                    report.state = WorkerState::RestoredMeta;
                }
                reports = vec![report];
            }
            None => {}
        }
        Ok(reports)
    }
}

/// The staging areas that an update has used.
struct Areas {
    stages: Stages,
    nodes: Vec<NodeId>,
    id: UpdateId,
    commit: bool,
    /// Adapters that nodes are to keep, if that may have changed.
    adapters: Option<BTreeSet<String>>,
}

impl Areas {
    /// Makes what was staged current, or discards it. What fails is made up for before the next use.
    async fn settle(self) {
        if let Some(digests) = &self.adapters {
            let kept = self.stages.all().into_iter().map(async |node| {
                if let Err(error) = self.stages.keep_adapters(node, digests.clone()).await {
                    // They are in nobody's way; the next update of adapters removes them.
                    warn!("adapters that nobody uses stay: {error}");
                }
            });
            let _: Vec<()> = join_all(kept).await;
        }
        let nodes = self.nodes.iter().filter(|node| self.stages.has_stage(**node));
        let settled = nodes.map(async |node| {
            let mut left = SETTLE_ATTEMPTS;
            loop {
                left -= 1;
                let result = match self.commit {
                    true => self.stages.state(*node).await.map(|state| state.staged.is_some()),
                    false => Ok(true),
                };
                let result = match (result, self.commit) {
                    // Nothing was staged there: the engines have loaded from a directory.
                    (Ok(false), _) => Ok(()),
                    (Ok(true), true) => self.stages.commit(*node, &self.id).await.map(|_| ()),
                    (Ok(true), false) => self.stages.discard(*node, &self.id).await.map(|_| ()),
                    (Err(error), _) => Err(error),
                };
                match result {
                    Ok(()) => return,
                    Err(error) if left == 0 => {
                        warn!(id = %self.id, "staging area is not settled yet: {error}");
                        return;
                    }
                    Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                }
            }
        });
        let _: Vec<()> = join_all(settled).await;
    }
}

/// Opens or closes the gate of all ranks.
pub(super) async fn admission(ranks: &[RankHandle], open: bool, limit: Duration) -> Result<(), String> {
    let answers =
        ranks.iter().map(|rank| rank.ask("admission", limit, |reply| RankCommand::Admission { open, reply }));
    let failures: Vec<String> =
        join_all(answers).await.into_iter().filter_map(|answer| Some(answer.err()?.to_string())).collect();
    if failures.is_empty() {
        return Ok(());
    }
    Err(failures.join(", "))
}

fn nothing(answer: Result<rmpv::Value, HandleError>) -> Result<(), String> {
    answer.map(|_| ()).map_err(|error| error.to_string())
}
