//! Before the load: directories, admission, pause.

use crate::machine::mutation::{Mutation, mutated};

use super::super::ledger::Begun;
use super::super::types::{Action, Target};
use super::super::vocabulary::RankProgress as State;
use super::super::vocabulary::{Call, Checkpoint, NodeId, PauseMode, Phase};
use super::{Cx, Run, Step, millis};

impl Run {
    pub(super) fn staged(
        &mut self,
        cx: &mut Cx<'_>,
        node: NodeId,
        new: Checkpoint,
        previous: Option<Checkpoint>,
    ) {
        let Step::Staging { waiting } = &mut self.step else {
            return;
        };
        if !waiting.remove(&node) {
            return;
        }
        let expected = self.recovery.as_ref().and_then(|recovery| recovery.digest.clone());
        if expected.is_some() && new.digest != expected {
            let (expected, actual) = (expected.as_deref().unwrap_or("none"), new.digest.as_deref());
            let actual = actual.unwrap_or("none");
            let error = format!(
                "node {node} has other weights than the committed ones: digest {actual}, expected {expected}"
            );
            return self.stage_failed(cx, node, error);
        }
        if let Some((other, first)) = self.new.iter().next() {
            let same = first.tensors == new.tensors && first.bytes == new.bytes && first.digest == new.digest;
            if !same {
                let error = format!(
                    "nodes {other} and {node} see different checkpoints at {}: digest {} and {}",
                    self.begin.source,
                    first.digest.as_deref().unwrap_or("none"),
                    new.digest.as_deref().unwrap_or("none"),
                );
                return self.stage_failed(cx, node, error);
            }
        }
        if previous.is_none() && self.recovery.is_none() {
            self.warn(format!("the previous checkpoint is not there any more on node {node}: no way back"));
        }
        self.new.insert(node, new);
        self.previous.insert(node, previous);
        self.advance(cx);
    }

    /// A node does not have what its engines are to load.
    pub(super) fn stage_failed(&mut self, cx: &mut Cx<'_>, node: NodeId, error: String) {
        if self.recovery.is_some() {
            self.fence_those(cx, &error, |state| state.node == node);
            self.advance(cx);
        } else {
            self.invalid = true;
            self.fail(error);
            self.finish(cx);
        }
    }

    /// From here on a sidecar that takes over must look after the engines.
    pub(super) fn write_begun(&mut self, cx: &mut Cx<'_>) {
        self.enter(Step::WritingBegun, Phase::Prepared, cx.config.commit_timeout, cx);
        if mutated(Mutation::SkipBegunRecord) {
            self.close_admission(cx);
            return;
        }
        let previous = self.previous.iter();
        let begun = Begun {
            id: self.begin.id.clone(),
            from_version: self.record.from_version.clone(),
            to_version: self.begin.to_version.clone(),
            source: self.begin.source.clone(),
            mode: self.begin.mode,
            participants: self.begin.participants.clone(),
            new: self.new.clone(),
            previous: previous.filter_map(|(node, found)| Some((*node, found.clone()?))).collect(),
        };
        cx.actions.push_back(Action::WriteBegun { begun: Box::new(begun) });
    }

    pub(super) fn begun_written(&mut self, cx: &mut Cx<'_>, result: Result<(), String>) {
        if self.step != Step::WritingBegun {
            return;
        }
        match result {
            Ok(()) => self.close_admission(cx),
            Err(error) => {
                self.fail(format!("the journal could not be written: {error}"));
                self.finish(cx);
            }
        }
    }

    pub(super) fn close_admission(&mut self, cx: &mut Cx<'_>) {
        self.admission_closed = true;
        self.enter(Step::ClosingAdmission, Phase::Prepared, cx.config.admission_timeout, cx);
        cx.actions.push_back(Action::CloseAdmission);
    }

    pub(super) fn start_pause(&mut self, cx: &mut Cx<'_>) {
        self.paused_since = Some(cx.now);
        let mode = self.begin.mode;
        self.enter_phase(cx, Phase::Pausing);
        for rank in self.ranks.values_mut() {
            rank.sent_at = cx.now;
        }
        self.send_pause(cx, 1, mode);
    }

    /// To all ranks, also those that have answered an earlier attempt: a lockstep group pauses together
    /// or not at all. Only answers to the last attempt count, since a rank must not be loaded while a
    /// pause is in flight.
    pub(super) fn send_pause(&mut self, cx: &mut Cx<'_>, attempt: u32, mode: PauseMode) {
        self.step = Step::Pausing { attempt, mode };
        let limit =
            if mode == PauseMode::Abort { cx.config.abort_pause_timeout } else { self.begin.pause_deadline };
        self.deadline = Some(cx.now + limit);
        let forgotten = mutated(Mutation::ForgetOneRankInPause).then(|| self.active().pop()).flatten();
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            if Some(*rank) == forgotten {
                continue;
            }
            state.waiting = true;
            state.pause_failed = false;
            state.record.times.state = State::Pausing;
            let call = Call { attempt, ..state.call(*rank) };
            cx.actions.push_back(Action::Pause { call, mode, clear_cache: false });
        }
        cx.actions.push_back(Action::Progress);
    }

    pub(super) fn paused(&mut self, cx: &mut Cx<'_>, call: Call, result: Result<(), String>) {
        let Call { rank, incarnation, attempt } = call;
        let current = matches!(self.step, Step::Pausing { attempt: now, .. } if now == attempt);
        let Some(state) = current.then(|| self.awaited(rank, incarnation)).flatten() else {
            return;
        };
        state.waiting = false;
        state.record.times.pause_ms = Some(millis(cx.now - state.sent_at));
        match result {
            Ok(()) => state.record.times.state = State::Paused,
            Err(error) => {
                state.pause_failed = true;
                state.record.times.state = State::Serving;
                state.record.times.errors.push(format!("pause failed: {error}"));
                self.fail(format!("rank {rank}: pause failed: {error}"));
            }
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    pub(super) fn all_paused(&mut self, cx: &mut Cx<'_>) {
        let active = self.ranks.values().filter(|state| state.active);
        let failed = active.clone().filter(|state| state.pause_failed).count();
        let all = active.count();
        if self.recovery.is_some() {
            self.all_recovered_paused(cx);
        } else if failed == 0 && !self.aborted {
            self.start_load(cx, Target::New);
        } else if failed == 0 || !cx.config.kind.is_lockstep() {
            // For an independent engine a resume without a pause is a no-op.
            self.start_resume(cx);
        } else if failed == all && matches!(self.step, Step::Pausing { attempt: 1, .. }) {
            // Nobody has paused (after a second attempt the first one may be in force); a resume of a lockstep group that is not paused can hang it.
            self.finish(cx);
        } else if let Some(rank) = self.active().first() {
            self.fence(cx, *rank, "the group is paused in part and cannot be resumed");
            self.finish(cx);
        }
    }
}
