//! Engines and frontends come and go, and what the machine does then on its own account.

use std::collections::{BTreeSet, VecDeque};

use rmpv::Value;

use crate::machine::memory::{Memory, Weights};
use crate::machine::mutation::{Mutation, mutated};
use crate::machine::policy::Effect;
use crate::{EngineIndex, FrontendId, PausedBy, Time};

use super::{Action, Control, Errand, Holder, NO_WEIGHTS, PAUSE_GRACE, ROUND_TIMEOUT, Severity, list};

impl Control {
    pub(super) fn engine_up(&mut self, rank: EngineIndex, memory: Memory) {
        let new = self.up.insert(rank);
        // One that sleeps is paused.
        if new && !memory.sleeps() && (self.paused_by.is_some() || self.sleeps()) {
            self.pause_again.insert(rank);
        }
        if mutated(Mutation::ForgetMemory) {
            return;
        }
        self.memory.insert(rank, memory);
        self.external_weights |= memory.weights != Weights::Known;
    }

    pub(super) fn engine_down(&mut self, rank: EngineIndex, reason: &str) {
        self.up.remove(&rank);
        self.memory.remove(&rank);
        self.pause_again.remove(&rank);
        match &mut self.holder {
            Some(Holder::Round { waiting, results, .. }) => {
                if waiting.remove(&rank) {
                    results.insert(rank, Err(format!("engine is down: {reason}")));
                }
                self.finish_round_if_done();
            }
            Some(Holder::Errand { waiting, .. }) => {
                waiting.remove(&rank);
                self.finish_errand_if_done();
            }
            _ if mutated(Mutation::DeathFreesLock) => self.holder = None,
            _ => {}
        }
    }

    pub(super) fn frontend_gone(&mut self, now: Time, frontend: FrontendId) {
        let gathering = std::mem::take(&mut self.gathering);
        let ready = std::mem::take(&mut self.ready);
        let (gone, gathering): (VecDeque<_>, _) =
            gathering.into_iter().partition(|round| round.frontend == frontend);
        let (also_gone, ready): (VecDeque<_>, _) =
            ready.into_iter().partition(|round| round.frontend == frontend);
        self.gathering = gathering;
        self.ready = ready;
        for round in gone.into_iter().chain(also_gone) {
            self.refuse(round, "the frontend is gone");
        }
        let ends = now + PAUSE_GRACE;
        if let Some(Holder::Round { round, lease_ends, .. }) = &mut self.holder
            && round.frontend == frontend
        {
            *lease_ends = Some(ends);
        }
        if self.paused_by == Some(PausedBy::Frontend { id: frontend }) {
            self.lease_ends = Some(ends);
            self.note(
                Severity::Warning,
                format!(
                    "frontend {frontend} is gone and left the engines paused; they are resumed in {:?}",
                    PAUSE_GRACE
                ),
            );
        }
    }

    pub(super) fn may_pause_again(&self) -> bool {
        if self.pause_again.is_empty() {
            return false;
        }
        // A lockstep group pauses together, so all of it must be there.
        !self.kind.is_lockstep() || self.up == self.ranks
    }

    pub(super) fn lift_pause(&mut self, now: Time) {
        self.lease_ends = None;
        if self.kind.is_lockstep() && (self.up != self.ranks || !self.pause_again.is_empty()) {
            // The group is being started again, or just was: it comes up without a pause.
            self.set_paused(None);
            return;
        }
        if self.is_empty() {
            let by = self.paused_by.as_ref().map_or_else(|| "a frontend".to_owned(), ToString::to_string);
            let text = format!("the engines stay as they are, though {by} has not come back: {NO_WEIGHTS}");
            self.note(Severity::Warning, text);
            return;
        }
        let ranks: BTreeSet<EngineIndex> = self.up.difference(&self.pause_again).copied().collect();
        self.pause_again.clear();
        let text = format!(
            "resuming the engines: {} paused them and has not come back",
            self.paused_by.as_ref().map_or_else(|| "a frontend".to_owned(), ToString::to_string)
        );
        self.note(Severity::Warning, text);
        let method = if self.sleeps() { "wake_up" } else { "resume_scheduler" };
        self.start_errand(now, Errand::LiftPause, &ranks, method, &[]);
    }

    pub(super) fn pause_restarted(&mut self, now: Time) {
        let ranks = if self.kind.is_lockstep() { self.up.clone() } else { self.pause_again.clone() };
        self.pause_again.clear();
        self.note(Severity::Info, format!("pausing rank {} again after its start", list(&ranks)));
        let args = [Value::from("keep"), Value::Boolean(false)];
        self.start_errand(now, Errand::PauseAgain, &ranks, "pause_scheduler", &args);
    }

    pub(super) fn start_errand(
        &mut self,
        now: Time,
        errand: Errand,
        ranks: &BTreeSet<EngineIndex>,
        method: &'static str,
        args: &[Value],
    ) {
        self.next_operation += 1;
        for rank in ranks {
            self.actions.push_back(Action::Call {
                rank: *rank,
                operation: self.next_operation,
                method,
                args: args.to_vec(),
            });
        }
        self.holder = Some(Holder::Errand {
            errand,
            operation: self.next_operation,
            effect: Effect::of(method, args),
            waiting: ranks.clone(),
            failures: Vec::new(),
            deadline: now + ROUND_TIMEOUT,
        });
        self.finish_errand_if_done();
    }

    pub(super) fn call_answered(&mut self, rank: EngineIndex, operation: u64, result: Result<Value, String>) {
        if let Some(Holder::Errand { operation: current, effect, waiting, failures, .. }) = &mut self.holder
            && *current == operation
            && waiting.remove(&rank)
        {
            let effect = *effect;
            if let Err(error) = &result {
                failures.push(format!("rank {rank}: {error}"));
            }
            self.remember(rank, effect, &result);
            self.finish_errand_if_done();
        }
    }

    pub(super) fn finish_errand_if_done(&mut self) {
        if !matches!(&self.holder, Some(Holder::Errand { waiting, .. }) if waiting.is_empty()) {
            return;
        }
        let Some(Holder::Errand { errand, failures, .. }) = self.holder.take() else {
            return;
        };
        if !failures.is_empty() {
            let what = match errand {
                Errand::LiftPause => "resume",
                Errand::PauseAgain => "pause",
            };
            self.note(Severity::Warning, format!("{what} failed on {}", failures.join(", ")));
        }
        if errand == Errand::LiftPause {
            self.set_paused(None);
        }
    }
}
