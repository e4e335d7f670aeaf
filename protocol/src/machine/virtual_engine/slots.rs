//! Slots: who has which client index of the engine, and when it may be given to another.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::calls::{CheckedCall, Pending};
use super::requests::AbortOutcome;
use super::{Action, Engine, Event, NoFreeSlot, Owner, VirtualEngine, slot_of};
use crate::ids::{CallId, ClientIndex, FrontendId, Slot};
use crate::machine::mutation::{Mutation, mutated};
use crate::request;
use crate::time::Time;
use crate::utility::UtilityCall;

/// After the fence the engine still has to report the aborted requests as finished, which it does
/// with its next step. A paused engine takes no step: the slot is not kept for it longer than this.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Use {
    #[default]
    Free,
    Open(Owner),
    /// Its owner has gone; the engine has not confirmed yet.
    Fenced(CallId),
    /// The engine has confirmed; it still has to report aborted requests as finished.
    Settling(Time),
}

/// One slot. Number 0 is the control slot, which is never opened.
#[derive(Debug, Default)]
pub(super) struct SlotState {
    state: Use,
    /// Something was sent to this incarnation of the engine on it.
    pub(super) touched: bool,
    /// Requests of the slot on the engine, aborted ones included.
    pub(super) sent: usize,
    /// Calls on the engine.
    pub(super) calls: BTreeMap<CallId, Pending>,
    /// Calls that wait until the engine is admitted, and how long they do.
    pub(super) waiting: VecDeque<(Time, CheckedCall)>,
    /// When the owner's frontend last got scheduler stats.
    pub(super) stats_at: Option<Time>,
}

impl SlotState {
    pub(super) const fn owner(&self) -> Option<Owner> {
        match self.state {
            Use::Open(owner) => Some(owner),
            _ => None,
        }
    }

    pub(super) const fn is_draining(&self) -> bool {
        matches!(self.state, Use::Fenced(_) | Use::Settling(_))
    }

    const fn settles_until(&self) -> Option<Time> {
        match self.state {
            Use::Settling(deadline) => Some(deadline),
            _ => None,
        }
    }

    pub(super) fn call_count(&self) -> usize {
        self.calls.len() + self.waiting.len()
    }
}

impl VirtualEngine {
    /// Gives a free slot to an API server of a frontend.
    ///
    /// # Errors
    /// [`NoFreeSlot`] if all are taken or being drained.
    pub fn open_slot(&mut self, frontend: FrontendId, api_server: u32) -> Result<Slot, NoFreeSlot> {
        let free = (1..self.slots.len()).find(|number| self.slots[*number].state == Use::Free);
        let Some(number) = free else {
            let draining = self.slots.iter().filter(|slot| slot.is_draining()).count();
            return Err(NoFreeSlot {
                rank: self.config.rank,
                total: self.config.frontend_slots,
                draining: u32::try_from(draining).unwrap_or(u32::MAX),
            });
        };
        self.slots[number].state = Use::Open(Owner { frontend, api_server });
        self.slots[number].stats_at = None;
        Ok(slot_of(number))
    }

    /// Closes all slots of a frontend; see [`Event::CloseSlot`].
    pub fn close_frontend(&mut self, now: Time, frontend: FrontendId) {
        for number in 1..self.slots.len() {
            if self.slots[number].owner().is_some_and(|owner| owner.frontend == frontend) {
                let slot = slot_of(number);
                self.handle_event(now, Event::CloseSlot { slot });
            }
        }
    }

    pub(super) fn close_slot(&mut self, now: Time, slot: Slot) {
        let number = slot.0 as usize;
        if number == 0 || self.slots.get(number).is_none_or(|state| state.owner().is_none()) {
            return;
        }
        let mut on_engine: Vec<Arc<str>> = Vec::new();
        for id in self.requests.ids_of(number) {
            if self.requests.abort(now, &id, number) == AbortOutcome::Forward {
                on_engine.push(id);
            }
        }
        self.drop_calls_of(number);
        if !self.slots[number].touched || matches!(self.engine, Engine::Down(_)) {
            self.free_slot(number);
            return;
        }
        if !on_engine.is_empty() {
            let abort = request::encode_abort(on_engine.iter().map(|id| &**id));
            self.send_to_engine(number, abort);
        }
        if mutated(Mutation::ReuseSlotWithoutFence) {
            self.free_slot(number);
            return;
        }
        let call_id = self.new_call_id(number);
        let fence = UtilityCall {
            client_index: ClientIndex(slot.0),
            call_id,
            // Reads one flag; a version without it answers with a failure, which is as good.
            method: "is_sleeping".to_owned(),
            args: Vec::new(),
        };
        self.slots[number].state = Use::Fenced(call_id);
        self.send_to_engine(number, fence.encode());
        self.pump();
    }

    /// An answer of the engine on a slot that is being drained. True if it was the fence.
    pub(super) fn fence_answered(&mut self, now: Time, number: usize, call_id: CallId) -> bool {
        if self.slots[number].state != Use::Fenced(call_id) {
            return false;
        }
        self.slots[number].state = Use::Settling(now + SETTLE_WITHIN);
        self.free_if_settled(number);
        true
    }

    pub(super) fn free_if_settled(&mut self, number: usize) {
        let slot = &self.slots[number];
        if slot.settles_until().is_some() && slot.sent == 0 {
            self.free_slot(number);
        }
    }

    pub(super) fn settle_slots(&mut self, now: Time) {
        for number in 1..self.slots.len() {
            if self.slots[number].settles_until().is_some_and(|deadline| deadline <= now) {
                self.free_slot(number);
            }
        }
    }

    pub(super) fn next_settle_deadline(&self) -> Option<Time> {
        self.slots.iter().filter_map(SlotState::settles_until).min()
    }

    pub(super) fn free_slot(&mut self, number: usize) {
        for id in self.requests.ids_of(number) {
            self.requests.remove(&id);
        }
        let slot = &mut self.slots[number];
        slot.state = Use::Free;
        slot.sent = 0;
        self.actions.push_back(Action::SlotFree { slot: slot_of(number) });
        self.pump();
    }

    /// A call id that no call in flight on this slot has.
    pub(super) fn new_call_id(&mut self, number: usize) -> CallId {
        loop {
            self.next_call += 1;
            let id = CallId(i128::from(self.next_call));
            if !self.slots[number].calls.contains_key(&id) && !self.control_calls.contains_key(&id) {
                return id;
            }
        }
    }
}
