//! What the frontends see of one DP rank: an engine that outlives its process.
//!
//! One machine per rank. Towards the engine it is the owner of all slots (client indices); towards
//! the frontends it is a headless engine. It checks what frontends send and refuses what the engine
//! would not survive, knows every request and call in flight, holds new requests while the engine is
//! away or the gate is closed, and answers everything that can no longer be answered by the engine.
//!
//! # Rules
//! * A frontend's request gets one final answer, from the engine or from here; so does each call.
//! * Nothing of a frontend reaches an engine that is not admitted.
//! * No new request reaches an engine whose weights were discarded, before others were loaded
//!   ([`Memory`]).
//! * A slot whose frontend has gone is given to another one only when the engine has confirmed, by
//!   answering a call sent after the aborts (the fence), that it has nothing more for the old one.
//! * Calls that change an engine's weights, schedule or memory are handed out as
//!   [`Action::HeldCall`] and go on only by [`VirtualEngine::release`].
//! * Answers to unknown calls are never passed on: they kill a Python client's output task
//!   (`_process_utility_output`, `vllm/v1/engine/core_client.py` 0.32.0).
//!
//! # Driving it
//! See [`crate::machine`]. [`VirtualEngine::open_slot`] answers directly.

mod calls;
mod from_engine;
mod from_frontend;
mod requests;
#[cfg(test)]
mod simulation;
mod slots;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frames::Frames;
use crate::ids::{CallId, EngineIndex, FrontendId, Incarnation, Slot};
use crate::layout::Layout;
use crate::machine::held_call::HeldCall;
use crate::machine::memory::Memory;
use crate::output;
use crate::request;
use crate::time::Time;

use calls::{CheckedCall, ControlCall};
use requests::Requests;
use slots::SlotState;

/// Bounds of what one rank keeps for frontends, which the flags of `sidecar run` set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `--hold-timeout`: an ADD or a call that waits for longer while the engine takes none is answered with an error.
    /// Behind an engine that takes requests, and only has as many as it may, an ADD waits as long as it must.
    pub hold: Duration,
    /// `--max-held-bytes`: of ADD messages that are held in front of the engine. A single one may be larger.
    pub held_bytes: usize,
    /// `--max-in-flight-bytes`: of ADD messages of requests on the engine; more are held. A single one may be larger.
    pub in_flight_bytes: usize,
    /// `--max-request-bytes`: of one message of a frontend. A larger one is answered without being read.
    pub request_bytes: usize,
    /// `--max-unread-bytes`: of answers that wait for one API server. Beyond it the API server is given up. A single
    /// answer may be larger.
    pub unread_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(2700),
            held_bytes: 1 << 30,
            in_flight_bytes: 1 << 30,
            request_bytes: 1 << 30,
            unread_bytes: 32 << 20,
        }
    }
}

/// Limits of one rank.
#[derive(Clone, Debug)]
pub struct Config {
    pub rank: EngineIndex,
    /// Slots for frontends, without the control slot.
    pub frontend_slots: u32,
    /// Requests in flight on the engine; more are held. With an ABORT for each they fit into the queue of its socket.
    pub max_in_flight: usize,
    pub limits: Limits,
    /// Calls of one slot that wait or are in flight.
    pub max_calls: usize,
    /// Least time between two copies of another frontend's scheduler stats.
    pub stats_interval: Duration,
}

impl Config {
    /// The defaults for a rank.
    pub const fn new(rank: EngineIndex, frontend_slots: u32, limits: Limits) -> Self {
        Self {
            rank,
            frontend_slots,
            max_in_flight: 32 * 1024,
            limits,
            max_calls: 256,
            stats_interval: Duration::from_millis(250),
        }
    }
}

/// One API server of one attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) frontend: FrontendId,
    pub(super) api_server: u32,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Sockets for a new incarnation are bound; what was before is over.
    Prepared(Incarnation),
    /// The engine's handshake is complete: it takes control calls.
    Ready {
        incarnation: Incarnation,
        /// Positions of its version.
        layout: Box<Layout>,
    },
    /// The engine has the committed weights: frontends may use it.
    Admitted(Incarnation),
    /// The engine is gone.
    Down {
        incarnation: Incarnation,
        /// Why; frontends get to read it.
        reason: String,
    },
    /// There will be no engine before the next [`Event::Prepared`].
    GivenUp {
        /// Why; frontends get to read it.
        reason: String,
    },
    /// The gate for new requests opens or closes.
    Gate {
        /// Open?
        open: bool,
    },
    /// A frontend's API server sent a message on its slot.
    FromFrontend {
        slot: Slot,
        /// The message, without routing id.
        frames: Frames,
    },
    /// A frontend's API server sent a message that is too large to be read.
    TooLarge {
        slot: Slot,
        /// Its first two frames, as far as they were read.
        head: Frames,
        /// Bytes of all its frames.
        size: usize,
    },
    /// Other bounds, also for what is held already.
    Limits(Limits),
    /// The engine sent a message on a slot.
    FromEngine {
        incarnation: Incarnation,
        /// On which slot.
        slot: Slot,
        frames: Frames,
    },
    /// The sidecar calls a method of the engine core. Answered by [`Action::CallAnswered`].
    Call {
        /// Comes back with the answer.
        token: u64,
        /// vLLM's method name.
        method: String,
        /// Positional arguments.
        args: Vec<rmpv::Value>,
        /// Fail after this long.
        timeout: Duration,
    },
    /// The connection to an API server is over, or it detaches.
    CloseSlot { slot: Slot },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send to the engine on a slot's input socket.
    ToEngine { slot: Slot, frames: Frames },
    /// Send to the API server that has the slot.
    ToFrontend { slot: Slot, frames: Frames },
    /// A control call of a frontend waits for a decision: answer with [`VirtualEngine::release`].
    HeldCall(HeldCall),
    /// A released call is done: the engine's answer, or nil for the other verdicts.
    Released {
        /// Names the call.
        ticket: u64,
        /// The engine's result or failure message.
        result: Result<rmpv::Value, String>,
    },
    /// Answer to [`Event::Call`].
    CallAnswered {
        /// As given.
        token: u64,
        /// The result, or what went wrong.
        result: Result<rmpv::Value, CallError>,
    },
    /// An ADD went to the engine: a lockstep group must be running.
    Wake,
    /// The engine said that it is dead, or something that means nothing. It is not used any more.
    EngineDead { reason: String },
    /// A message was not passed on. For the log.
    Refused {
        /// On which slot.
        slot: Slot,
        reason: String,
    },
    /// The slot can be opened again.
    SlotFree { slot: Slot },
}

/// Why a control call has no result.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CallError {
    /// The engine answered with a failure.
    #[error("{0}")]
    Failed(String),
    /// The engine is not there (any more).
    #[error("{0}")]
    Down(String),
    /// No answer in time.
    #[error("the engine did not answer within {0:?}")]
    Deadline(Duration),
}

/// No slot for another API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("all {total} frontend slots of rank {rank} are taken ({draining} still being drained)")]
pub struct NoFreeSlot {
    pub rank: EngineIndex,
    /// Frontend slots there are.
    pub total: u32,
    /// Of these, slots whose frontend has left but which the engine has not let go.
    pub draining: u32,
}

/// State of the engine behind the slots.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Engine {
    /// There is none.
    Down(String),
    /// There is none, and none will come: nothing is held.
    GivenUp(String),
    /// Its sockets are bound.
    Prepared,
    /// It takes control calls.
    Ready,
    /// Frontends may use it.
    Admitted,
}

/// Plain data for status and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub incarnation: Incarnation,
    /// Frontends may use the engine.
    pub admitted: bool,
    pub gate_open: bool,
    /// Requests in flight on the engine, by frontend.
    pub in_flight: BTreeMap<FrontendId, u64>,
    /// ADD messages held.
    pub held: u64,
    /// Bytes that held ADD messages take.
    pub held_bytes: usize,
    /// Calls in flight or waiting, of frontends and our own.
    pub calls: usize,
    /// Slots taken by frontends.
    pub occupied: u32,
    /// Slots being drained.
    pub draining: u32,
    /// Messages of frontends refused since start.
    pub refused: u64,
    /// Why the last of them was.
    pub last_refusal: Option<String>,
    pub memory: Memory,
}

/// See the [module](self).
#[derive(Debug)]
pub struct VirtualEngine {
    config: Config,
    layout: Layout,
    engine: Engine,
    incarnation: Incarnation,
    gate_open: bool,
    /// Since when the engine has taken no requests; none while it does.
    closed_since: Option<Time>,
    /// Slot 0 is the control slot.
    slots: Vec<SlotState>,
    requests: Requests,
    control_calls: BTreeMap<CallId, ControlCall>,
    /// Calls of frontends that wait for a decision, by ticket, and how long they do.
    held_control: BTreeMap<u64, (Time, CheckedCall)>,
    next_ticket: u64,
    next_call: u64,
    supported_tasks: Option<rmpv::Value>,
    /// Of this life of the engine.
    memory: Memory,
    /// The engine's own clock, as last seen: what we write in its name carries it.
    engine_clock: f64,
    refused: u64,
    last_refusal: Option<String>,
    actions: VecDeque<Action>,
}

impl VirtualEngine {
    /// A rank without an engine, its gate open.
    pub fn new(config: Config) -> Self {
        let slots = (0..=config.frontend_slots).map(|_| SlotState::default()).collect();
        Self {
            layout: Layout::newest(),
            engine: Engine::Down("has not been started".to_owned()),
            incarnation: Incarnation::default(),
            gate_open: true,
            closed_since: Some(Time::ZERO),
            slots,
            requests: Requests::default(),
            control_calls: BTreeMap::new(),
            held_control: BTreeMap::new(),
            next_ticket: 0,
            next_call: 0,
            supported_tasks: None,
            memory: Memory::default(),
            engine_clock: 0.001,
            refused: 0,
            last_refusal: None,
            actions: VecDeque::new(),
            config,
        }
    }

    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Prepared(incarnation) => {
                self.go_down(&format!("replaced by incarnation {incarnation}"));
                self.incarnation = incarnation;
                self.engine = Engine::Prepared;
            }
            Event::Ready { incarnation, layout } => {
                if incarnation == self.incarnation && self.engine == Engine::Prepared {
                    self.engine = Engine::Ready;
                    self.layout = *layout;
                }
            }
            Event::Admitted(incarnation) => {
                if incarnation == self.incarnation && self.engine == Engine::Ready {
                    self.engine = Engine::Admitted;
                    self.send_waiting_calls();
                    self.pump();
                }
            }
            Event::Down { incarnation, reason } => {
                if incarnation == self.incarnation {
                    self.go_down(&reason);
                }
            }
            Event::GivenUp { reason } => self.give_up(now, reason),
            Event::Gate { open } => {
                self.gate_open = open;
                self.pump();
            }
            Event::FromFrontend { slot, frames } => self.on_frontend_message(now, slot, frames),
            Event::TooLarge { slot, head, size } => {
                let limit = self.config.limits.request_bytes;
                self.refuse_message(slot, &request::too_large(&head, size, limit));
            }
            Event::Limits(limits) => {
                self.config.limits = limits;
                self.pump();
            }
            Event::FromEngine { incarnation, slot, frames } => {
                if incarnation == self.incarnation
                    && !matches!(self.engine, Engine::Down(_) | Engine::GivenUp(_))
                {
                    self.on_engine_message(now, slot, frames);
                }
            }
            Event::Call { token, method, args, timeout } => {
                self.control_call(now, token, method, args, timeout)
            }
            Event::CloseSlot { slot } => self.close_slot(now, slot),
        }
        self.closed_since = match self.closed_since {
            _ if self.takes_requests() => None,
            since => since.or(Some(now)),
        };
    }

    /// Does what is due at `now`. Calling it early is harmless.
    pub fn handle_timeout(&mut self, now: Time) {
        self.expire_held_requests(now);
        self.expire_calls(now);
        self.settle_slots(now);
        self.forget_aborted(now);
        self.pump();
    }

    /// The next thing to be done.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        [self.next_request_deadline(), self.next_call_deadline(), self.next_settle_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// What the engine's memory holds.
    pub const fn memory(&self) -> Memory {
        self.memory
    }

    /// Plain data for status and metrics.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            incarnation: self.incarnation,
            admitted: self.engine == Engine::Admitted,
            gate_open: self.gate_open,
            held: self.requests.held_count() as u64,
            held_bytes: self.requests.held_bytes(),
            calls: self.control_calls.len() + self.held_control.len(),
            refused: self.refused,
            last_refusal: self.last_refusal.clone(),
            memory: self.memory,
            ..Snapshot::default()
        };
        for slot in &self.slots[1..] {
            snapshot.calls += slot.call_count();
            match slot.owner() {
                Some(owner) => {
                    snapshot.occupied += 1;
                    *snapshot.in_flight.entry(owner.frontend).or_default() += slot.sent as u64;
                }
                None if slot.is_draining() => snapshot.draining += 1,
                None => {}
            }
        }
        snapshot
    }

    /// The engine is gone: everything that only it could answer is answered here.
    fn go_down(&mut self, reason: &str) {
        let before = std::mem::replace(&mut self.engine, Engine::Down(reason.to_owned()));
        if matches!(before, Engine::Down(_) | Engine::GivenUp(_)) {
            return;
        }
        self.memory = Memory::default();
        self.fail_requests_in_flight();
        self.fail_calls_in_flight();
        for number in 1..self.slots.len() {
            let slot = &mut self.slots[number];
            slot.touched = false;
            if slot.is_draining() {
                self.free_slot(number);
            }
        }
        self.pump();
    }

    /// Answers what waits for an engine that will not come.
    fn give_up(&mut self, now: Time, reason: String) {
        self.go_down(&reason);
        self.engine = Engine::GivenUp(reason);
        self.give_up_held_requests(now);
        self.refuse_waiting_calls();
    }

    fn describe_engine(&self) -> String {
        let rank = self.config.rank;
        match &self.engine {
            Engine::Down(reason) => format!("engine of DP rank {rank} is down: {reason}"),
            Engine::GivenUp(reason) => format!("engine of DP rank {rank} has failed: {reason}"),
            Engine::Prepared | Engine::Ready => {
                format!("engine of DP rank {rank} is starting and takes no requests yet")
            }
            Engine::Admitted if self.memory.is_empty() => format!(
                "the weights of DP rank {rank} were discarded by a sleep of level 2: it takes no requests before \
                 others are loaded (wake up the tag \"weights\", then `sidecar update`)"
            ),
            Engine::Admitted => format!("engine of DP rank {rank} is running"),
        }
    }

    fn refuse(&mut self, slot: Slot, reason: String) {
        self.refused += 1;
        self.last_refusal = Some(reason.clone());
        self.actions.push_back(Action::Refused { slot, reason });
    }

    fn send_to_engine(&mut self, number: usize, frames: Frames) {
        self.slots[number].touched = true;
        self.actions.push_back(Action::ToEngine { slot: slot_of(number), frames });
    }

    fn send_to_frontend(&mut self, number: usize, frames: Frames) {
        if self.slots[number].owner().is_some() {
            self.actions.push_back(Action::ToFrontend { slot: slot_of(number), frames });
        }
    }

    /// Ends requests of a slot's owner with an error.
    fn answer_with_error<'a>(&mut self, number: usize, request_ids: impl IntoIterator<Item = &'a str>) {
        let frame = output::error_finish(&self.layout, self.config.rank, request_ids, self.engine_clock);
        self.send_to_frontend(number, vec![frame]);
    }

    /// Answers a call of a slot's owner.
    fn answer_call(&mut self, number: usize, call_id: CallId, result: Result<rmpv::Value, String>) {
        let frame =
            output::utility_answer(&self.layout, self.config.rank, call_id, result, self.engine_clock);
        self.send_to_frontend(number, vec![frame]);
    }
}

fn slot_of(number: usize) -> Slot {
    Slot(u32::try_from(number).unwrap_or(u32::MAX))
}
