//! The machine's actions, performed.

use dp_sidecar_protocol::machine::weight_update::{Adapter, Outcome, Target, WorkerReport, WorkerState};

use super::jobs::StageJob;
use super::*;

/// How often a node is told that what it staged is committed, before the next use at the latest.
const SETTLE_ATTEMPTS: u32 = 3;

impl Task {
    pub(super) fn act(&mut self, action: Action) {
        let tools = self.tools.clone();
        match action.clone() {
            Action::Accept { version, .. } => {
                self.active = self.incoming.take().map(|active| Active { version, ..active });
            }
            Action::Join => {
                for follower in self.incoming.take().into_iter().flat_map(|incoming| incoming.followers) {
                    self.join(follower);
                }
            }
            Action::Repeat(record) => {
                if let Some(incoming) = self.incoming.take() {
                    let version = self.machine.snapshot().version;
                    let record = UpdateRecord::ended(*record, version, incoming.started_unix_ms);
                    tell_end(incoming.followers, &record);
                }
            }
            Action::Refuse { run, refusal } => {
                let refused = if run.is_some() { self.active.take() } else { self.incoming.take() };
                if let Some(refused) = refused {
                    self.refuse(refused, &refusal);
                }
            }
            Action::Acquire { run, owner, patience } => {
                if self.active.is_none() {
                    let id = self.machine.snapshot().running.unwrap_or_default();
                    warn!(%id, "engines are brought to the committed weights after a restart of the sidecar");
                    self.active = Some(Active {
                        recovery: true,
                        ..Active::new(id, UpdateRequest::default(), Vec::new())
                    });
                }
                self.spawn(action, async move {
                    let acquired = tools.control.acquire(owner, patience).await;
                    let result = acquired.as_ref().map(|guard| guard.grant.clone());
                    let result = result.map_err(ToString::to_string);
                    (
                        Some(Event::Acquired { run, result }),
                        Extra { guard: acquired.ok(), ..Extra::default() },
                    )
                });
            }
            Action::Inspect { ticket, engines, adopted, directory } => {
                self.spawn(action, async move {
                    let (found, infos) = tools.inspect(&engines, adopted, directory.as_ref()).await;
                    (Some(Event::Inspected { ticket, found }), Extra { infos, ..Extra::default() })
                });
            }
            Action::Forget { ticket, why } => {
                warn!("{why}: engines stay at the command line's checkpoint");
                self.spawn_plain(action, async move {
                    let journal = tools.journal.clone();
                    let result = blocking(move || journal.forget()).await.map_err(|error| error.to_string());
                    Some(Event::Forgotten { ticket, result })
                });
            }
            Action::Restore { ticket, engines, committed } => {
                let infos = self.infos.clone();
                self.spawn_plain(action, async move {
                    let result = tools.restore(&engines, &committed, &infos).await;
                    Some(Event::Restored { ticket, result })
                });
            }
            Action::TakeOver { ticket, engines, inherit } => {
                info!(ranks = engines.len(), "engines keep running with the committed weights");
                self.spawn_plain(action, async move {
                    // The sidecar before may have ended in a drain, or just before a pause.
                    if let Err(error) = tools.open_gates(engines.keys(), false).await {
                        warn!("gates of engines that keep running: {error}");
                    }
                    if let Some(Pause { by }) = inherit
                        && let Ok(guard) = tools.control.acquire("recovery after a restart", PATIENCE).await
                    {
                        guard.set_paused(Some(by)).await;
                        guard.release().await;
                    }
                    Some(Event::TakenOver { ticket })
                });
            }
            Action::Answer { ticket, result } => {
                if let Err(error) = &result {
                    error!("{error}");
                }
                if let Some(reply) = self.answers.remove(&ticket) {
                    ignore_gone(reply.send(result.map_err(UpdateError::from)));
                }
            }
            Action::OpenGates { engines, .. } => self.spawn_plain(action, async move {
                if let Err(error) = tools.open_gates(engines.keys(), true).await {
                    warn!("admission could not be opened: {error}");
                }
                None
            }),
            Action::CloseGates { run, ranks } => self.spawn_plain(action, async move {
                let limit = tools.config.machine.admission_timeout;
                let event = match admission(&tools.handles(&ranks), false, limit).await {
                    Ok(()) => Answer::AdmissionClosed,
                    Err(error) => Answer::AdmissionFailed { error },
                };
                Some(Event::Reported { run, event })
            }),
            Action::Stage { run, nodes, committed } => self.stage(action, run, nodes, committed),
            Action::StageCommitted { run, node, committed, before } => {
                let infos = self.infos.clone();
                self.spawn_plain(action, async move {
                    let event = match tools.committed_on(node, committed.as_deref(), before, &infos).await {
                        Ok(new) => Answer::Staged { node, new, previous: None },
                        Err(error) => Answer::StageFailed { node, error },
                    };
                    Some(Event::Reported { run, event })
                });
            }
            Action::WriteCommit { run, committed, .. } => {
                self.spawn_plain(action, async move {
                    let (journal, written) = (tools.journal.clone(), committed.clone());
                    let result = blocking(move || journal.write(&written)).await;
                    let result = match result {
                        Ok(doubt) => Ok(doubt.map(|doubt| doubt.to_string())),
                        Err(error) => Err(error.to_string()),
                    };
                    Some(Event::CommitWritten { run, committed, result })
                });
            }
            Action::SaveLedger { ledger, begun } => {
                let write = self.write_ledger(*ledger);
                self.spawn_plain(action, async move {
                    let result = write.await;
                    if let Err(error) = &result {
                        warn!(%error, "the ledger was not written");
                    }
                    let result = result.map_err(|error| error.to_string());
                    begun.map(|run| Event::Reported { run, event: Answer::BegunWritten { result } })
                });
            }
            Action::Step { run, action: step, .. } => self.step(action, run, step),
            Action::Conclude { run, conclusion, .. } => self.conclude(action, run, *conclusion),
            Action::Ended { .. } => {
                self.staging.clear();
                if let Some(Active { record: Some(record), followers, .. }) = self.active.take() {
                    self.last = Some(record.clone());
                    self.publish();
                    tell_end(followers, &record);
                }
            }
        }
    }

    fn step(&mut self, action: Action, run: RunId, step: Step) {
        let machine = &self.tools.config.machine;
        match step {
            Step::Pause { call, mode, clear_cache } => {
                let deadline = |active: &Active| self.tools.config.pause_deadline_of(&active.request);
                let wait = match &self.active {
                    Some(active) if mode != PauseMode::Abort => deadline(active),
                    _ => Duration::ZERO,
                };
                let limit = wait + machine.abort_pause_timeout + SLACK;
                self.call(action, run, call.rank, async move |handle| {
                    let result = nothing(engine_calls::pause(&handle, mode, clear_cache, limit).await);
                    Answer::Paused { call, result }
                });
            }
            Step::Load { call, target, checkpoint } => {
                let rank = call.rank;
                let limit = machine.load_timeout + SLACK;
                if target == Target::Previous {
                    warn!(rank = rank.0, path = checkpoint.path, "loading the previous weights");
                }
                let load = self.load_on(rank, target, checkpoint, limit);
                self.call(action, run, rank, async move |handle| {
                    let result = load.run(&handle).await;
                    Answer::Loaded { call, target, result }
                });
            }
            Step::SetVersion { call, version } => {
                let limit = machine.commit_timeout + SLACK;
                let info = self.info(call.rank).cloned();
                self.call(action, run, call.rank, async move |handle| {
                    let result = shim::stamp(&handle, info.as_ref(), &version, limit).await;
                    Answer::VersionSet { call, result }
                });
            }
            Step::ResetCaches { call, reset_running_requests } => {
                let limit = machine.commit_timeout + SLACK;
                let connector_answers = self.info(call.rank).is_some_and(EngineInfo::connector_answers);
                self.call(action, run, call.rank, async move |handle| {
                    let answer =
                        engine_calls::reset_caches(&handle, reset_running_requests, connector_answers, limit);
                    let result = answer.await.map_err(|error| error.to_string());
                    Answer::CachesReset { call, result }
                });
            }
            Step::Resume { call } => {
                let limit = machine.resume_timeout + SLACK;
                self.call(action, run, call.rank, async move |handle| {
                    let result = nothing(engine_calls::resume(&handle, limit).await);
                    Answer::Resumed { call, result }
                });
            }
            Step::Fence { rank, incarnation, why } => {
                error!(rank = rank.0, "engine is fenced: {why}");
                let tools = self.tools.clone();
                self.spawn_plain(action, async move {
                    let fenced = tools.fence(rank, incarnation, why).await;
                    let event = Answer::Fenced { rank, incarnation };
                    fenced.then_some(Event::Reported { run, event })
                });
            }
            Step::Progress => self.progress(),
            // Relayed by the machine in another form.
            _ => {}
        }
    }

    fn info(&self, rank: EngineIndex) -> Option<&EngineInfo> {
        self.infos.get(&rank)?.as_ref()
    }

    /// Calls a rank in the background; all ranks of a step are called at the same time.
    fn call<F>(
        &mut self,
        action: Action,
        run: RunId,
        rank: EngineIndex,
        call: impl FnOnce(RankHandle) -> F + Send + 'static,
    ) where
        F: Future<Output = Answer> + Send + 'static,
    {
        let Some(handle) = self.tools.ranks.get(&rank).cloned() else {
            return;
        };
        let answer = call(handle);
        self.spawn_plain(action, async move { Some(Event::Reported { run, event: answer.await }) });
    }

    fn stage(
        &mut self,
        action: Action,
        run: RunId,
        nodes: BTreeSet<NodeId>,
        committed: Option<Box<Committed>>,
    ) {
        let Some(active) = &self.active else {
            return;
        };
        let tools = &self.tools;
        info!(
            id = %active.id, version = %active.version, source = active.request.source_name(),
            mode = %active.request.mode, ranks = self.machine.lives().count(), "update begins"
        );
        let nodes = tools.stages.in_order(nodes.into_iter().collect());
        let engine = |(rank, _): (EngineIndex, Incarnation)| {
            let handle = tools.ranks.get(&rank)?.clone();
            Some((handle, tools.node_of(rank), self.info(rank).cloned()))
        };
        let job = StageJob {
            tools: tools.clone(),
            id: active.id.clone(),
            version: active.version.clone(),
            request: active.request.clone(),
            committed: committed.map(|committed| committed.commit),
            nodes: nodes.clone(),
            engines: self.machine.lives().filter_map(engine).collect(),
            models: BTreeMap::new(),
            holds_other: None,
            tied: Vec::new(),
        };
        let job = self.spawn(action, async move {
            let (result, extra) = match job.run().await {
                Ok((staging, extra)) => (Ok(Box::new(staging)), extra),
                Err(failed) => (Err(failed), Extra::default()),
            };
            (Some(Event::Staged { run, result }), extra)
        });
        if let Some(active) = &mut self.active {
            active.staged = nodes;
            active.stage_job = Some(job);
        }
    }

    fn load_on(&self, rank: EngineIndex, target: Target, checkpoint: Checkpoint, limit: Duration) -> Load {
        let active = self.active.as_ref();
        let takes_adapters = self.info(rank).is_some_and(|info| info.max_lora_rank.is_some());
        let recovery = active.is_some_and(|active| active.recovery);
        let node = self.tools.node_of(rank);
        let committed = self.machine.committed().map(|c| c.commit.adapters.clone()).unwrap_or_default();
        Load {
            id: active.map(|active| active.id.clone()).unwrap_or_default(),
            target,
            checkpoint: active
                .is_none_or(|active| active.request.has_weights() || recovery)
                .then_some(checkpoint),
            changes: active.and_then(|active| active.adapters.get(&node).cloned()).unwrap_or_default(),
            load_committed: (recovery && takes_adapters).then_some(committed),
            tools: self.tools.clone(),
            limit,
        }
    }

    fn write_ledger(&mut self, ledger: Ledger) -> impl Future<Output = std::io::Result<()>> + Send + 'static {
        self.ledger_number += 1;
        let (journal, number) = (self.tools.journal.clone(), self.ledger_number);
        blocking(move || journal.write_ledger(number, &ledger))
    }

    fn progress(&self) {
        let Some(active) = &self.active else {
            return;
        };
        let snapshot = self.machine.snapshot();
        if let Some(guard) = &active.guard {
            guard.doing(&snapshot.phase.to_string());
        }
        if snapshot.phase == Phase::Idle {
            return; // the record follows
        }
        active.tell(&UpdateEvent::Progress { phase: snapshot.phase, ranks: snapshot.ranks });
    }

    fn refuse(&self, refused: Active, refusal: &Refusal) {
        let (_, external_weights) = self.control_seen;
        let version = match external_weights {
            true => WeightVersion::unknown(),
            false => self.machine.snapshot().version,
        };
        let record =
            UpdateRecord::refused(refused.id, &refused.request, refusal, version, refused.started_unix_ms);
        info!("{}", record.message);
        tell_end(refused.followers, &record);
    }

    fn conclude(&mut self, action: Action, run: RunId, conclusion: Conclusion) {
        let ledger = self.write_ledger(conclusion.ledger.clone());
        let tools = self.tools.clone();
        let Some(active) = &mut self.active else {
            return;
        };
        let Conclusion { record, version, .. } = &conclusion;
        let ended = UpdateRecord::ended(record.clone(), version.clone(), active.started_unix_ms);
        match ended.outcome() {
            Outcome::Committed => info!("{}", ended.message),
            _ => warn!("{}", ended.message),
        }
        for warning in &record.warnings {
            warn!(id = %record.id, "{warning}");
        }
        if let Some(job) = active.stage_job.take() {
            job.abort();
        }
        active.record = Some(ended.clone());
        let unused = conclusion.recovery || !active.request.has_weights();
        let nodes = if unused { Vec::new() } else { active.staged.clone() };
        let (id, commit, adapters) = (record.id.clone(), record.committed, conclusion.adapters.clone());
        let guard = active.guard.take();
        self.spawn_plain(action, async move {
            if let Err(error) = admission(&tools.handles(&conclusion.gates), true, TELL_LIMIT).await {
                error!("admission could not be opened: {error}");
            }
            let journal = tools.journal.clone();
            let written = blocking(move || {
                let doubt = match &conclusion.committed {
                    Some(committed) => journal.write(committed)?,
                    None => None,
                };
                journal.remember(&ended)?;
                doubt.map_or(Ok(()), Err)
            });
            for written in [written.await, ledger.await] {
                if let Err(error) = written {
                    // The commit record itself is there; only details are lost, or an end is recovered again.
                    warn!(%error, "the update's record was not written");
                }
            }
            if let Some(digests) = &adapters {
                tools.keep_adapters(digests).await;
            }
            tools.settle(&nodes, &id, commit).await;
            let guard = match guard {
                Some(guard) => Some(guard),
                // Lost with the work that was lost, or never had.
                None => tools.control.acquire("end of an update", TELL_LIMIT).await.ok(),
            };
            if let Some(guard) = guard {
                if conclusion.weights_known {
                    guard.weights_known().await;
                }
                if let Some(Pause { by }) = conclusion.inherit {
                    guard.set_paused(Some(by)).await;
                }
                guard.release().await;
            }
            Some(Event::Concluded { run })
        });
    }
}

/// Blocking work; that it panics is a panic of whoever waits for it.
pub(super) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> impl Future<Output = std::io::Result<T>> + Send + 'static {
    let work = tokio::task::spawn_blocking(work);
    async move {
        match work.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(std::io::Error::other(error)),
            },
        }
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
    load_committed: Option<BTreeMap<String, Adapter>>,
    tools: Arc<Tools>,
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
        if let Some(committed) = &self.load_committed {
            self.tools.bring_adapters(handle, &self.id, committed, self.limit).await?;
            return Ok(reports);
        }
        if self.changes.is_empty() {
            return Ok(reports);
        }
        let mut report = adapters::change(handle, &self.id, self.target, &self.changes, self.limit).await;
        if !report.ok || self.checkpoint.is_none() {
            // What it says of the weights holds no more when an adapter was not changed.
            if self.checkpoint.is_some() && report.state == WorkerState::Unchanged {
                report.state = WorkerState::RestoredMeta;
            }
            reports = vec![report];
        }
        Ok(reports)
    }
}

impl Tools {
    /// Has all nodes forget the adapters that are not committed.
    async fn keep_adapters(&self, digests: &BTreeSet<String>) {
        let kept = self.stages.all().into_iter().map(async |node| {
            if let Err(error) = self.stages.keep_adapters(node, digests.clone()).await {
                // They are in nobody's way; the next update of adapters removes them.
                warn!("unused adapters are not removed: {error}");
            }
        });
        join_all(kept).await;
    }

    /// Makes what an update has staged current, or discards it. What fails is made up for before the next use.
    async fn settle(&self, nodes: &[NodeId], id: &UpdateId, commit: bool) {
        let nodes = nodes.iter().copied().filter(|node| self.stages.has_stage(*node));
        let settled = nodes.map(async |node| {
            for left in (0..SETTLE_ATTEMPTS).rev() {
                match self.settle_once(node, id, commit).await {
                    Ok(()) => return,
                    Err(error) if left == 0 => warn!(%id, "staging area is not settled yet: {error}"),
                    Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                }
            }
        });
        join_all(settled).await;
    }

    async fn settle_once(&self, node: NodeId, id: &UpdateId, commit: bool) -> Result<(), String> {
        if !commit {
            self.stages.discard(node, id).await?;
        } else if self.stages.state(node).await?.staged.is_some() {
            self.stages.commit(node, id).await?;
        } // else nothing was staged there: the engines have loaded from a directory.
        Ok(())
    }
}

/// Opens or closes the gate of all ranks.
pub(super) async fn admission(ranks: &[RankHandle], open: bool, limit: Duration) -> Result<(), String> {
    let answers = ranks.iter().map(|rank| rank.ask_within(limit, Admission { open }));
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
