//! Rounds that have the lock.

use std::collections::{BTreeMap, BTreeSet};

use rmpv::Value;

use crate::machine::held_call::Verdict;
use crate::machine::mutation::{Mutation, mutated};
use crate::machine::policy::Effect;
use crate::{EngineIndex, PausedBy, Time};

use super::asleep::{wakes_without_weights, would_go_ahead};
use super::{Action, Control, Holder, NO_WEIGHTS, ROUND_TIMEOUT, Round, Severity, list};

impl Control {
    /// Decides on a complete round and, unless that settles it, lets it have the lock.
    pub(super) fn run(&mut self, now: Time, round: Round) {
        let effect = round.effect();
        let down: Vec<EngineIndex> = self.ranks.difference(&self.up).copied().collect();
        let paused = self.paused_by.is_some() || self.sleeps();
        match effect {
            Effect::Resume | Effect::WakeUp(_) if self.paused_by == Some(PausedBy::Operator) => {
                self.refuse(round, "the engines were paused by the operator, who must resume them");
                return;
            }
            // A resume of a lockstep group that is idle and not paused can hang it: the ranks enter a
            // barrier while one that just got a request steps (vllm/v1/engine/core.py 0.32.0,
            // `DPEngineCoreProc.resume_scheduler`).
            Effect::Resume if !paused => {
                self.answer(round, &Value::Nil);
                return;
            }
            Effect::WakeUp(_) if !paused => {
                self.answer(round, &Value::Boolean(true));
                return;
            }
            // The next step would compute in memory that is not there.
            Effect::Resume if self.sleeps() && !mutated(Mutation::ResumeAsleep) => {
                self.refuse(round, "the engines sleep: call wake_up, which resumes them when all is awake");
                return;
            }
            Effect::Resume if self.is_empty() && !mutated(Mutation::ResumeAsleep) => {
                self.refuse(round, NO_WEIGHTS);
                return;
            }
            Effect::WakeUp(wake) if wakes_without_weights(&self.memory, wake) => {
                self.refuse(round, NO_WEIGHTS);
                return;
            }
            Effect::Pause | Effect::Resume if down.len() == self.ranks.len() => {
                // Engines that start again are paused, or not, by what is remembered here.
                let by = (effect == Effect::Pause).then_some(PausedBy::Frontend { id: round.frontend });
                self.set_paused_by_round(by);
                self.answer(round, &Value::Nil);
                return;
            }
            Effect::Pause | Effect::Resume if !self.kind.is_lockstep() => {}
            _ if !down.is_empty() && !mutated(Mutation::RunInPart) => {
                let text = format!("engine of rank {} is down", list(&down));
                self.refuse(round, &text);
                return;
            }
            _ => {}
        }
        let mut waiting = BTreeSet::new();
        for (rank, ticket) in &round.tickets {
            let verdict = if down.contains(rank) {
                Verdict::Answer(Value::Nil)
            } else if let Effect::WakeUp(wake) = effect
                && would_go_ahead(&self.memory, self.kind, *rank, wake)
            {
                // As vLLM says of one that is not fully awake.
                Verdict::Answer(Value::Boolean(false))
            } else {
                waiting.insert(*rank);
                Verdict::Forward
            };
            self.actions.push_back(Action::Decide { rank: *rank, ticket: *ticket, verdict });
        }
        // From the first byte on: a call that fails half way leaves unknown weights as well.
        if self.sent(&waiting, effect) {
            self.note_external(&round);
        }
        self.holder = Some(Holder::Round {
            round,
            waiting,
            results: BTreeMap::new(),
            lease_ends: None,
            deadline: now + ROUND_TIMEOUT,
        });
    }

    fn note_external(&mut self, round: &Round) {
        let what = match round.args.first().and_then(Value::as_str) {
            Some(first) if round.method == "collective_rpc" => first.to_owned(),
            _ => round.method.clone(),
        };
        self.note(
            Severity::Warning,
            format!(
                "frontend {} changes weights by {what}: which weights the engines hold is unknown until the next update",
                round.frontend
            ),
        );
    }

    pub(super) fn answered(&mut self, rank: EngineIndex, ticket: u64, result: Result<Value, String>) {
        if let Some(Holder::Round { round, waiting, results, .. }) = &mut self.holder
            && round.tickets.get(&rank) == Some(&ticket)
            && waiting.remove(&rank)
        {
            results.insert(rank, result);
            self.finish_round_if_done();
        }
    }

    pub(super) fn finish_round_if_done(&mut self) {
        if !matches!(&self.holder, Some(Holder::Round { waiting, .. }) if waiting.is_empty()) {
            return;
        }
        let Some(Holder::Round { round, results, lease_ends, .. }) = self.holder.take() else {
            return;
        };
        let failed: Vec<EngineIndex> =
            results.iter().filter(|(_, result)| result.is_err()).map(|(rank, _)| *rank).collect();
        let any_ok = failed.len() < results.len();
        if !failed.is_empty() && any_ok {
            self.note(Severity::Warning, format!("{} failed on rank {} only", round.name(), list(&failed)));
        }
        let by = PausedBy::Frontend { id: round.frontend };
        let effect = round.effect();
        for (rank, result) in &results {
            self.remember(*rank, effect, result);
        }
        match effect {
            // Also when it failed on some: better resumed once too often than left paused.
            Effect::Pause | Effect::Sleep { .. } if any_ok => self.set_paused_by_round(Some(by)),
            Effect::Resume if failed.is_empty() => self.set_paused_by_round(None),
            Effect::WakeUp(_) if failed.is_empty() => {
                let awake = results.values().all(|result| !matches!(result, Ok(Value::Boolean(false))));
                if awake && !self.sleeps() {
                    self.set_paused_by_round(None);
                }
            }
            _ => {}
        }
        if self.paused_by == Some(PausedBy::Frontend { id: round.frontend }) {
            self.lease_ends = lease_ends;
        }
    }

    /// A pause of a frontend does not take the operator's pause over.
    pub(super) fn set_paused_by_round(&mut self, paused_by: Option<PausedBy>) {
        if self.paused_by != Some(PausedBy::Operator) {
            self.set_paused(paused_by);
        }
    }

    pub(super) fn set_paused(&mut self, paused_by: Option<PausedBy>) {
        if paused_by.is_none() {
            self.pause_again.clear();
        }
        self.paused_by = paused_by;
        self.lease_ends = None;
    }
}
