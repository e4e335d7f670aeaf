//! The load of the new weights, or back to the previous ones.

use crate::EngineIndex;
use crate::machine::mutation::{Mutation, mutated};

use super::super::record::Commit;
use super::super::types::{Action, Target};
use super::super::vocabulary::RankProgress as State;
use super::super::vocabulary::{Call, Checkpoint, Phase, WorkerReport, WorkerState};
use super::{Cx, LOAD_ATTEMPTS, Run, Step, millis};

impl Run {
    pub(super) fn start_load(&mut self, cx: &mut Cx<'_>, target: Target) {
        let (step, phase, loading) = match target {
            Target::New => (Step::Loading, Phase::Loading, State::Loading),
            Target::Previous => (Step::RollingBack, Phase::RollingBack, State::RollingBack),
        };
        self.loads_begun |= target == Target::New;
        self.enter(step, phase, cx.config.load_timeout, cx);
        let any_touched = self.ranks.values().any(|state| state.active && state.touched);
        let external = self.begin.external_weights;
        for rank in self.active() {
            let Some(state) = self.ranks.get_mut(&rank) else {
                continue;
            };
            let checkpoint = match target {
                Target::New => self.new.get(&state.node),
                Target::Previous => self.previous.get(&state.node).and_then(Option::as_ref),
            };
            if target == Target::Previous {
                if mutated(Mutation::RollBackFailedRanksOnly) && state.record.times.state == State::Loaded {
                    continue;
                }
                if !(state.touched || (external && any_touched)) {
                    continue;
                }
            }
            let Some(checkpoint) = checkpoint.cloned() else {
                self.fence(cx, rank, "there is no previous checkpoint to go back to");
                continue;
            };
            state.waiting = true;
            state.attempt = 1;
            state.sent_at = cx.now;
            state.record.times.state = loading;
            cx.actions.push_back(Action::Load { call: state.call(rank), target, checkpoint });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    pub(super) fn loaded(
        &mut self,
        cx: &mut Cx<'_>,
        Call { rank, incarnation, .. }: Call,
        target: Target,
        result: Result<Vec<WorkerReport>, String>,
    ) {
        let expected = match self.step {
            Step::Loading => Target::New,
            Step::RollingBack => Target::Previous,
            _ => return,
        };
        if target != expected {
            return;
        }
        let Some(node) = self.awaited(rank, incarnation).map(|state| state.node) else {
            return;
        };
        let wanted = match target {
            Target::New => self.new.get(&node).cloned(),
            Target::Previous => self.previous.get(&node).cloned().flatten(),
        };
        let wanted = wanted.unwrap_or_default();
        let (fault, workers) = match result {
            Ok(workers) => (verify(&workers, &wanted), workers),
            Err(error) => (Some(format!("load failed: {error}")), Vec::new()),
        };
        let unchanged =
            !workers.is_empty() && workers.iter().all(|worker| worker.state == WorkerState::Unchanged);
        let unverified = fault.is_none()
            && wanted.digest.is_some()
            && wanted.extents.is_empty()
            && workers.iter().any(|worker| worker.digest.is_none());
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        state.waiting = false;
        state.record.workers = workers;
        let took = millis(cx.now - state.sent_at);
        match (target, &fault) {
            (Target::New, None) => {
                state.touched = true;
                state.record.times.load_ms = Some(took);
                state.record.times.state = State::Loaded;
            }
            (Target::New, Some(_)) => {
                state.touched = !unchanged;
                state.record.times.load_ms = Some(took);
                state.record.times.state = State::LoadFailed;
                self.load_failed |= !self.begin.forward_only;
            }
            (Target::Previous, None) => {
                state.touched = false;
                state.record.times.rollback_ms = Some(took);
                state.record.times.state = State::RolledBack;
            }
            (Target::Previous, Some(_)) => state.record.times.rollback_ms = Some(took),
        }
        if let Some(fault) = fault {
            let fault = format!("rank {rank}: {fault}");
            if target == Target::Previous {
                self.fence(cx, rank, &format!("rollback failed: {fault}"));
            } else if self.begin.forward_only {
                self.load_again(cx, rank, fault, wanted);
            } else {
                state.record.times.errors.push(fault.clone());
                self.fail(fault);
            }
        }
        if unverified {
            self.warn(format!(
                "rank {rank}: the digest was not computed there (module blake3 missing?); counts and bytes agree"
            ));
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    /// There is nothing to go back to.
    fn load_again(&mut self, cx: &mut Cx<'_>, rank: EngineIndex, fault: String, checkpoint: Checkpoint) {
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        state.record.times.errors.push(fault.clone());
        if state.attempt >= LOAD_ATTEMPTS {
            self.fence(cx, rank, &fault);
            return;
        }
        state.attempt += 1;
        state.waiting = true;
        state.record.times.state = State::Loading;
        cx.actions.push_back(Action::Load { call: state.call(rank), target: Target::New, checkpoint });
    }

    pub(super) fn all_loaded(&mut self, cx: &mut Cx<'_>) {
        if self.recovery.is_some() {
            // The journal has decided long ago.
            self.stamp_and_reset(cx);
            return;
        }
        if self.load_failed {
            self.start_load(cx, Target::Previous);
            return;
        }
        self.enter_phase(cx, Phase::Verifying);
        // Each report was compared with the manifest when it came; what is left is that all agree, which
        // follows from all being equal to the same manifest.
        self.enter(Step::WritingCommit, Phase::Committing, cx.config.commit_timeout, cx);
        cx.actions.push_back(Action::Progress);
        if mutated(Mutation::SkipCommitRecord) {
            self.commit_written(cx, Ok(None));
            return;
        }
        cx.actions.push_back(Action::WriteCommit {
            commit: Commit {
                id: self.begin.id.clone(),
                version: self.begin.to_version.clone(),
                checkpoint: self.new.values().next().cloned().unwrap_or_default(),
                source: self.begin.source.clone(),
                nodes: self.new.clone(),
                ..Commit::default()
            },
        });
    }
}

fn verify(workers: &[WorkerReport], wanted: &Checkpoint) -> Option<String> {
    if workers.is_empty() {
        return Some("no worker answered to the load".to_owned());
    }
    workers.iter().find_map(|worker| worker.fault(wanted))
}
