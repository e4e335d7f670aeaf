//! The machine's actions, performed.

use super::*;

impl Task {
    pub(super) async fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.act(action).await;
        }
    }

    pub(super) async fn act(&mut self, action: Action) {
        let run = self.run;
        let machine = &self.config.machine;
        match action {
            Action::Stage { .. } => self.stage(),
            Action::CloseAdmission => {
                let limit = machine.admission_timeout;
                let handles: Vec<RankHandle> = self.ranks.values().cloned().collect();
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
                let id = self.active.as_ref().map(|active| active.id.clone());
                let id = id.unwrap_or_default();
                if target == Target::Previous {
                    warn!(rank = rank.0, path = checkpoint.path, "loading the previous weights");
                }
                self.call(rank, async move |handle| Event::Loaded {
                    rank,
                    incarnation,
                    target,
                    result: shim::load(&handle, &id, &checkpoint, limit).await,
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
            Action::OpenAdmission => {
                let handles: Vec<RankHandle> = self.ranks.values().cloned().collect();
                if let Err(error) = admission(&handles, true, TELL_LIMIT).await {
                    error!("admission could not be opened: {error}");
                }
            }
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

    pub(super) fn stage(&mut self) {
        let Some(active) = &self.active else {
            return;
        };
        let run = active.run;
        let events = active.followers.iter().map(|follower| follower.events.clone()).collect();
        let job = StageJob {
            source: active.request.path.clone(),
            allow_no_rollback: active.request.allow_no_rollback,
            committed: self.committed.as_ref().map(|c| c.commit.clone()),
            engines: self
                .lives
                .iter()
                .filter_map(|(rank, life)| Some((self.ranks.get(rank)?.clone(), life.info.clone())))
                .collect(),
            call_timeout: self.config.call_timeout,
            known: self.known.clone(),
            cancel: self.cancel.flag(),
        };
        self.jobs.spawn(async move { Done::Staged(run, job.run(events).await) });
    }

    pub(super) fn write_commit(&mut self, commit: Commit) {
        let run = self.run;
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

    pub(super) async fn fence(&mut self, rank: EngineIndex, incarnation: Incarnation, why: String) {
        error!(rank = rank.0, "engine is fenced: {why}");
        self.lives.remove(&rank);
        let down = RankCommand::EngineDown { incarnation, reason: format!("fenced: {why}") };
        let request = FenceRequest { rank, incarnation, reason: why };
        let fences = self.fences.clone();
        let handle = self.ranks.get(&rank).cloned();
        let tell = async move {
            if let Some(handle) = handle
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
        let Some(active) = self.active.take() else {
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
        let mut write = None;
        if let Some(committed) = &mut self.committed
            && committed.commit.id == record.id
        {
            committed.record = Some(record);
            write = Some(committed.clone());
        }
        let journal = self.journal.clone();
        let (followers, guard) = (active.followers, active.guard);
        // Until this is done the update counts as running.
        self.active = Some(Active { guard: None, followers: Vec::new(), ..active });
        self.jobs.spawn(async move {
            if let Some(committed) = write {
                let written = tokio::task::spawn_blocking(move || journal.write(&committed)).await;
                if let Ok(Err(error)) = written {
                    // The commit record itself is there; only the details are lost after a restart.
                    warn!(%error, "the update's record was not written");
                }
            }
            if let Some(guard) = guard {
                if known {
                    guard.weights_known().await;
                }
                guard.release().await;
            }
            Done::Finished(Box::new(ended), followers)
        });
    }
}

/// Opens or closes the gate of all ranks.
async fn admission(ranks: &[RankHandle], open: bool, limit: Duration) -> Result<(), String> {
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
