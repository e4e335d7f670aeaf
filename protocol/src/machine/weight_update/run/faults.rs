//! What goes wrong: abort, lost engines, fences; and the end.

use std::time::Duration;

use crate::{EngineIndex, Incarnation};

use super::super::types::Action;
use super::super::vocabulary::Phase;
use super::super::vocabulary::RankProgress as State;
use super::{Cx, Rank, Run, Step, millis};

impl Run {
    pub(super) fn abort(&mut self, cx: &mut Cx<'_>) {
        if self.recovery.is_some() {
            return; // engines that are left as they are would stay paused, or torn
        }
        let text = "aborted by the operator".to_owned();
        match &self.step {
            Step::Staging { .. } | Step::WritingBegun | Step::ClosingAdmission => {
                self.fail(text);
                self.finish(cx);
            }
            Step::Pausing { .. } => {
                self.aborted = true;
                self.fail(text);
                // A pause of a lockstep group cannot be cancelled: it must complete first. An
                // independent engine may be resumed while it drains.
                if !cx.config.kind.is_lockstep() {
                    self.start_resume(cx);
                }
            }
            Step::Loading if !self.begin.forward_only => {
                self.load_failed = true;
                self.fail(text);
            }
            _ => {}
        }
    }

    pub(super) fn engine_lost(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        reason: &str,
    ) {
        let known = self
            .ranks
            .get(&rank)
            .is_some_and(|state| state.active && state.record.incarnation == incarnation);
        if !known || self.step == Step::Ended {
            return;
        }
        if !cx.config.kind.is_lockstep() {
            self.drop_rank(rank, State::Lost, format!("engine was lost: {reason}"));
            self.warn(format!(
                "rank {rank} was lost during {} ({reason}); it comes back at the committed version",
                self.phase
            ));
        } else {
            if !self.committed {
                self.fail(format!(
                    "rank {rank} was lost during {} ({reason}); its group starts again",
                    self.phase
                ));
            }
            self.warn(format!(
                "the group starts again at the committed version, because rank {rank} was lost: {reason}"
            ));
            for peer in self.active() {
                let Some(state) = self.ranks.get(&peer) else {
                    continue;
                };
                if peer != rank {
                    cx.actions.push_back(Action::Fence {
                        rank: peer,
                        incarnation: state.record.incarnation,
                        why: format!("rank {rank} of its lockstep group was lost: {reason}"),
                    });
                }
                let why = format!("rank {rank} of the group was lost: {reason}");
                self.drop_rank(peer, State::Lost, why);
            }
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    /// Fences everybody who has not answered in this step.
    pub(super) fn fence_silent(&mut self, cx: &mut Cx<'_>, what: &str, limit: Duration) {
        let why = format!("no answer to {what} within {limit:?}");
        self.fence_those(cx, &why, |state| state.waiting || state.stamping.is_some());
    }

    /// Fences those of the active engines.
    pub(super) fn fence_those(&mut self, cx: &mut Cx<'_>, why: &str, which: impl Fn(&Rank) -> bool) {
        let those = self.ranks.iter().filter(|(_, state)| state.active && which(state));
        let those: Vec<EngineIndex> = those.map(|(rank, _)| *rank).collect();
        for rank in those {
            self.fence(cx, rank, why);
        }
    }

    pub(super) fn fence(&mut self, cx: &mut Cx<'_>, rank: EngineIndex, why: &str) {
        if !self.ranks.get(&rank).is_some_and(|state| state.active) {
            return;
        }
        self.fail(format!("rank {rank} is fenced: {why}"));
        let group = if cx.config.kind.is_lockstep() { self.active() } else { vec![rank] };
        for member in group {
            let Some(state) = self.ranks.get(&member) else {
                continue;
            };
            let why =
                if member == rank { why.to_owned() } else { format!("lockstep group of rank {rank}: {why}") };
            cx.actions.push_back(Action::Fence {
                rank: member,
                incarnation: state.record.incarnation,
                why: why.clone(),
            });
            self.fenced.insert(member);
            self.drop_rank(member, State::Fenced, why);
            if let Some(state) = self.ranks.get_mut(&member) {
                state.fencing = true;
            }
        }
        cx.actions.push_back(Action::Progress);
    }

    /// An engine that was fenced while it was being paused may go on with the old weights: then all do.
    pub(super) fn fence_fails(&mut self) {
        let silent: Vec<String> =
            self.ranks.iter().filter(|(_, state)| state.fencing).map(|(rank, _)| rank.to_string()).collect();
        self.warn(format!(
            "rank {} was fenced, but may still serve: its node is not reached",
            silent.join(", ")
        ));
        self.aborted = true;
        for state in self.ranks.values_mut() {
            state.fencing = false;
        }
    }

    pub(super) fn drop_rank(&mut self, rank: EngineIndex, last: State, why: String) {
        if let Some(state) = self.ranks.get_mut(&rank) {
            state.active = false;
            state.waiting = false;
            state.stamping = None;
            state.record.times.state = last;
            state.record.times.errors.push(why);
        }
    }

    pub(super) fn finish(&mut self, cx: &mut Cx<'_>) {
        if self.step == Step::Ended {
            return;
        }
        if let Some(since) = self.paused_since {
            self.record.paused_ms = Some(millis(cx.now - since));
        }
        self.enter_phase(cx, Phase::Idle);
        self.step = Step::Ended;
        self.deadline = None;
        if self.admission_closed {
            cx.actions.push_back(Action::OpenAdmission);
        }
        cx.actions.push_back(Action::Progress);
    }
}
