//! Utility calls: of frontends (passed on, waiting, or held for a decision) and our own.

use std::time::Duration;

use crate::machine::held_call::{HeldCall, Verdict};

use super::{Action, CallError, Engine, Owner, VirtualEngine, slot_of};
use crate::frames::Frames;
use crate::ids::{CallId, ClientIndex, Slot};
use crate::time::Time;
use crate::utility::{UtilityCall, UtilityOutput};

/// Its answer does not change, and a frontend needs it to start.
pub(super) const GET_SUPPORTED_TASKS: &str = "get_supported_tasks";

/// A call of a frontend on the engine.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) method: String,
    /// Set if it was held before.
    ticket: Option<u64>,
    /// Its caller has gone.
    orphan: bool,
}

/// A frontend's call that has been checked; its client index is the slot's already.
pub(super) struct CheckedCall {
    pub(super) call_id: CallId,
    pub(super) method: String,
    /// Decoded for control calls only.
    pub(super) args: Vec<rmpv::Value>,
    pub(super) frames: Frames,
}

/// A call of a frontend that waits until the engine is admitted.
#[derive(Debug)]
pub(super) struct WaitingCall {
    call_id: CallId,
    method: String,
    frames: Frames,
    deadline: Time,
}

/// A call of a frontend that waits for a decision.
#[derive(Debug)]
pub(super) struct HeldControl {
    number: usize,
    call_id: CallId,
    method: String,
    frames: Frames,
    deadline: Time,
}

/// A call of our own.
#[derive(Debug)]
pub(super) struct ControlCall {
    token: u64,
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
            self.actions.push_back(Action::CallAnswered { token, result: Err(error) });
            return;
        }
        let call_id = self.new_call_id(0);
        let call = UtilityCall { client_index: ClientIndex(0), call_id, method, args };
        self.control_calls.insert(call_id, ControlCall { token, timeout, deadline: now + timeout });
        self.send_to_engine(0, call.encode());
    }

    /// An answer on the control slot. Late ones are dropped.
    pub(super) fn control_answered(&mut self, answer: UtilityOutput) {
        if let Some(call) = self.control_calls.remove(&answer.call_id) {
            self.actions.push_back(Action::CallAnswered {
                token: call.token,
                result: answer.result.map_err(CallError::Failed),
            });
        }
    }

    /// A frontend's call that only reads: passes it on, now or when the engine is there.
    pub(super) fn forward_call(&mut self, now: Time, number: usize, call: CheckedCall) {
        let CheckedCall { call_id, method, frames, .. } = call;
        if self.engine == Engine::Admitted {
            self.send_call(number, call_id, method, None, frames);
            return;
        }
        if method == GET_SUPPORTED_TASKS
            && let Some(tasks) = self.supported_tasks.clone()
        {
            self.answer_call(number, call_id, Ok(tasks));
            return;
        }
        self.slots[number].waiting.push_back(WaitingCall {
            call_id,
            method,
            frames,
            deadline: now + self.config.hold_calls_for,
        });
    }

    /// A frontend's control call: hands it out for a decision.
    pub(super) fn hold_call(&mut self, now: Time, number: usize, owner: Owner, call: CheckedCall) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.held_control.insert(
            ticket,
            HeldControl {
                number,
                call_id: call.call_id,
                method: call.method.clone(),
                frames: call.frames,
                deadline: now + self.config.decide_within,
            },
        );
        self.actions.push_back(Action::HeldCall(HeldCall {
            rank: self.config.rank,
            ticket,
            frontend: owner.frontend,
            api_server: owner.api_server,
            method: call.method,
            args: call.args,
        }));
    }

    /// Carries out the decision on a held call. Ends in [`Action::Released`] with this ticket.
    pub fn release(&mut self, ticket: u64, verdict: Verdict) {
        let Some(held) = self.held_control.remove(&ticket) else {
            self.actions.push_back(Action::Released {
                ticket,
                result: Err("the call has ended: its frontend has gone, or it expired".to_owned()),
            });
            return;
        };
        let answer = match verdict {
            Verdict::Forward if self.engine == Engine::Admitted => {
                let ticket = Some(ticket);
                self.send_call(held.number, held.call_id, held.method, ticket, held.frames);
                return;
            }
            Verdict::Forward => Err(self.describe_engine()),
            Verdict::Answer(value) => Ok(value),
            Verdict::Refuse(message) => Err(message),
        };
        let result = match &answer {
            // Forwarding was asked for, and did not happen.
            Err(message) if *message == self.describe_engine() => Err(message.clone()),
            _ => Ok(rmpv::Value::Nil),
        };
        self.answer_call(held.number, held.call_id, answer);
        self.actions.push_back(Action::Released { ticket, result });
    }

    fn send_call(
        &mut self,
        number: usize,
        call_id: CallId,
        method: String,
        ticket: Option<u64>,
        frames: Frames,
    ) {
        let pending = Pending { method, ticket, orphan: false };
        self.slots[number].calls.insert(call_id, pending);
        self.send_to_engine(number, frames);
    }

    /// Whether a call of this slot has this id already.
    pub(super) fn is_known_call(&self, number: usize, call_id: CallId) -> bool {
        let slot = &self.slots[number];
        slot.calls.contains_key(&call_id)
            || slot.waiting.iter().any(|call| call.call_id == call_id)
            || self.held_control.values().any(|held| held.number == number && held.call_id == call_id)
    }

    /// Calls of a slot that count against its bound.
    pub(super) fn calls_of(&self, number: usize) -> usize {
        let held = self.held_control.values();
        self.slots[number].call_count() + held.filter(|held| held.number == number).count()
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
            self.actions.push_back(Action::Released { ticket, result });
        } else if is_tasks
            && self.supported_tasks.is_none()
            && let Some(UtilityOutput { result: Ok(tasks), .. }) = answer()
        {
            self.supported_tasks = Some(tasks);
        }
        !pending.orphan
    }

    /// The engine is admitted: passes on what waited for it.
    pub(super) fn send_waiting_calls(&mut self) {
        for number in 1..self.slots.len() {
            while let Some(call) = self.slots[number].waiting.pop_front() {
                self.send_call(number, call.call_id, call.method, None, call.frames);
            }
        }
    }

    /// The engine is gone: no call on it will be answered by it.
    pub(super) fn fail_calls_in_flight(&mut self, reason: &str) {
        let rank = self.config.rank;
        for call in std::mem::take(&mut self.control_calls).into_values() {
            let error = CallError::Down(format!("engine of DP rank {rank} is down: {reason}"));
            self.actions.push_back(Action::CallAnswered { token: call.token, result: Err(error) });
        }
        for number in 1..self.slots.len() {
            for (call_id, pending) in std::mem::take(&mut self.slots[number].calls) {
                let message = format!(
                    "Call to {} method failed: engine of DP rank {rank} is down: {reason}",
                    pending.method
                );
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
        self.held_control.retain(|_, held| held.number != number);
    }

    pub(super) fn expire_calls(&mut self, now: Time) {
        let late: Vec<CallId> =
            self.control_calls.iter().filter(|(_, call)| call.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(call) = self.control_calls.remove(&id) {
                self.actions.push_back(Action::CallAnswered {
                    token: call.token,
                    result: Err(CallError::Deadline(call.timeout)),
                });
            }
        }
        for number in 1..self.slots.len() {
            while self.slots[number].waiting.front().is_some_and(|call| call.deadline <= now) {
                let Some(call) = self.slots[number].waiting.pop_front() else {
                    break;
                };
                let message = format!(
                    "Call to {} method failed: waited for {:?}: {}",
                    call.method,
                    self.config.hold_calls_for,
                    self.describe_engine()
                );
                self.refuse(slot_of(number), message.clone());
                self.answer_call(number, call.call_id, Err(message));
            }
        }
        // Tickets grow with time, so the first ones expire first.
        while let Some(entry) = self.held_control.first_entry() {
            if entry.get().deadline > now {
                break;
            }
            let held = entry.remove();
            let message = format!(
                "Call to {} method failed: not decided within {:?}",
                held.method, self.config.decide_within
            );
            self.refuse(slot_of(held.number), message.clone());
            self.answer_call(held.number, held.call_id, Err(message));
        }
    }

    pub(super) fn next_call_deadline(&self) -> Option<Time> {
        let own = self.control_calls.values().map(|call| call.deadline);
        let waiting = self.slots.iter().filter_map(|slot| slot.waiting.front());
        let held = self.held_control.values().next().map(|held| held.deadline);
        own.chain(waiting.map(|call| call.deadline)).chain(held).min()
    }

    /// Answers a frontend's call with a failure, and notes it.
    pub(super) fn refuse_call(&mut self, slot: Slot, call_id: CallId, method: &str, reason: &str) {
        let message = format!("Call to {method} method failed: {reason}");
        self.refuse(slot, message.clone());
        self.answer_call(slot.0 as usize, call_id, Err(message));
    }
}
