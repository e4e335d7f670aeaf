//! Utility calls: of frontends (passed on, waiting, or held for a decision) and our own.

use std::time::Duration;

use crate::machine::held_call::{HeldCall, Verdict};
use crate::machine::memory::OwnCall;
use crate::machine::policy::Effect;

use super::slots::SlotState;
use super::{Action, CallError, Engine, Owner, VirtualEngine, slot_of};
use crate::frames::Frames;
use crate::ids::{CallId, ClientIndex, FrontendId};
use crate::time::Time;
use crate::utility::{UtilityCall, UtilityOutput};

/// Its answer does not change, and a frontend needs it to start.
pub(super) const GET_SUPPORTED_TASKS: &str = "get_supported_tasks";
/// Drops what an engine has cached of preprocessed images and the like.
const RESET_MM_CACHE: &str = "reset_mm_cache";

/// A call of a frontend on the engine.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) method: String,
    /// Set if it was held before.
    ticket: Option<u64>,
    effect: Option<Effect>,
    /// Its caller has gone.
    orphan: bool,
}

/// A frontend's call that has been checked; its client index is the slot's already.
#[derive(Debug)]
pub(super) struct CheckedCall {
    /// Of the slot.
    pub(super) number: usize,
    pub(super) call_id: CallId,
    pub(super) method: String,
    /// Of a control call.
    pub(super) effect: Option<Effect>,
    pub(super) frames: Frames,
}

/// A call of our own.
#[derive(Debug)]
pub(super) struct ControlCall {
    token: u64,
    effect: Option<OwnCall>,
    timeout: Duration,
    deadline: Time,
}

impl VirtualEngine {
    /// Calls a method of the engine core on the control slot.
    pub(super) fn control_call(
        &mut self,
        now: Time,
        token: u64,
        method: String,
        args: Vec<rmpv::Value>,
        timeout: Duration,
    ) {
        if !matches!(self.engine, Engine::Ready | Engine::Admitted) {
            let error = CallError::Down(self.describe_engine());
            return self.actions.push_back(Action::CallAnswered { token, result: Err(error) });
        }
        let call_id = self.new_call_id(0);
        let effect = OwnCall::of(&method, &args);
        if let Some(OwnCall::Other(effect)) = effect {
            self.memory.sent(effect);
        }
        let call = UtilityCall { client_index: ClientIndex(0), call_id, method, args };
        self.control_calls.insert(call_id, ControlCall { token, effect, timeout, deadline: now + timeout });
        self.send_to_engine(0, call.encode());
    }

    /// An answer on the control slot. Late ones are dropped.
    pub(super) fn control_answered(&mut self, answer: UtilityOutput) {
        if let Some(call) = self.control_calls.remove(&answer.call_id) {
            match (call.effect, &answer.result) {
                (Some(OwnCall::Load), Ok(reports)) => self.memory.loaded(reports),
                (Some(OwnCall::Other(effect)), result) => self.memory.answered(effect, result),
                _ => {}
            }
            self.actions.push_back(Action::CallAnswered {
                token: call.token,
                result: answer.result.map_err(CallError::Failed),
            });
            self.pump();
        }
    }

    /// A frontend's call that only reads: passes it on, now or when the engine is there.
    pub(super) fn forward_call(&mut self, now: Time, owner: Owner, call: CheckedCall) {
        if call.method == RESET_MM_CACHE && self.serves_others(owner.frontend) {
            // Each frontend calls this at its start. Others mirror the engine's cache (`vllm/multimodal/cache`, with one
            // engine and one API server) and would go on to send hashes alone. To be left with what is cached costs the
            // caller nothing: it sends all of what it does not know.
            self.answer_call(call.number, call.call_id, Ok(rmpv::Value::Nil));
        } else if self.engine == Engine::Admitted {
            self.send_call(call, None);
        } else if call.method == GET_SUPPORTED_TASKS
            && let Some(tasks) = self.supported_tasks.clone()
        {
            self.answer_call(call.number, call.call_id, Ok(tasks));
        } else if matches!(self.engine, Engine::GivenUp(_)) {
            self.refuse_call(&call, &self.describe_engine());
        } else {
            let deadline = now + self.config.limits.hold;
            self.slots[call.number].waiting.push_back((deadline, call));
        }
    }

    fn serves_others(&self, frontend: FrontendId) -> bool {
        self.slots.iter().filter_map(SlotState::owner).any(|owner| owner.frontend != frontend)
    }

    /// A frontend's control call: hands it out for a decision.
    pub(super) fn hold_call(&mut self, now: Time, owner: Owner, call: CheckedCall, args: Vec<rmpv::Value>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.actions.push_back(Action::HeldCall(HeldCall {
            rank: self.config.rank,
            ticket,
            frontend: owner.frontend,
            api_server: owner.api_server,
            method: call.method.clone(),
            args,
        }));
        self.held_control.insert(ticket, (now + self.config.limits.hold, call));
    }

    /// Carries out the decision on a held call. Ends in [`Action::Released`] with this ticket.
    pub fn release(&mut self, ticket: u64, verdict: Verdict) {
        let Some((_, call)) = self.held_control.remove(&ticket) else {
            let result = Err("the call has ended: its frontend has gone, or it expired".to_owned());
            return self.actions.push_back(Action::Released { ticket, result });
        };
        let done = Ok(rmpv::Value::Nil);
        let (answer, result) = match verdict {
            Verdict::Forward if self.engine == Engine::Admitted => return self.send_call(call, Some(ticket)),
            Verdict::Forward => (Err(self.describe_engine()), Err(self.describe_engine())),
            Verdict::Answer(value) => (Ok(value), done),
            Verdict::Refuse(message) => (Err(message), done),
        };
        self.answer_call(call.number, call.call_id, answer);
        self.actions.push_back(Action::Released { ticket, result });
    }

    fn send_call(&mut self, call: CheckedCall, ticket: Option<u64>) {
        let CheckedCall { number, call_id, method, effect, frames } = call;
        if let Some(effect) = effect {
            self.memory.sent(effect);
        }
        self.slots[number].calls.insert(call_id, Pending { method, ticket, effect, orphan: false });
        self.send_to_engine(number, frames);
    }

    /// Whether a call of this slot has this id already.
    pub(super) fn is_known_call(&self, number: usize, call_id: CallId) -> bool {
        let slot = &self.slots[number];
        slot.calls.contains_key(&call_id)
            || slot.waiting.iter().any(|(_, call)| call.call_id == call_id)
            || self.held_control.values().any(|(_, held)| held.number == number && held.call_id == call_id)
    }

    /// Calls of a slot that count against its bound.
    pub(super) fn calls_of(&self, number: usize) -> usize {
        let held = self.held_control.values();
        self.slots[number].call_count() + held.filter(|(_, held)| held.number == number).count()
    }

    /// An answer of the engine to a frontend's call. True if it is to be passed on.
    pub(super) fn call_answered(
        &mut self,
        number: usize,
        call_id: CallId,
        answer: impl FnOnce() -> Option<UtilityOutput>,
    ) -> bool {
        let Some(pending) = self.slots[number].calls.remove(&call_id) else {
            return false;
        };
        let is_tasks = pending.method == GET_SUPPORTED_TASKS;
        if let Some(ticket) = pending.ticket {
            let result = answer()
                .map_or_else(|| Err("the engine's answer cannot be read".to_owned()), |answer| answer.result);
            if let Some(effect) = pending.effect {
                self.memory.answered(effect, &result);
            }
            self.actions.push_back(Action::Released { ticket, result });
        } else if is_tasks
            && self.supported_tasks.is_none()
            && let Some(UtilityOutput { result: Ok(tasks), .. }) = answer()
        {
            self.supported_tasks = Some(tasks);
        }
        self.pump();
        !pending.orphan
    }

    /// The engine is admitted: passes on what waited for it.
    pub(super) fn send_waiting_calls(&mut self) {
        for number in 1..self.slots.len() {
            while let Some((_, call)) = self.slots[number].waiting.pop_front() {
                self.send_call(call, None);
            }
        }
    }

    /// No engine will come for them.
    pub(super) fn refuse_waiting_calls(&mut self) {
        for number in 1..self.slots.len() {
            while let Some((_, call)) = self.slots[number].waiting.pop_front() {
                self.refuse_call(&call, &self.describe_engine());
            }
        }
    }

    /// The engine is gone: no call on it will be answered by it.
    pub(super) fn fail_calls_in_flight(&mut self) {
        let down = self.describe_engine();
        for call in std::mem::take(&mut self.control_calls).into_values() {
            let result = Err(CallError::Down(down.clone()));
            self.actions.push_back(Action::CallAnswered { token: call.token, result });
        }
        for number in 1..self.slots.len() {
            for (call_id, pending) in std::mem::take(&mut self.slots[number].calls) {
                let message = failed(&pending.method, &down);
                if !pending.orphan {
                    self.answer_call(number, call_id, Err(message.clone()));
                }
                if let Some(ticket) = pending.ticket {
                    self.actions.push_back(Action::Released { ticket, result: Err(message) });
                }
            }
        }
    }

    /// The owner of a slot is gone: nobody waits for its calls. Those that were decided about are
    /// still followed, because the control task waits for them.
    pub(super) fn drop_calls_of(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        slot.waiting.clear();
        slot.calls.retain(|_, pending| {
            pending.orphan = true;
            pending.ticket.is_some()
        });
        self.held_control.retain(|_, (_, held)| held.number != number);
    }

    pub(super) fn expire_calls(&mut self, now: Time) {
        for (_, call) in self.control_calls.extract_if(.., |_, call| call.deadline <= now) {
            let result = Err(CallError::Deadline(call.timeout));
            self.actions.push_back(Action::CallAnswered { token: call.token, result });
        }
        for number in 1..self.slots.len() {
            while let Some((_, call)) = self.slots[number].waiting.pop_front_if(|(due, _)| *due <= now) {
                let engine = self.describe_engine();
                self.refuse_call(
                    &call,
                    &format!("waited for {:?} (--hold-timeout): {engine}", self.config.limits.hold),
                );
            }
        }
        let undecided: Vec<_> = self.held_control.extract_if(.., |_, (due, _)| *due <= now).collect();
        for (_, (_, call)) in undecided {
            self.refuse_call(
                &call,
                &format!("not decided within {:?} (--hold-timeout)", self.config.limits.hold),
            );
        }
    }

    pub(super) fn next_call_deadline(&self) -> Option<Time> {
        let own = self.control_calls.values().map(|call| call.deadline);
        let waiting = self.slots.iter().filter_map(|slot| slot.waiting.front());
        // Tickets grow with time, so the first one expires first.
        let held = self.held_control.values().next();
        own.chain(waiting.chain(held).map(|(due, _)| *due)).min()
    }

    /// Answers a frontend's call with a failure, and notes it.
    pub(super) fn refuse_call(&mut self, call: &CheckedCall, reason: &str) {
        let message = failed(&call.method, reason);
        self.refuse(slot_of(call.number), message.clone());
        self.answer_call(call.number, call.call_id, Err(message));
    }
}

fn failed(method: &str, reason: &str) -> String {
    format!("Call to {method} method failed: {reason}")
}
