//! Messages of frontends.

use std::sync::Arc;

use super::calls::CheckedCall;
use super::requests::{AbortOutcome, size};
use super::{Engine, VirtualEngine};
use crate::frames::Frames;
use crate::ids::{ClientIndex, Slot};
use crate::machine::policy::Policy;
use crate::positional;
use crate::request::{self, FrontendMessage, Refusal, check_frontend_message};
use crate::time::Time;

/// What a message is, with what is needed after the frames are taken apart.
enum Checked {
    Add { id: String, resumable: bool, frames: Frames },
    Abort { ids: Vec<String> },
    Utility { call: CheckedCall, args: Vec<rmpv::Value>, policy: Policy },
}

impl VirtualEngine {
    pub(super) fn on_frontend_message(&mut self, now: Time, slot: Slot, frames: Frames) {
        let number = slot.0 as usize;
        let Some(owner) = self.slots.get(number).and_then(|state| state.owner()) else {
            // Read before its slot was closed.
            return;
        };
        match self.check(slot, &frames) {
            Ok(Checked::Add { id, resumable, frames }) => self.add(now, slot, &id, resumable, frames),
            Ok(Checked::Abort { ids }) => self.abort(now, number, &ids, frames),
            Ok(Checked::Utility { call, args, policy }) => {
                let call_id = call.call_id;
                if self.is_known_call(number, call_id) {
                    self.refuse(slot, format!("call id {call_id} of {} is in use", call.method));
                } else if let Policy::Refuse(reason) = policy {
                    self.refuse_call(&call, &reason);
                } else if self.calls_of(number) >= self.config.max_calls {
                    self.refuse_call(&call, &format!("{} calls are in flight", self.config.max_calls));
                } else if matches!(policy, Policy::Control(_)) {
                    self.hold_call(now, owner, call, args);
                } else {
                    self.forward_call(now, owner, call);
                }
            }
            Err(refusal) => self.refuse_message(slot, &refusal),
        }
    }

    fn check(&self, slot: Slot, frames: &Frames) -> Result<Checked, Refusal> {
        let message = check_frontend_message(&self.layout, frames)?;
        let rewritten =
            |message: &FrontendMessage<'_>| message.rewrite_client_index(frames, ClientIndex(slot.0));
        Ok(match &message {
            FrontendMessage::Add(add) => Checked::Add {
                id: add.request_id.to_owned(),
                resumable: self.layout.add.resumable.is_some_and(|position| {
                    let found = positional::element(&frames[1], position);
                    found == Ok(Some(&[0xc3][..]))
                }),
                frames: rewritten(&message),
            },
            FrontendMessage::Abort(ids) => {
                Checked::Abort { ids: ids.iter().map(|id| (*id).to_owned()).collect() }
            }
            FrontendMessage::Utility(utility) => {
                let args = utility.decode_args();
                let policy = Policy::of(utility.method, &args);
                let call = CheckedCall {
                    number: slot.0 as usize,
                    call_id: utility.call_id,
                    method: utility.method.to_owned(),
                    effect: match policy {
                        Policy::Control(effect) => Some(effect),
                        Policy::Forward | Policy::Refuse(_) => None,
                    },
                    frames: rewritten(&message),
                };
                Checked::Utility { call, args, policy }
            }
        })
    }

    pub(super) fn refuse_message(&mut self, slot: Slot, refusal: &Refusal) {
        let number = slot.0 as usize;
        self.refuse(slot, refusal.to_string());
        if let Some(id) = &refusal.request_id {
            // A request in flight with this id has its own answer to come.
            if self.requests.get(id).is_none() {
                self.answer_with_error(number, [id.as_str()]);
            }
        }
        if let Some(call_id) = refusal.call_id
            && !self.is_known_call(number, call_id)
        {
            self.answer_call(number, call_id, Err(refusal.to_string()));
        }
    }

    fn add(&mut self, now: Time, slot: Slot, id: &str, resumable: bool, frames: Frames) {
        let number = slot.0 as usize;
        if let Some(known) = self.requests.get(id) {
            if known.slot != number || known.aborted {
                // Two requests with one id end an engine (`Scheduler.add_request`, 0.32.0).
                self.refuse(slot, format!("request id {id:?} is in flight already"));
                self.answer_with_error(number, [id]);
                return;
            }
            if !known.resumable {
                // The answer to the first one is the answer.
                self.refuse(slot, format!("request id {id:?} was sent twice"));
                return;
            }
        }
        let size = size(&frames);
        if self.queue_is_empty() && self.may_send(size) {
            self.send_add(id, number, resumable, frames);
        } else if self.may_hold(size) {
            self.requests.hold(id, number, resumable, frames, now);
        } else {
            let reason = if matches!(self.engine, Engine::GivenUp(_)) {
                self.describe_engine()
            } else {
                format!(
                    "{} requests ({} bytes) are held, and {size} bytes more exceed {} (--max-held-bytes); {}",
                    self.requests.held_count(),
                    self.requests.held_bytes(),
                    self.config.limits.held_bytes,
                    self.describe_engine()
                )
            };
            self.refuse(slot, reason);
            if self.requests.get(id).is_none() {
                self.answer_with_error(number, [id]);
            }
        }
    }

    fn abort(&mut self, now: Time, number: usize, ids: &[String], frames: Frames) {
        let mut forward: Vec<&str> = Vec::new();
        let mut removed: Vec<Arc<str>> = Vec::new();
        for id in ids {
            match self.requests.abort(now, id, number) {
                AbortOutcome::Forward => forward.push(id),
                AbortOutcome::Removed => removed.push(Arc::from(id.as_str())),
                // Ended meanwhile, or somebody else's.
                AbortOutcome::Unknown => {}
            }
        }
        if forward.len() == ids.len() && !forward.is_empty() {
            self.send_to_engine(number, frames);
        } else if !forward.is_empty() {
            self.send_to_engine(number, request::encode_abort(forward.into_iter()));
        }
        self.report_finished(number, &removed);
        self.pump();
    }
}
