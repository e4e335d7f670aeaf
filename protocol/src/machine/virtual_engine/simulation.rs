//! A seeded world around one virtual engine: an engine that steps, crashes and comes back, frontends
//! that come, ask, abort, break the rules and vanish, gates that open and close, and links that
//! deliver late but in order.
//!
//! The engine follows `vllm/v1/engine/core.py` 0.32.0: messages of all input sockets go through one
//! queue; a step gives at most one message per client, which carries the requests finished since the
//! last one (aborted ones, too); a utility call is answered in its turn, a pause later; two requests
//! with one id, or a client index that does not exist, end it.

mod engine;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::machine::held_call::Verdict;

use super::{Action, Config, Event, Limits, VirtualEngine};
use crate::frames::{ENGINE_CORE_DEAD, Frames, RequestType};
use crate::ids::{CallId, ClientIndex, EngineIndex, FrontendId, Incarnation, Slot, Wave};
use crate::layout::Layout;
use crate::machine::mutation::{self, Mutation};
use crate::output::{EngineOutput, FinishReason, NewOutput, NewOutputs};
use crate::request::{self, FrontendMessage, NewRequest, check_frontend_message};
use crate::time::Time;
use crate::utility::{UtilityCall, UtilityOutput};

const SLOTS: u32 = 3;
const MAX_IN_FLIGHT: usize = 4;
/// Bytes: three of the requests here, with what holding one takes.
const MAX_HELD: usize = 3 * 700;

#[derive(Default)]
struct FakeEngine {
    inbox: VecDeque<(Slot, Frames)>,
    outbox: BTreeMap<Slot, VecDeque<Frames>>,
    /// Tokens left, by request id.
    running: BTreeMap<String, (Slot, u32)>,
    finished: BTreeMap<Slot, Vec<String>>,
    deferred: Vec<(Slot, CallId)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    Down,
    Prepared,
    Ready,
    Admitted,
}

/// One API server of one attachment.
struct Client {
    frontend: FrontendId,
    slot: Slot,
    to_machine: VecDeque<Frames>,
    /// Final answers by request id; `None` if it was aborted and needs none.
    requests: BTreeMap<String, Option<u32>>,
    calls: BTreeMap<CallId, u32>,
}

struct World {
    rng: ChaCha8Rng,
    now: Time,
    machine: VirtualEngine,
    layout: Layout,
    engine: FakeEngine,
    life: Life,
    /// What the machine has been told.
    told: Life,
    incarnation: Incarnation,
    /// What an engine that is gone had sent, to be delivered late.
    ghosts: Vec<(Incarnation, Slot, Frames)>,
    clients: Vec<Client>,
    next_frontend: u64,
    next_id: u64,
    tokens: BTreeSet<u64>,
    held: Vec<u64>,
    released: BTreeSet<u64>,
    free: BTreeSet<Slot>,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let limits = Limits { hold: Duration::from_millis(400), held_bytes: MAX_HELD, ..Limits::default() };
        let mut config = Config::new(EngineIndex(1), SLOTS, limits);
        config.max_in_flight = MAX_IN_FLIGHT;
        config.max_calls = 3;
        mutation::set(mutation);
        let machine = VirtualEngine::new(config);
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            now: Time::ZERO,
            machine,
            layout: Layout::newest(),
            engine: FakeEngine::default(),
            life: Life::Down,
            told: Life::Down,
            incarnation: Incarnation(0),
            ghosts: Vec::new(),
            clients: Vec::new(),
            next_frontend: 0,
            next_id: 0,
            tokens: BTreeSet::new(),
            held: Vec::new(),
            released: BTreeSet::new(),
            free: (1..=SLOTS).map(Slot).collect(),
            log: Vec::new(),
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn event(&mut self, event: Event) -> Result<(), String> {
        if self.log.len() < 2000 {
            self.log.push(format!("{:?} {}", self.now, brief(&event)));
        }
        match &event {
            Event::Prepared(_) => self.told = Life::Prepared,
            Event::Ready { .. } => self.told = Life::Ready,
            Event::Admitted(_) => self.told = Life::Admitted,
            Event::Down { .. } => self.told = Life::Down,
            _ => {}
        }
        self.machine.handle_event(self.now, event);
        self.drain()
    }

    /// Performs what the machine wants done.
    fn drain(&mut self) -> Result<(), String> {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::ToEngine { slot, frames } => self.deliver_to_engine(slot, frames)?,
                Action::ToFrontend { slot, frames } => self.deliver_to_client(slot, &frames)?,
                Action::HeldCall(call) => self.held.push(call.ticket),
                Action::Released { ticket, .. } => {
                    if !self.released.remove(&ticket) {
                        return Err(format!("ticket {ticket} reported without being released"));
                    }
                }
                Action::CallAnswered { token, .. } => {
                    if !self.tokens.remove(&token) {
                        return Err(format!("control call {token} answered twice"));
                    }
                }
                Action::SlotFree { slot } => {
                    if !self.free.insert(slot) {
                        return Err(format!("slot {slot} freed twice"));
                    }
                }
                Action::EngineDead { .. } => self.told = Life::Down,
                Action::Wake | Action::Refused { .. } => {}
            }
        }
        let snapshot = self.machine.snapshot();
        let on_engine: u64 = snapshot.in_flight.values().sum();
        if snapshot.held_bytes > MAX_HELD || on_engine > MAX_IN_FLIGHT as u64 {
            return Err(format!("bounds exceeded: {snapshot:?}"));
        }
        Ok(())
    }

    fn deliver_to_engine(&mut self, slot: Slot, frames: Frames) -> Result<(), String> {
        let allowed = match self.told {
            Life::Admitted => true,
            Life::Ready => slot == Slot::CONTROL,
            Life::Down | Life::Prepared => false,
        };
        if !allowed {
            return Err(format!("slot {slot} reached an engine that is {:?}", self.told));
        }
        if self.life == Life::Down {
            return Ok(());
        }
        self.engine.inbox.push_back((slot, frames));
        Ok(())
    }

    fn deliver_to_client(&mut self, slot: Slot, frames: &[Bytes]) -> Result<(), String> {
        let Some(client) = self.clients.iter_mut().find(|client| client.slot == slot) else {
            return Err(format!("message for slot {slot}, which nobody has"));
        };
        let view = match EngineOutput::parse(frames) {
            Ok(EngineOutput::Outputs(view)) => view,
            Ok(EngineOutput::Dead) => return Err("a frontend heard ENGINE_CORE_DEAD".to_owned()),
            Err(error) => return Err(format!("a frontend got garbage: {error}")),
        };
        if let Some(call_id) = view.utility_call_id() {
            let answers = client
                .calls
                .get_mut(&call_id)
                .ok_or_else(|| format!("slot {slot} got the answer to a foreign call {call_id}"))?;
            *answers += 1;
            if *answers > 1 {
                return Err(format!("call {call_id} was answered {answers} times"));
            }
            return Ok(());
        }
        for output in view.outputs() {
            let output = output.map_err(|error| error.to_string())?;
            let answers = client
                .requests
                .get_mut(output.request_id)
                .ok_or_else(|| format!("slot {slot} got output of foreign {}", output.request_id))?;
            if let (Some(_), Some(count)) = (output.finished, answers) {
                *count += 1;
                if *count > 1 {
                    return Err(format!("{} got two final answers", output.request_id));
                }
            }
        }
        for id in view.finished_requests().map_err(|error| error.to_string())? {
            if !client.requests.contains_key(id) {
                return Err(format!("slot {slot} was told about foreign {id}"));
            }
        }
        Ok(())
    }

    // === engine ===

    fn attach(&mut self) -> Result<(), String> {
        self.next_frontend += 1;
        let frontend = FrontendId(self.next_frontend);
        for api_server in 0..self.rng.random_range(1..3) {
            match self.machine.open_slot(frontend, api_server) {
                Ok(slot) => {
                    if !self.free.remove(&slot) {
                        return Err(format!("slot {slot} was given away twice"));
                    }
                    self.log.push(format!("{frontend} opens {slot}"));
                    self.clients.push(Client {
                        frontend,
                        slot,
                        to_machine: VecDeque::new(),
                        requests: BTreeMap::new(),
                        calls: BTreeMap::new(),
                    });
                }
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn detach(&mut self) -> Result<(), String> {
        if self.clients.is_empty() {
            return Ok(());
        }
        let at = self.rng.random_range(0..self.clients.len());
        let frontend = self.clients[at].frontend;
        let slots: Vec<Slot> = self
            .clients
            .iter()
            .filter(|client| client.frontend == frontend)
            .map(|client| client.slot)
            .collect();
        self.clients.retain(|client| client.frontend != frontend);
        for slot in slots {
            self.event(Event::CloseSlot { slot })?;
        }
        Ok(())
    }

    fn client_acts(&mut self) {
        if self.clients.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.clients.len());
        let kind = self.rng.random_range(0..100);
        self.next_id += 1;
        let number = self.next_id;
        let mut id = format!("r{number}");
        if kind < 4
            && let Some(known) = self.engine.running.keys().next()
            && !self.clients[at].requests.contains_key(known)
        {
            // Somebody's id: the engine must not see it twice.
            id.clone_from(known);
        }
        let layout = self.layout;
        let client = &mut self.clients[at];
        let frames = match kind {
            0..60 => {
                let request = NewRequest {
                    request_id: id.clone(),
                    prompt_token_ids: vec![1, 2],
                    max_tokens: 3,
                    client_index: ClientIndex(0),
                    current_wave: Wave(0),
                    arrival_time: 1.0,
                };
                client.requests.entry(id).or_insert(Some(0));
                request.encode(&layout)
            }
            60..75 => {
                let ids: Vec<String> = client.requests.keys().rev().take(2).cloned().collect();
                for id in &ids {
                    client.requests.insert(id.clone(), None);
                }
                request::encode_abort(ids.iter().map(String::as_str))
            }
            75..95 => {
                let methods = ["is_sleeping", "get_supported_tasks", "pause_scheduler", "shutdown"];
                let call_id = CallId(i128::from(number) + (1 << 40));
                client.calls.insert(call_id, 0);
                let call = UtilityCall {
                    client_index: ClientIndex(0),
                    call_id,
                    method: methods[(number % 4) as usize].to_owned(),
                    args: Vec::new(),
                };
                call.encode()
            }
            95..98 => vec![RequestType::ExecutorFailed.to_frame(), Bytes::new()],
            _ => vec![RequestType::Add.to_frame(), Bytes::from_static(b"\xdc\xff")],
        };
        client.to_machine.push_back(frames);
    }

    fn client_delivers(&mut self) -> Result<(), String> {
        if self.clients.is_empty() {
            return Ok(());
        }
        let at = self.rng.random_range(0..self.clients.len());
        let client = &mut self.clients[at];
        let slot = client.slot;
        match client.to_machine.pop_front() {
            Some(frames) => self.event(Event::FromFrontend { slot, frames }),
            None => Ok(()),
        }
    }

    // === the run ===

    fn timeouts(&mut self) -> Result<(), String> {
        if self.machine.poll_timeout().is_some_and(|due| due <= self.now) {
            self.machine.handle_timeout(self.now);
            self.drain()?;
            if self.machine.poll_timeout().is_some_and(|due| due <= self.now) {
                return Err("a timeout stays due".to_owned());
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.now = self.now + Duration::from_millis(self.rng.random_range(0..20));
        self.timeouts()?;
        match self.rng.random_range(0..100) {
            0..4 => self.attach(),
            4..7 => self.detach(),
            7..27 => {
                self.client_acts();
                Ok(())
            }
            27..50 => self.client_delivers(),
            50..62 => self.engine_reads(),
            62..70 => {
                if self.life == Life::Admitted {
                    self.engine_steps();
                }
                Ok(())
            }
            70..84 => self.engine_delivers(),
            84..90 => self.advance_engine_life(),
            90..92 => self.crash(),
            92..95 => {
                let open = self.chance(60);
                self.event(Event::Gate { open })
            }
            95..97 => self.control_call(),
            97..99 => self.release(),
            _ => match self.ghosts.pop() {
                Some((incarnation, slot, frames)) => {
                    self.event(Event::FromEngine { incarnation, slot, frames })
                }
                None => Ok(()),
            },
        }
    }

    fn control_call(&mut self) -> Result<(), String> {
        self.next_id += 1;
        let token = self.next_id;
        self.tokens.insert(token);
        let timeout = Duration::from_millis(self.rng.random_range(1..500));
        self.event(Event::Call { token, method: "is_scheduler_paused".to_owned(), args: Vec::new(), timeout })
    }

    fn release(&mut self) -> Result<(), String> {
        let Some(ticket) = self.held.pop() else {
            return Ok(());
        };
        let verdict = match self.rng.random_range(0..3) {
            0 => Verdict::Forward,
            1 => Verdict::Answer(rmpv::Value::Nil),
            _ => Verdict::Refuse("busy".to_owned()),
        };
        self.released.insert(ticket);
        self.machine.release(ticket, verdict);
        self.drain()
    }

    /// Lets everything come to an end, with an engine that stays.
    fn settle(&mut self) -> Result<(), String> {
        self.event(Event::Gate { open: true })?;
        while self.life != Life::Admitted {
            self.advance_engine_life()?;
        }
        for _ in 0..400 {
            while !self.held.is_empty() {
                self.release()?;
            }
            for at in 0..self.clients.len() {
                let slot = self.clients[at].slot;
                while let Some(frames) = self.clients[at].to_machine.pop_front() {
                    self.event(Event::FromFrontend { slot, frames })?;
                }
            }
            while !self.engine.inbox.is_empty() {
                self.engine_reads()?;
            }
            self.engine_steps();
            while !self.engine.outbox.is_empty() {
                self.engine_delivers()?;
            }
            self.now = self.now + Duration::from_millis(20);
            self.timeouts()?;
            if self.is_quiet() {
                return self.check_end();
            }
        }
        self.check_end()
    }

    fn is_quiet(&self) -> bool {
        self.engine.running.is_empty()
            && self.engine.deferred.is_empty()
            && self.engine.inbox.is_empty()
            && self.held.is_empty()
            && self.machine.requests.entries_len() == 0
    }

    fn check_end(&self) -> Result<(), String> {
        for client in &self.clients {
            for (id, answers) in &client.requests {
                if *answers == Some(0) {
                    return Err(format!("{id} of {} was never answered", client.frontend));
                }
            }
            for (call_id, answers) in &client.calls {
                if *answers != 1 {
                    return Err(format!("call {call_id} has {answers} answers"));
                }
            }
        }
        let snapshot = self.machine.snapshot();
        let idle = snapshot.in_flight.values().all(|count| *count == 0)
            && snapshot.held == 0
            && snapshot.held_bytes == 0
            && snapshot.calls == 0
            && snapshot.draining == 0
            && snapshot.occupied as usize == self.clients.len()
            && self.tokens.is_empty()
            && self.released.is_empty()
            && self.machine.requests.entries_len() == 0
            && self.machine.requests.sent_totals() == (0, 0);
        if idle { Ok(()) } else { Err(format!("tables are not empty: {snapshot:?}")) }
    }
}

fn brief(event: &Event) -> String {
    match event {
        Event::FromEngine { slot, frames, .. } => {
            let view = EngineOutput::parse(frames);
            format!("engine on {slot}: {view:?}")
        }
        Event::FromFrontend { slot, frames } => {
            let kind = check_frontend_message(&Layout::newest(), frames);
            format!("frontend on {slot}: {kind:?}")
        }
        Event::Ready { incarnation, .. } => format!("Ready({incarnation})"),
        other => format!("{other:?}"),
    }
}

fn run(seed: u64, mutation: Option<Mutation>) -> Result<(), (String, Vec<String>)> {
    let mut world = World::new(seed, mutation);
    let steps = world.rng.random_range(50..250);
    let mut outcome = Ok(());
    for _ in 0..steps {
        outcome = world.step();
        if outcome.is_err() {
            break;
        }
    }
    outcome.and_then(|()| world.settle()).map_err(|error| (error, world.log))
}

fn run_seeds(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        if let Err((error, log)) = run(seed, None) {
            let last = log.len().saturating_sub(60);
            panic!("seed {seed}: {error}\n{}", log[last..].join("\n"));
        }
    }
}

#[test]
fn every_request_and_call_has_one_answer_whatever_happens_1() {
    run_seeds(0..10_000);
}

#[test]
fn every_request_and_call_has_one_answer_whatever_happens_2() {
    run_seeds(10_000..20_000);
}

fn caught(mutation: Mutation, within: u64) -> String {
    (0..within)
        .find_map(|seed| run(seed, Some(mutation)).err())
        .map(|(error, _)| error)
        .unwrap_or_else(|| panic!("{mutation:?} passed {within} seeds"))
}

#[test]
fn forgetting_the_requests_of_a_lost_engine_is_caught() {
    let error = caught(Mutation::ForgetInFlightAtDown, 200);
    assert!(error.contains("never answered"), "{error}");
}

#[test]
fn giving_a_slot_away_before_the_fence_is_caught() {
    let error = caught(Mutation::ReuseSlotWithoutFence, 2000);
    assert!(error.contains("foreign"), "{error}");
}
