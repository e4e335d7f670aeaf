//! From a request to the beginning of the update: refusals, the control lock, restores that go first.

use super::*;

impl Task {
    pub(super) fn ask(&mut self, request: UpdateRequest, follower: Follower) {
        let id = request.id.clone().unwrap_or_else(|| UpdateId(uuid::Uuid::new_v4().to_string()));
        let started_unix_ms = unix_ms();
        let current = self.machine.snapshot().version;
        let made_up = || match request.has_weights() {
            true => made_up_version(&request, &id),
            false => current.clone(), // adapters do not change the weights of the model
        };
        let version = request.version.clone().unwrap_or_else(made_up);
        let refuse = |outcome, reason: String| {
            UpdateRecord::refused(id.clone(), &request, outcome, reason, current.clone(), started_unix_ms)
        };
        if let Some(active) = &self.active {
            if active.id == id && active.is_the_same(&request) {
                self.join(follower);
                return;
            }
            let snapshot = self.machine.snapshot();
            let refusal = Refusal::Busy { running: active.id.clone(), phase: snapshot.phase };
            let refused = refuse(types::outcome_of(&refusal), refusal.to_string());
            tell_end(vec![follower], &refused);
            return;
        }
        let begin = self.begin_event(&id, &version, &request, None);
        match self.machine.check(&begin) {
            Ok(None) => {}
            Ok(Some(earlier)) => {
                let again = UpdateRecord::ended(earlier, current, started_unix_ms);
                tell_end(vec![follower], &again);
                return;
            }
            // Engines that are just being brought up will be there when it begins.
            Err(Refusal::NoEngines) if self.restoring > 0 => {}
            Err(refusal) => {
                let refused = refuse(types::outcome_of(&refusal), refusal.to_string());
                tell_end(vec![follower], &refused);
                return;
            }
        }
        self.run += 1;
        let run = self.run;
        let control = self.control.clone();
        let owner = format!("update {id}");
        let patience = request.patience;
        self.jobs.spawn(async move { Done::Acquired(run, control.acquire(owner, patience).await) });
        self.active = Some(Active {
            id,
            version,
            run,
            followers: vec![follower],
            guard: None,
            begun: false,
            started_unix_ms,
            infos: BTreeMap::new(),
            model_path: None,
            staged: Vec::new(),
            stage_job: None,
            adapters: Prepared::default(),
            startup: None,
            recovery: None,
            request,
        });
    }

    pub(super) fn follow(&mut self, id: Option<UpdateId>) -> Result<UpdateRun, UpdateError> {
        match &self.active {
            Some(active) if id.as_ref().is_none_or(|id| *id == active.id) => {
                let (follower, run) = UpdateRun::new();
                self.join(follower);
                Ok(run)
            }
            _ => Err(UpdateError::NotRunning { id }),
        }
    }

    /// Somebody follows the update that runs, and is told at once where it is: the next step may be far.
    fn join(&mut self, follower: Follower) {
        let snapshot = self.machine.snapshot();
        if snapshot.phase != Phase::Idle {
            let phase = snapshot.phase;
            follower.events.try_send(UpdateEvent::Progress { phase, ranks: snapshot.ranks }).ok();
            let staging = self.staging.iter().filter(|_| phase == Phase::Staging);
            for (&node, &progress) in staging {
                let name = self.stages.name(node);
                follower.events.try_send(UpdateEvent::Staging { node, name, progress, rate: 0 }).ok();
            }
        }
        if let Some(active) = &mut self.active {
            active.followers.push(follower);
        }
    }

    pub(super) fn place(&self, rank: EngineIndex) -> NodeId {
        self.places.get(&rank).copied().unwrap_or_default()
    }

    pub(super) fn begin_event(
        &self,
        id: &UpdateId,
        version: &WeightVersion,
        request: &UpdateRequest,
        guard: Option<&ControlGuard>,
    ) -> Begin {
        let participant = |rank: EngineIndex, life: &Life| Participant {
            incarnation: life.incarnation,
            node: self.place(rank),
        };
        let external =
            guard.map_or_else(|| self.control.snapshot().external_weights, |guard| guard.external_weights);
        Begin {
            id: id.clone(),
            from_version: request.from_version.clone(),
            to_version: version.clone(),
            source: request.source_name(),
            mode: request.mode,
            pause_deadline: request.pause_deadline,
            participants: self.lives.iter().map(|(rank, life)| (*rank, participant(*rank, life))).collect(),
            paused_before: guard.is_some_and(|guard| guard.paused_by.is_some()),
            external_weights: external || self.ledger.external_weights,
            forward_only: request.retain == Retain::None,
        }
    }

    /// Starts what had to wait: restores while no update runs, an update while no restore runs.
    pub(super) fn start_waiting(&mut self) {
        let running = self.active.as_ref().is_some_and(|active| active.begun);
        if !running {
            while let Some((ranks, reply)) = self.restores.pop_front() {
                self.restore(ranks, reply);
            }
        }
        if self.active.is_none()
            && let Some((ranks, reply)) = self.adopts.pop_front()
        {
            self.adopt(ranks, reply);
        }
        if self.restoring > 0 {
            return;
        }
        let Some(mut active) = self.active.take() else {
            return;
        };
        if active.begun || active.guard.is_none() {
            self.active = Some(active);
            return;
        }
        let absent = self.ranks.values().filter(|handle| !self.lives.contains_key(&handle.rank));
        let unreached: Vec<String> = absent
            .clone()
            .filter(|handle| {
                let snapshot = handle.snapshot.borrow();
                snapshot.admitted || snapshot.incarnation == Incarnation(0)
            })
            .map(|handle| handle.rank.to_string())
            .collect();
        if !unreached.is_empty() {
            let reason = format!(
                "rank {} may be serving the current weights, but is not reached",
                unreached.join(", ")
            );
            self.refuse(active, UpdateOutcome::RefusedInvalid, reason);
            return;
        }
        let missing: Vec<String> = absent.map(|handle| handle.rank.to_string()).collect();
        if self.config.kind == GroupKind::Lockstep && !missing.is_empty() {
            let reason =
                format!("the lockstep group is not complete: rank {} is not serving", missing.join(", "));
            self.refuse(active, UpdateOutcome::RefusedInvalid, reason);
            return;
        }
        if !missing.is_empty() {
            info!(
                ranks = missing.join(", "),
                "not serving now; brought to the new weights when started again"
            );
        }
        active.begun = true;
        let begin = self.begin_event(&active.id, &active.version, &active.request, active.guard.as_ref());
        info!(
            id = %active.id, version = %active.version, path = %active.request.path.display(),
            mode = %active.request.mode, ranks = begin.participants.len(), "update begins"
        );
        self.active = Some(active);
        self.event(Event::Begin(begin));
    }

    pub(super) fn refuse(&self, active: Active, outcome: UpdateOutcome, reason: String) {
        let current = self.machine.snapshot().version;
        let refused = UpdateRecord::refused(
            active.id,
            &active.request,
            outcome,
            reason,
            current,
            active.started_unix_ms,
        );
        info!("{}", refused.message);
        tell_end(active.followers, &refused);
    }
}
