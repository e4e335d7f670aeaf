//! From the commit point on: stamp, caches, resume.

use super::super::types::{Action, Target};
use super::super::vocabulary::RankProgress as State;
use super::super::vocabulary::{Call, Phase};
use super::{Cx, RESET_ATTEMPTS, RESUME_ATTEMPTS, Rank, Run, STAMP_ATTEMPTS, Step};

impl Run {
    pub(super) fn commit_written(&mut self, cx: &mut Cx<'_>, result: Result<Option<String>, String>) {
        if self.step != Step::WritingCommit {
            return;
        }
        match result {
            Ok(None) => {}
            Ok(Some(doubt)) => self.warn(format!(
                "the commit record is written, but a crash of the leader's machine may bring the version before back: \
                 {doubt}"
            )),
            Err(error) => {
                self.fail(format!("commit record could not be written: {error}"));
                self.load_failed = true;
                self.start_load(cx, Target::Previous);
                return;
            }
        }
        self.committed = true;
        self.stamp_and_reset(cx);
    }

    /// What the engines hold must follow the record, so they start again by it.
    pub(super) fn commit_unknown(&mut self, cx: &mut Cx<'_>, error: String) {
        self.fail(error);
        self.fence_those(cx, "it is unknown whether the update is committed", |_| true);
        self.finish(cx);
    }

    /// All ranks hold the version that is, or already was, committed.
    pub(super) fn stamp_and_reset(&mut self, cx: &mut Cx<'_>) {
        self.enter(Step::Finishing, Phase::Committing, cx.config.commit_timeout, cx);
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            state.stamping = Some(1);
            let call = Call { attempt: 1, ..state.call(*rank) };
            cx.actions.push_back(Action::SetVersion { call, version: self.stamp.clone() });
        }
        self.reset_caches(cx, |_| true);
    }

    pub(super) fn reset_caches(&mut self, cx: &mut Cx<'_>, which: impl Fn(&Rank) -> bool) {
        // With `keep` frozen requests hold blocks, and vLLM would answer false.
        let reset_running_requests = self.keeps_requests();
        for (rank, state) in &mut self.ranks {
            if !state.active || !which(state) {
                continue;
            }
            state.waiting = true;
            state.attempt = 1;
            let call = state.call(*rank);
            cx.actions.push_back(Action::ResetCaches { call, reset_running_requests });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    pub(super) fn version_set(&mut self, cx: &mut Cx<'_>, call: Call, result: Result<bool, String>) {
        let Call { rank, incarnation, attempt } = call;
        if self.step != Step::Finishing {
            return;
        }
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        if !state.active || state.stamping != Some(attempt) || state.record.incarnation != incarnation {
            return;
        }
        state.stamping = None;
        match result {
            Ok(true) => {}
            Ok(false) => {
                self.warn(format!("rank {rank}: outputs do not carry the version: its vllm is too old"));
            }
            Err(_) if attempt < STAMP_ATTEMPTS => {
                state.stamping = Some(attempt + 1);
                let version = self.stamp.clone();
                cx.actions.push_back(Action::SetVersion { call: call.again(), version });
            }
            // A successor would not trust it, and clients would be told the wrong version.
            Err(error) => self.fence(cx, rank, &format!("the version could not be stamped: {error}")),
        }
        self.advance(cx);
    }

    pub(super) fn caches_reset(&mut self, cx: &mut Cx<'_>, call: Call, result: Result<bool, String>) {
        let Call { rank, incarnation, attempt } = call;
        let rolling_back = match self.step {
            Step::Finishing => false,
            Step::ResettingAfterRollback => true,
            _ => return,
        };
        let Some(state) = self.awaited(rank, incarnation).filter(|state| state.attempt == attempt) else {
            return;
        };
        let why = match result {
            Ok(true) => {
                state.waiting = false;
                if !rolling_back {
                    state.record.times.state = State::Stamped;
                }
                cx.actions.push_back(Action::Progress);
                self.advance(cx);
                return;
            }
            Ok(false) => "blocks are in use".to_owned(),
            Err(error) => error,
        };
        if attempt < RESET_ATTEMPTS {
            state.attempt += 1;
            let again = Action::ResetCaches { call: call.again(), reset_running_requests: true };
            cx.actions.push_back(again);
            return;
        }
        if rolling_back && !self.begin.external_weights {
            // What the cache holds was computed with the weights that are loaded again.
            if let Some(state) = self.awaited(rank, incarnation) {
                state.waiting = false;
            }
            self.warn(format!("rank {rank}: caches were not reset after the rollback: {why}"));
        } else {
            self.fence(cx, rank, &format!("caches of the previous weights could not be reset: {why}"));
        }
        self.advance(cx);
    }

    pub(super) fn start_resume(&mut self, cx: &mut Cx<'_>) {
        if self.begin.paused_before {
            self.finish(cx);
            return;
        }
        self.enter(Step::Resuming, Phase::Resuming, cx.config.resume_timeout, cx);
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            state.waiting = true;
            state.attempt = 1;
            state.record.times.state = State::Resuming;
            cx.actions.push_back(Action::Resume { call: state.call(*rank) });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    pub(super) fn resumed(&mut self, cx: &mut Cx<'_>, call: Call, result: Result<(), String>) {
        let Call { rank, incarnation, attempt } = call;
        if self.step != Step::Resuming {
            return;
        }
        let Some(state) = self.awaited(rank, incarnation).filter(|state| state.attempt == attempt) else {
            return;
        };
        match result {
            Ok(()) => {
                state.waiting = false;
                state.record.times.state = State::Resumed;
            }
            Err(error) if attempt < RESUME_ATTEMPTS => {
                state.attempt += 1;
                state.record.times.errors.push(format!("resume failed: {error}"));
                cx.actions.push_back(Action::Resume { call: call.again() });
            }
            Err(error) => self.fence(cx, rank, &format!("resume failed: {error}")),
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }
}
