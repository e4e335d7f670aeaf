//! Engines that become ready, and engines that live on from before a restart.

use std::time::Duration;

use super::super::{Begin, Outcome, Participant};
use super::*;
use crate::machine::memory::Weights;

/// How long a recovery waits for a control round that is under way; then it goes on without the lock.
const PATIENCE: Duration = Duration::from_secs(30);
/// The way out where committed weights cannot be had.
const TO_FORGET: &str =
    "bring it back, or start with --forget-committed to serve the checkpoint of the command line";
/// Pause deadline where no update says another one.
const PAUSE_DEADLINE: Duration = Duration::from_secs(30);

impl Updates {
    pub(super) fn adopt(&mut self, job: Job) {
        if self.config.kind.is_lockstep() && job.engines.len() < self.nodes.len() {
            let (known, all) = (job.engines.len(), self.nodes.len());
            let reason = format!("{known} of the {all} ranks of the lockstep group");
            return self.not_adopted(job.ticket, reason);
        }
        self.waiting.push_back(job);
    }

    fn not_adopted(&mut self, ticket: Ticket, reason: String) {
        self.actions.push_back(Action::Answer { ticket, result: Err(Failure::Adopt { reason }) });
    }

    pub(super) fn inspect(&mut self, job: Job) {
        let commit = self.committed.as_ref().map(|committed| &committed.commit);
        let directory = commit.filter(|commit| !job.adopted && commit.checkpoint.extents.is_empty());
        self.actions.push_back(Action::Inspect {
            ticket: job.ticket,
            engines: job.engines.clone(),
            adopted: job.adopted,
            directory: directory.map(|commit| commit.checkpoint.clone()),
        });
        self.jobs.insert(job.ticket, job);
    }

    pub(super) fn inspected(&mut self, ticket: Ticket, found: &Found) {
        let Some(job) = self.jobs.get(&ticket) else {
            return;
        };
        if job.adopted {
            self.look(ticket, found);
            return;
        }
        let Some(committed) = self.committed.clone() else {
            self.restored(ticket);
            return;
        };
        let engines = job.engines.clone();
        let silent = found.models.iter().find_map(|(rank, model)| Some((*rank, model.as_ref().err()?)));
        if let Some((rank, reason)) = silent {
            self.failed(ticket, Some(rank), reason.clone());
            return;
        }
        if !self.decided {
            // Those that serve are yet to be adopted: they hold the committed weights.
            let others_serve =
                self.seen.iter().any(|(rank, seen)| seen.admitted && !engines.contains_key(rank));
            if !others_serve && let Some(why) = of_another_model(&committed, found) {
                self.actions.push_back(Action::Forget { ticket, why });
                return;
            }
            self.decided = true;
        }
        if found.missing && mutated(Mutation::ForgetPerJob) {
            self.restored(ticket);
            return;
        }
        if found.missing {
            let path = &committed.commit.checkpoint.path;
            self.failed(ticket, None, format!("there is no directory {path} on its node; {TO_FORGET}"));
            return;
        }
        if let Some(job) = self.jobs.get_mut(&ticket) {
            job.commit = Some(committed.commit.id.clone());
        }
        self.actions.push_back(Action::Restore { ticket, engines, committed: Box::new(committed) });
    }

    pub(super) fn forgotten(&mut self, ticket: Ticket, result: Result<(), String>) {
        if !self.jobs.contains_key(&ticket) {
            return;
        }
        if let Err(error) = result {
            self.failed(ticket, None, format!("the commit record cannot be removed: {error}"));
            return;
        }
        (self.decided, self.forgotten) = (true, true);
        self.committed = None;
        self.machine = transaction(&self.config, None);
        self.restored(ticket);
    }

    pub(super) fn restored(&mut self, ticket: Ticket) {
        let committed = self.committed.as_ref().map(|committed| &committed.commit.id);
        if self.jobs.get(&ticket).is_some_and(|job| job.commit.as_ref() != committed)
            && !mutated(Mutation::ForgetPerJob)
        {
            self.failed(ticket, None, "other weights were committed meanwhile".to_owned());
            return;
        }
        let Some(job) = self.jobs.remove(&ticket) else {
            return;
        };
        self.trust(&job.engines);
        for (rank, incarnation) in job.engines {
            let seen = self.seen.get(&rank).cloned().unwrap_or_default();
            let admitted = seen.incarnation == incarnation && seen.admitted;
            if seen.incarnation <= incarnation {
                self.lives.insert(rank, Life { incarnation, admitted });
            }
        }
        self.actions.push_back(Action::Answer { ticket, result: Ok(()) });
    }

    /// A restore or an adoption has failed; `rank`: on this one.
    pub(super) fn failed(&mut self, ticket: Ticket, rank: Option<EngineIndex>, reason: String) {
        let job = self.jobs.get(&ticket).cloned();
        if !mutated(Mutation::KeepFailedRestores) {
            self.jobs.remove(&ticket);
        }
        let adopted = self.taken_over.remove(&ticket);
        let failure = match job {
            Some(Job { adopted: false, engines, .. }) => Failure::Restore {
                rank: rank.or_else(|| engines.keys().next().copied()).unwrap_or_default(),
                version: self.machine.snapshot().version,
                reason,
            },
            None if !adopted => return,
            _ => Failure::Adopt { reason },
        };
        self.actions.push_back(Action::Answer { ticket, result: Err(failure) });
    }

    /// Decides which of the engines that live on need a recovery.
    fn look(&mut self, ticket: Ticket, found: &Found) {
        let Some(mut job) = self.jobs.remove(&ticket) else {
            return;
        };
        // It may have waited for long: those that were started again meanwhile are restored instead.
        let all = job.engines.len();
        job.engines.retain(|rank, life| self.seen.get(rank).is_none_or(|seen| seen.incarnation <= *life));
        if job.engines.len() < all && (self.config.kind.is_lockstep() || job.engines.is_empty()) {
            return self.not_adopted(ticket, "they were started again".to_owned());
        }
        if found.paused.is_empty()
            && job.engines.len() == self.nodes.len()
            && self.ledger.pause.take().is_some()
        {
            // Resumed, and the sidecar before ended in the moment between.
            self.save_ledger(None);
        }
        let committed = self.committed.as_ref().map(|committed| &committed.commit);
        let version = committed.map(|commit| commit.version.clone());
        let stay_paused = self.ledger.pause.is_some();
        let memory = |rank: &EngineIndex| self.seen.get(rank).map(|seen| seen.memory).unwrap_or_default();
        // Where what is on record is lost with the state directory, an engine may be stamped with a version that
        // nobody knows, or be paused with half of its weights loaded.
        let other_stamp = |rank: &EngineIndex| match (found.stamps.get(rank), &version) {
            (Some(stamp), _) => {
                let external = self.ledger.external_weights || memory(rank).weights != Weights::Known;
                *stamp != version.clone().unwrap_or_default() && !external
            }
            (None, version) => version.is_some(),
        };
        let unexplained = |rank: &EngineIndex| {
            let paused = found.paused.contains(rank) && !memory(rank).sleeps();
            !stay_paused && paused && !mutated(Mutation::TrustPaused)
        };
        let suspect = |rank: &EngineIndex, life: &Incarnation| {
            let admitted = self.seen.get(rank).is_some_and(|seen| seen.admitted);
            self.ledger.suspects(*rank, *life)
                || self.forgotten
                || !admitted
                || unexplained(rank)
                || (other_stamp(rank) && !mutated(Mutation::TrustStamps))
        };
        let reload = job.engines.iter().any(|(rank, life)| suspect(rank, life));
        let treated = job
            .engines
            .iter()
            .filter(|(rank, life)| reload && (self.config.kind.is_lockstep() || suspect(rank, life)));
        let participants: BTreeMap<EngineIndex, Participant> = treated
            .map(|(rank, life)| (*rank, Participant { incarnation: *life, node: self.node_of(*rank) }))
            .collect();
        let asleep = participants.keys().any(|rank| memory(rank).sleeps());
        // The sidecar before may have ended before it had that on record.
        let others = |rank: &&EngineIndex| !participants.contains_key(rank);
        let external = job.engines.keys().filter(others).any(|rank| memory(rank).weights != Weights::Known);
        let digest = committed.and_then(|commit| commit.checkpoint.digest.clone());
        let committed = committed.map(|commit| commit.id.clone());
        self.decided = true;
        if external && !self.ledger.external_weights {
            self.ledger.external_weights = true;
            self.save_ledger(None);
        }
        for (rank, incarnation) in &job.engines {
            self.lives.insert(*rank, Life { incarnation: *incarnation, admitted: true });
        }
        if participants.is_empty() {
            // They hold what they held.
            self.trust(&job.engines);
            let inherit = self.ledger.pause.clone().filter(|_| !found.paused.is_empty());
            self.taken_over.insert(ticket);
            self.actions.push_back(Action::TakeOver { ticket, engines: job.engines, inherit });
            return;
        }
        if asleep && !mutated(Mutation::RecoverAsleep) {
            let lives = participants.iter().map(|(rank, participant)| (*rank, participant.incarnation));
            self.ledger.suspects.extend(lives);
            return self.not_adopted(ticket, "engines sleep whose weights are not trusted".to_owned());
        }
        // An update that waits has not begun, or these engines would not have been looked at.
        self.refuse_asked(Refusal::TakenOver);
        let begun = self.ledger.begun.clone();
        let id = begun.as_ref().map_or_else(|| UpdateId("adoption".to_owned()), |begun| begun.id.clone());
        let open = begun.clone().unwrap_or_default();
        let version = open.to_version.clone();
        let recover = Recover {
            committed: begun.is_some() && committed.as_ref() == Some(&open.id),
            version: self.machine.snapshot().version,
            digest,
            begin: Begin {
                id: id.clone(),
                from_version: None,
                to_version: open.to_version,
                source: open.source,
                mode: open.mode,
                pause_deadline: PAUSE_DEADLINE,
                participants,
                paused_before: stay_paused,
                asleep: false,
                external_weights: true,
                forward_only: true,
            },
        };
        let kind = Kind::Recovery(Box::new(Recovery { recover, begun, job }));
        let run = self.take_up(id, version, kind);
        let owner = "recovery after a restart".to_owned();
        self.actions.push_back(Action::Acquire { run, owner, patience: PATIENCE });
    }

    /// These engines hold the committed weights: nothing that was on record about them counts, and requests may
    /// pass.
    fn trust(&mut self, engines: &Engines) {
        let mut changed = false;
        if !self.asked.as_ref().is_some_and(Asked::has_begun) {
            for (rank, incarnation) in engines {
                changed |= self.ledger.restored(*rank, *incarnation);
            }
        }
        if changed {
            self.save_ledger(None);
        }
        self.actions.push_back(Action::OpenGates { engines: engines.clone(), attempt: 1 });
    }

    pub(super) fn recovered(&mut self, recovery: Recovery, record: &Record) {
        let Job { ticket, mut engines, .. } = recovery.job;
        let fenced = matches!(record.outcome, Outcome::Degraded { .. });
        engines.retain(|rank, _| self.lives.contains_key(rank));
        self.trust(&engines);
        if fenced && self.config.kind.is_lockstep() {
            let reason = record.error.clone().unwrap_or_else(|| "engines were fenced".to_owned());
            return self.not_adopted(ticket, reason);
        }
        self.actions.push_back(Action::Answer { ticket, result: Ok(()) });
    }

    pub(super) fn rank_seen(&mut self, now: Time, rank: EngineIndex, seen: Seen) {
        let Seen { incarnation, admitted, .. } = seen;
        self.seen.insert(rank, seen);
        let Some(life) = self.lives.get_mut(&rank) else {
            return;
        };
        if life.incarnation == incarnation && admitted {
            life.admitted = true;
        }
        // What is seen lags behind: that it still is the life before this one means nothing.
        if life.incarnation < incarnation || (life.incarnation == incarnation && life.admitted && !admitted) {
            let incarnation = life.incarnation;
            self.lives.remove(&rank);
            let reason = "its rank task reports it down".to_owned();
            self.machine.handle_event(now, Answer::EngineLost { rank, incarnation, reason });
        }
    }
}

/// Why what is committed says nothing about these engines.
fn of_another_model(committed: &Committed, found: &Found) -> Option<String> {
    let known = &committed.model_path;
    let other = found.models.values().flatten().find(|model| *model != known)?;
    Some(format!("the state directory has weights committed for {known}, but the engines run {other}"))
}
