//! The requests of all frontends at one rank: in flight on the engine, or held in front of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Engine, VirtualEngine};
use crate::frames::Frames;
use crate::machine::mutation::{Mutation, mutated};
use crate::time::Time;

/// An aborted request that the engine never reports as finished is forgotten after this long.
const ABORT_CONFIRMED_WITHIN: Duration = Duration::from_secs(60);
/// Frames shorter than this are copied when held, so that they do not pin the buffer they came in.
const COPY_BELOW: usize = 32 * 1024;
/// What a held request takes besides its bytes: its id, its frames and its places in the tables. The smallest are as
/// long.
const HELD_COST: usize = 512;

/// A request of a frontend.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) slot: usize,
    /// At least one of its messages went to the engine.
    pub(super) sent: bool,
    /// The owner does not wait for it any more.
    pub(super) aborted: bool,
    /// More ADD messages with this id may follow (streaming input), and a finish reason ends only
    /// one of them.
    pub(super) resumable: bool,
    /// Its messages in the queue.
    held: Vec<u64>,
    /// Bytes of its messages that went to the engine.
    bytes: usize,
}

/// An ADD message in the queue.
#[derive(Debug)]
struct Held {
    id: Arc<str>,
    frames: Frames,
    size: usize,
    since: Time,
}

impl Held {
    /// Bytes that it takes here.
    const fn cost(&self) -> usize {
        self.size + HELD_COST
    }
}

/// Table and queue. `sent` entries are what the engine's bound counts.
#[derive(Debug, Default)]
pub(super) struct Requests {
    entries: BTreeMap<Arc<str>, Entry>,
    sent_count: usize,
    sent_bytes: usize,
    queue: BTreeMap<u64, Held>,
    held_bytes: usize,
    next_held: u64,
    aborted: VecDeque<(Time, Arc<str>)>,
}

/// Requests of one slot on an engine that is gone.
#[derive(Default)]
struct LostRequests {
    live: Vec<Arc<str>>,
    aborted: Vec<Arc<str>>,
}

/// What an abort has to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AbortOutcome {
    /// Not a request of this slot (any more).
    Unknown,
    /// It was only held: gone.
    Removed,
    /// The engine must be told.
    Forward,
}

impl Requests {
    pub(super) fn get(&self, id: &str) -> Option<&Entry> {
        self.entries.get(id)
    }

    pub(super) fn get_mut(&mut self, id: &str) -> Option<&mut Entry> {
        self.entries.get_mut(id)
    }

    #[cfg(test)]
    pub(super) fn entries_len(&self) -> usize {
        self.entries.len()
    }

    #[cfg(test)]
    pub(super) const fn sent_totals(&self) -> (usize, usize) {
        (self.sent_count, self.sent_bytes)
    }

    pub(super) fn held_count(&self) -> usize {
        self.queue.len()
    }

    pub(super) const fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    fn entry(&mut self, id: &str, slot: usize, resumable: bool) -> &mut Entry {
        // A lookup first, so that the key is only made when needed.
        if !self.entries.contains_key(id) {
            let entry = Entry { slot, sent: false, aborted: false, resumable, held: Vec::new(), bytes: 0 };
            self.entries.insert(Arc::from(id), entry);
        }
        let entry = self.entries.get_mut(id);
        #[expect(clippy::expect_used, reason = "inserted above if it was missing")]
        let entry = entry.expect("the entry is there");
        entry.resumable = resumable;
        entry
    }

    /// Notes that a message of a request goes to the engine. True if the request is new there.
    pub(super) fn sent(&mut self, id: &str, slot: usize, resumable: bool, size: usize) -> bool {
        let entry = self.entry(id, slot, resumable);
        let first = !entry.sent;
        entry.sent = true;
        entry.bytes += size;
        self.sent_bytes += size;
        self.sent_count += usize::from(first);
        first
    }

    pub(super) fn hold(&mut self, id: &str, slot: usize, resumable: bool, mut frames: Frames, since: Time) {
        let number = self.next_held;
        self.next_held += 1;
        self.entry(id, slot, resumable).held.push(number);
        for frame in &mut frames {
            if frame.len() < COPY_BELOW {
                *frame = Bytes::copy_from_slice(frame);
            }
        }
        let Some((id, _)) = self.entries.get_key_value(id) else {
            return;
        };
        let held = Held { id: id.clone(), size: size(&frames), frames, since };
        self.held_bytes += held.cost();
        self.queue.insert(number, held);
    }

    /// Forgets a request that the engine has ended. Its slot, and whether it had been sent.
    pub(super) fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        if entry.sent {
            self.sent_count -= 1;
            self.sent_bytes -= entry.bytes;
        }
        self.unqueue(&entry.held);
        Some(entry)
    }

    fn unqueue(&mut self, numbers: &[u64]) {
        for number in numbers {
            if let Some(held) = self.queue.remove(number) {
                self.held_bytes -= held.cost();
            }
        }
    }

    /// The owner of `slot` gives a request up.
    pub(super) fn abort(&mut self, now: Time, id: &str, slot: usize) -> AbortOutcome {
        let Some(entry) = self.entries.get_mut(id) else {
            return AbortOutcome::Unknown;
        };
        if entry.slot != slot || entry.aborted {
            return AbortOutcome::Unknown;
        }
        if !entry.sent {
            self.remove(id);
            return AbortOutcome::Removed;
        }
        entry.aborted = true;
        let held = std::mem::take(&mut entry.held);
        self.unqueue(&held);
        if let Some((id, _)) = self.entries.get_key_value(id) {
            let deadline = now + ABORT_CONFIRMED_WITHIN;
            self.aborted.push_back((deadline, id.clone()));
        }
        AbortOutcome::Forward
    }

    pub(super) fn ids_of(&self, slot: usize) -> Vec<Arc<str>> {
        self.entries.iter().filter(|(_, entry)| entry.slot == slot).map(|(id, _)| id.clone()).collect()
    }
}

/// Bytes of a message.
pub(super) fn size(frames: &[Bytes]) -> usize {
    frames.iter().map(Bytes::len).sum()
}

impl VirtualEngine {
    /// Whether requests go to the engine, as far as it may have more.
    pub(super) fn takes_requests(&self) -> bool {
        self.engine == Engine::Admitted && self.gate_open && !self.memory.is_empty()
    }

    /// Whether a new message may go to the engine right now.
    pub(super) fn may_send(&self, size: usize) -> bool {
        let requests = &self.requests;
        self.takes_requests()
            && requests.sent_count < self.config.max_in_flight
            && (requests.sent_bytes + size <= self.config.limits.in_flight_bytes || requests.sent_count == 0)
    }

    pub(super) fn queue_is_empty(&self) -> bool {
        self.requests.queue.is_empty()
    }

    pub(super) fn may_hold(&self, size: usize) -> bool {
        let given_up = matches!(self.engine, Engine::GivenUp(_));
        let fits = self.requests.held_bytes + size + HELD_COST <= self.config.limits.held_bytes
            || self.queue_is_empty();
        fits && !given_up
    }

    /// When a message that is held since then is answered with an error; never while the engine takes requests.
    fn held_until(&self, since: Time) -> Option<Time> {
        Some(since.max(self.closed_since?) + self.config.limits.hold)
    }

    /// The earliest deadline of a request; held messages expire in order.
    pub(super) fn next_request_deadline(&self) -> Option<Time> {
        let held = self.requests.queue.values().next().and_then(|held| self.held_until(held.since));
        let aborted = self.requests.aborted.front().map(|(deadline, _)| *deadline);
        held.into_iter().chain(aborted).min()
    }

    /// Sends an ADD to the engine.
    pub(super) fn send_add(&mut self, id: &str, slot: usize, resumable: bool, frames: Frames) {
        if self.requests.sent(id, slot, resumable, size(&frames)) {
            self.slots[slot].sent += 1;
        }
        self.send_to_engine(slot, frames);
        self.actions.push_back(super::Action::Wake);
    }

    /// Sends what is held, as far as the engine takes it.
    pub(super) fn pump(&mut self) {
        while let Some((number, held)) = self.requests.queue.first_key_value() {
            if !self.may_send(held.size) {
                return;
            }
            let number = *number;
            let Some(held) = self.requests.queue.remove(&number) else {
                return;
            };
            self.requests.held_bytes -= held.cost();
            let Some(entry) = self.requests.entries.get_mut(&held.id) else {
                continue;
            };
            entry.held.retain(|other| *other != number);
            let (slot, resumable) = (entry.slot, entry.resumable);
            self.send_add(&held.id, slot, resumable, held.frames);
        }
    }

    /// Forgets aborted requests that the engine does not report as finished.
    pub(super) fn forget_aborted(&mut self, now: Time) {
        while let Some((deadline, id)) = self.requests.aborted.front() {
            let waiting = self.requests.entries.get(id);
            let slot = waiting.filter(|entry| entry.aborted).map(|entry| entry.slot);
            if slot.is_some() && *deadline > now {
                break;
            }
            let id = id.clone();
            self.requests.aborted.pop_front();
            if let Some(slot) = slot {
                self.finished(slot, &id);
                self.free_if_settled(slot);
            }
        }
    }

    /// Answers held requests whose time is over.
    pub(super) fn expire_held_requests(&mut self, now: Time) {
        let why = format!("held for {:?} (--hold-timeout)", self.config.limits.hold);
        self.answer_held_requests(now, &why, |this, held| {
            this.held_until(held.since).is_some_and(|deadline| deadline <= now)
        });
    }

    /// Answers held requests when no engine will come for them.
    pub(super) fn give_up_held_requests(&mut self, now: Time) {
        self.answer_held_requests(now, "held in vain", |_, _| true);
    }

    fn answer_held_requests(&mut self, now: Time, why: &str, is_late: impl Fn(&Self, &Held) -> bool) {
        let mut late: BTreeMap<usize, Vec<Arc<str>>> = BTreeMap::new();
        while let Some(held) = self.requests.queue.values().next() {
            if !is_late(self, held) {
                break;
            }
            let id = held.id.clone();
            let Some(entry) = self.requests.get(&id) else {
                break;
            };
            let (slot, sent) = (entry.slot, entry.sent);
            if sent {
                // A later part of a streaming request: the engine must give up the rest of it.
                self.requests.abort(now, &id, slot);
                let abort = crate::request::encode_abort([&*id].into_iter());
                self.send_to_engine(slot, abort);
            } else {
                self.requests.remove(&id);
            }
            late.entry(slot).or_default().push(id);
        }
        for (slot, ids) in late {
            let reason = format!("{} requests {why}: {}", ids.len(), self.describe_engine());
            self.refuse(super::slot_of(slot), reason);
            self.answer_with_error(slot, ids.iter().map(|id| &**id));
        }
    }

    /// The engine is gone: ends what was in flight there. What is held stays.
    pub(super) fn fail_requests_in_flight(&mut self) {
        let mut lost: BTreeMap<usize, LostRequests> = BTreeMap::new();
        for (id, entry) in &self.requests.entries {
            if entry.sent {
                let lost = lost.entry(entry.slot).or_default();
                let list = if entry.aborted { &mut lost.aborted } else { &mut lost.live };
                list.push(id.clone());
            }
        }
        for (slot, LostRequests { live, aborted }) in lost {
            for id in live.iter().chain(&aborted) {
                self.requests.remove(id);
            }
            self.slots[slot].sent = 0;
            if !live.is_empty() && !mutated(Mutation::ForgetInFlightAtDown) {
                self.answer_with_error(slot, live.iter().map(|id| &**id));
            }
            // The owner's load balancer counts them until it hears that they are finished.
            self.report_finished(slot, &aborted);
        }
        self.requests.aborted.clear();
    }

    /// Tells a slot's owner that requests it has aborted are over.
    pub(super) fn report_finished(&mut self, slot: usize, ids: &[Arc<str>]) {
        if ids.is_empty() {
            return;
        }
        let frame = crate::output::NewOutputs {
            engine_index: self.config.rank,
            timestamp: self.engine_clock,
            finished_requests: Some(ids.iter().map(|id| id.to_string()).collect()),
            ..crate::output::NewOutputs::default()
        }
        .encode(&self.layout);
        self.send_to_frontend(slot, vec![frame]);
    }
}
