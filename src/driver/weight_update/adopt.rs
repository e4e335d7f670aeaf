//! Taking over engines that live on from before a restart of the sidecar.

use super::jobs::on_node;
use super::*;

/// How long the recovery waits for a control round that is under way; then it goes on without the lock.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause deadline where no update says another one.
const PAUSE_DEADLINE: Duration = Duration::from_secs(30);

/// What the engines say.
pub(super) struct Found {
    infos: BTreeMap<EngineIndex, EngineInfo>,
    paused: BTreeSet<EngineIndex>,
}

impl Task {
    /// Asks the engines first.
    pub(super) fn adopt(&mut self, ranks: Vec<(EngineIndex, Incarnation)>, reply: RestoreReply) {
        if self.config.kind == GroupKind::Lockstep && ranks.len() < self.ranks.len() {
            let reason = format!("{} of the {} ranks of the lockstep group", ranks.len(), self.ranks.len());
            ignore_gone(reply.send(Err(UpdateError::Adopt { reason })));
            return;
        }
        let handles: Vec<RankHandle> =
            ranks.iter().filter_map(|(rank, _)| self.ranks.get(rank).cloned()).collect();
        let limit = self.config.call_timeout;
        self.restoring += 1;
        self.jobs.spawn(async move {
            let asked = handles.iter().map(async |handle| {
                let (info, paused) = futures::join!(
                    shim::info(handle, limit),
                    handle.call("is_scheduler_paused", Vec::new(), limit)
                );
                (handle.rank, info, paused)
            });
            let mut found = Found { infos: BTreeMap::new(), paused: BTreeSet::new() };
            for (rank, info, paused) in join_all(asked).await {
                match info {
                    Ok(info) => {
                        found.infos.insert(rank, info);
                    }
                    Err(error) => warn!(rank = rank.0, "engine that lives on: {error}"),
                }
                match paused {
                    Ok(rmpv::Value::Boolean(true)) => {
                        found.paused.insert(rank);
                    }
                    Ok(_) => {}
                    Err(error) => warn!(rank = rank.0, %error, "is the engine paused?"),
                }
            }
            Done::Looked { ranks, found, reply }
        });
    }

    /// Decides which of them need a recovery.
    pub(super) fn looked(
        &mut self,
        ranks: Vec<(EngineIndex, Incarnation)>,
        found: Found,
        reply: RestoreReply,
    ) {
        self.restoring -= 1;
        if found.paused.is_empty() && ranks.len() == self.ranks.len() && self.ledger.pause.take().is_some() {
            // Resumed, and the sidecar before ended in the moment between.
            self.save_ledger();
        }
        let committed = self.committed.as_ref().map(|committed| committed.commit.version.0.clone());
        let suspect = |(rank, incarnation): &(EngineIndex, Incarnation)| {
            let snapshot = self.ranks.get(rank).map(|handle| handle.snapshot.borrow().clone());
            let stamp = snapshot.as_ref().and_then(|snapshot| snapshot.weight_version.as_ref());
            self.ledger.suspects(*rank, *incarnation)
                || snapshot.as_ref().is_none_or(|snapshot| !snapshot.admitted)
                || (committed.is_some() && stamp != committed.as_ref())
        };
        let stay_paused = self.ledger.pause.is_some();
        let paused = |rank: &(EngineIndex, Incarnation)| !stay_paused && found.paused.contains(&rank.0);
        let reload = ranks.iter().any(suspect);
        let lockstep = self.config.kind == GroupKind::Lockstep;
        let any = reload || ranks.iter().any(paused);
        let treat: BTreeMap<EngineIndex, Participant> = ranks
            .iter()
            .filter(|rank| any && (lockstep || suspect(rank) || paused(rank)))
            .map(|(rank, incarnation)| {
                (*rank, Participant { incarnation: *incarnation, node: self.place(*rank) })
            })
            .collect();
        self.any_restored = true;
        for (rank, incarnation) in &ranks {
            let info = found.infos.get(rank).cloned();
            self.lives.insert(*rank, Life { incarnation: *incarnation, admitted: true, info });
        }
        if treat.is_empty() {
            self.accept(ranks, !found.paused.is_empty(), reply);
            return;
        }
        if reload && self.ledger.pause.as_ref().is_some_and(|pause| pause.asleep) {
            let reason = "engines sleep whose weights are not trusted".to_owned();
            ignore_gone(reply.send(Err(UpdateError::Adopt { reason })));
            return;
        }
        if let Some(waiting) = self.active.take() {
            // It has not begun, or these engines would not have been looked at.
            let reason = "engines are taken over after a restart of the sidecar".to_owned();
            self.refuse(waiting, UpdateOutcome::RefusedBusy, reason);
        }
        let begun = self.ledger.begun.clone();
        let commit = self.committed.as_ref().map(|committed| &committed.commit);
        let rolls_forward = begun.as_ref().is_some_and(|begun| commit.is_some_and(|c| c.id == begun.id));
        let id = begun.as_ref().map_or_else(|| UpdateId("adoption".to_owned()), |begun| begun.id.clone());
        let recover = Recover {
            id: id.clone(),
            committed: rolls_forward,
            to_version: begun.as_ref().map(|begun| begun.to_version.clone()).unwrap_or_default(),
            source: begun.as_ref().map(|begun| begun.source.clone()).unwrap_or_default(),
            version: self.machine.snapshot().version,
            digest: commit.and_then(|commit| commit.checkpoint.digest.clone()).filter(|_| reload),
            mode: begun.as_ref().map(|begun| begun.mode).unwrap_or_default(),
            pause_deadline: PAUSE_DEADLINE,
            participants: treat,
            stay_paused,
            reload,
        };
        warn!(
            %id, version = %recover.version, ranks = recover.participants.len(), reload,
            "engines are brought to the committed weights after a restart of the sidecar"
        );
        self.run += 1;
        let (run, control) = (self.run, self.control.clone());
        self.jobs.spawn(async move {
            Done::Acquired(run, control.acquire("recovery after a restart", PATIENCE).await)
        });
        let request = UpdateRequest {
            mode: recover.mode,
            pause_deadline: recover.pause_deadline,
            ..UpdateRequest::new(recover.source.clone())
        };
        self.active = Some(Active {
            id,
            version: recover.to_version.clone(),
            run,
            followers: Vec::new(),
            guard: None,
            begun: true,
            started_unix_ms: unix_ms(),
            infos: found.infos,
            model_path: None,
            staged: Vec::new(),
            stage_job: None,
            adapters: Prepared::default(),
            startup: None,
            recovery: Some(Recovery { recover, begun, ranks, reply }),
            request,
        });
    }

    /// They hold what they held.
    fn accept(&mut self, ranks: Vec<(EngineIndex, Incarnation)>, paused: bool, reply: RestoreReply) {
        info!(ranks = ranks.len(), "engines live on with the committed weights");
        self.trust(&ranks);
        let (control, pause) = (self.control.clone(), self.ledger.pause.clone().filter(|_| paused));
        let handles: Vec<RankHandle> =
            ranks.iter().filter_map(|(rank, _)| self.ranks.get(rank).cloned()).collect();
        self.jobs.spawn(async move {
            // The sidecar before may have ended in a drain, or just before a pause.
            if let Err(error) = super::actions::admission(&handles, true, TELL_LIMIT).await {
                warn!("gates of engines that live on: {error}");
            }
            if let Some(Pause { by, asleep }) = pause
                && let Ok(guard) = control.acquire("recovery after a restart", PATIENCE).await
            {
                guard.inherit(by, asleep).await;
                guard.release().await;
            }
            ignore_gone(reply.send(Ok(())));
            Done::Nothing
        });
    }

    pub(super) fn start_recovery(&mut self, mut active: Active, guard: Option<ControlGuard>) {
        active.guard = guard;
        let recover = active.recovery.as_ref().map(|recovery| recovery.recover.clone());
        self.active = Some(active);
        if let Some(recover) = recover {
            self.event(Event::Recover(recover));
        }
    }

    /// Finds what engines of a node must load to hold the committed weights.
    pub(super) fn stage_committed(&mut self, node: NodeId) {
        let Some((active, recovery)) =
            self.active.as_ref().and_then(|active| Some((active, active.recovery.as_ref()?)))
        else {
            return;
        };
        let run = active.run;
        if !recovery.recover.reload {
            self.event(Event::Staged { node, new: Checkpoint::default(), previous: None });
            return;
        }
        let path = |node| {
            let mut there = active.infos.iter().filter(|(rank, _)| self.place(**rank) == node);
            there.next().map(|(_, info)| info.model_path.clone()).unwrap_or_default()
        };
        let before = recovery.begun.as_ref().and_then(|begun| begun.previous.get(&node)).cloned();
        let leader = self.stages.in_order(self.places.values().copied().collect()).first().copied();
        let leader = leader.unwrap_or(node);
        let (own, leaders) = (path(node), path(leader));
        let commit = self.committed.as_ref().map(|committed| committed.commit.clone());
        let (stages, known, cancel) = (self.stages.clone(), self.known.clone(), self.cancel.flag());
        let limit = self.config.machine.stage_timeout;
        self.jobs.spawn(async move {
            let found = match (commit, before) {
                (Some(commit), _) => on_node(&stages, node, &commit, &own, limit).await,
                (None, Some(before)) => Ok(before),
                (None, None) => {
                    nodes::startup(&stages, &known, &cancel, (leader, &leaders), (node, &own)).await
                }
            };
            Done::Event(
                run,
                match found {
                    Ok(new) => Event::Staged { node, new, previous: None },
                    Err(error) => Event::StageFailed { node, error },
                },
            )
        });
    }

    pub(super) fn recovered(&mut self, record: &UpdateRecord, recovery: Recovery) {
        let group = self.config.kind == GroupKind::Lockstep;
        let result = match &record.outcome {
            UpdateOutcome::Degraded { .. } if group => {
                Err(UpdateError::Adopt { reason: record.message.clone() })
            }
            _ => Ok(()),
        };
        let there: Vec<_> =
            recovery.ranks.into_iter().filter(|(rank, _)| self.lives.contains_key(rank)).collect();
        self.trust(&there);
        ignore_gone(recovery.reply.send(result));
    }

    /// These engines hold the committed weights: nothing that was on record about them counts, and requests may
    /// pass.
    pub(super) fn trust(&mut self, ranks: &[(EngineIndex, Incarnation)]) {
        let mut changed = false;
        if self.active.as_ref().is_none_or(|active| !active.begun) {
            for (rank, incarnation) in ranks {
                changed |= self.ledger.restored(*rank, *incarnation);
            }
        }
        if changed {
            self.save_ledger();
        }
        let closed = |handle: &RankHandle| !handle.snapshot.borrow().admission_open;
        let gates: Vec<RankHandle> =
            ranks.iter().filter_map(|(rank, _)| self.ranks.get(rank).cloned()).filter(closed).collect();
        self.jobs.spawn(async move {
            if let Err(error) = actions::admission(&gates, true, TELL_LIMIT).await {
                warn!("admission could not be opened: {error}");
            }
            Done::Nothing
        });
    }

    pub(super) fn save_ledger(&mut self) {
        let write = self.write_ledger();
        self.jobs.spawn(async move {
            if let Err(error) = write.await {
                warn!(%error, "the ledger was not written");
            }
            Done::Nothing
        });
    }

    // --- what the control task knows and a successor must know ---

    pub(super) fn watch_control(&mut self) {
        let mut control = self.control.watch();
        control.mark_unchanged();
        self.jobs.spawn(async move {
            match control.changed().await {
                Ok(()) => Done::Control,
                Err(_) => Done::Nothing,
            }
        });
    }

    pub(super) fn control_changed(&mut self) {
        self.watch_control();
        let now = self.control.snapshot();
        let pause = now.paused_by.map(|by| Pause { by, asleep: now.asleep });
        let now = (pause, now.external_weights);
        let before = std::mem::replace(&mut self.control_seen, now.clone());
        // What was before this sidecar is not known to the control task: only changes count.
        if now.0 != before.0 {
            self.ledger.pause.clone_from(&now.0);
        }
        if now.1 != before.1 {
            self.ledger.external_weights = now.1;
        }
        if now != before {
            self.save_ledger();
        }
    }
}
