//! Seeded simulation of the attachment machine against frontends that are stopped, started again,
//! too large, too small or otherwise wrong, with every message delayed.
//!
//! The model of a frontend follows `wait_for_engine_startup` (`vllm/v1/engine/utils.py` 0.32.0): it
//! dies of what that function raises for. Its DP coordinator says READY when all ranks of *its* size
//! have subscribed.

#![allow(clippy::unwrap_used, reason = "test helpers")]

#[path = "attachment_sim/cases.rs"]
mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::handshake::{Addresses, ConfigValue, Init};
use dp_sidecar_protocol::machine::attachment::{Action, Attachment, Attempt, Engines, Event, STALL, State};
use dp_sidecar_protocol::{EngineIndex, Time, Wave};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEEDS: u64 = 20_000;
/// Faults happen until then.
const STORM: u64 = 60_000;
/// All must be settled by then.
const END: u64 = 240_000;

/// The laws, by name.
mod law {
    pub(super) const READY_SECOND: &str = "READY follows the READY of the frontend's DP coordinator";
    pub(super) const ONE_HELLO: &str = "no frontend gets the HELLO of a rank twice";
    pub(super) const ONE_ATTEMPT: &str = "an attempt begins when the last one is torn down";
    pub(super) const ENDS_ATTACHED: &str = "in the end the frontend is attached over its own routes";
    pub(super) const ENDS_REMOVED: &str = "what is removed leaves no connection";
    pub(super) const WAVE_ONCE: &str = "a wave is passed on once at most";
}

/// A connection, named by what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Link {
    Probe,
    Handshake(EngineIndex),
    Coordinator(EngineIndex),
    Route(EngineIndex, u32),
    Teardown,
}

/// Something on its way.
#[derive(Clone, Debug)]
enum Item {
    /// To the machine.
    Machine(Event),
    /// From the machine's side to the frontend process of that generation.
    Hello(u64, Attempt, EngineIndex),
    Ready(u64, EngineIndex),
    Subscribe(u64, EngineIndex),
    Farewell(u64),
    /// Connecting: which process answers is decided when it arrives.
    Connect(Attempt, Link),
    StartFrontend,
    StopFrontend,
    Broadcast(u64),
}

struct Process {
    generation: u64,
    size: u16,
    api_servers: u32,
    coordinator: bool,
    accepts_ready: bool,
    hellos: BTreeSet<EngineIndex>,
    readies: BTreeSet<EngineIndex>,
    subscribed: BTreeSet<EngineIndex>,
    coordinator_ready: bool,
    /// One of its connections broke while it was running.
    broken: bool,
    /// Waves its DP coordinator has broadcast.
    waves: u64,
}

struct World {
    rng: ChaCha8Rng,
    now: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Item>,
    /// Last arrival per connection and direction: they keep their order.
    last: BTreeMap<(Attempt, Link, bool), u64>,
    machine: Attachment,
    size: u16,
    lockstep: bool,
    process: Option<Process>,
    generations: u64,
    /// Open connections and the process they lead to.
    open: BTreeMap<(Attempt, Link), u64>,
    tearing_down: Option<Attempt>,
    /// The latest attempt that was torn down.
    torn: Attempt,
    coordinator_ready_seen: BTreeSet<(Attempt, EngineIndex)>,
    has_coordinator: BTreeMap<Attempt, bool>,
    /// The process whose INIT an attempt got.
    named: BTreeMap<Attempt, u64>,
    waves_passed: u64,
    waves_expected: u64,
    /// What a successor finds written down, and the process it is about.
    record: Option<(Engines, Addresses, bool, u64)>,
    /// What the machine knows about the deployment.
    known: Option<Event>,
    attached: bool,
    done: bool,
    verbose: bool,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let size = rng.random_range(1..4);
        let lockstep = size > 1 && rng.random_bool(0.5);
        Self {
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            last: BTreeMap::new(),
            machine: Attachment::new("frontend:1", STALL),
            size,
            lockstep,
            process: None,
            generations: 0,
            open: BTreeMap::new(),
            tearing_down: None,
            torn: 0,
            coordinator_ready_seen: BTreeSet::new(),
            has_coordinator: BTreeMap::new(),
            named: BTreeMap::new(),
            waves_passed: 0,
            waves_expected: 0,
            record: None,
            known: None,
            attached: false,
            done: false,
            verbose: false,
            log: Vec::new(),
            rng,
        }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.verbose {
            self.log.push(format!("{:>7} {}", self.now, text()));
        }
    }

    fn at(&mut self, time: u64, item: Item) {
        self.sequence += 1;
        self.queue.insert((time, self.sequence), item);
    }

    /// Sends over a connection: delayed, in order.
    fn send(&mut self, attempt: Attempt, link: Link, to_machine: bool, item: Item) {
        // That a handshake connection is closed is noticed soon: the machine counts on it.
        let closed = matches!(&item, Item::Machine(Event::HandshakeLost { .. }));
        let delay = if closed {
            self.rng.random_range(0..50)
        } else if self.rng.random_bool(0.1) {
            self.rng.random_range(0..3000)
        } else {
            self.rng.random_range(0..20)
        };
        let key = (attempt, link, to_machine);
        let time = (self.now + delay).max(self.last.get(&key).copied().unwrap_or(0));
        self.last.insert(key, time);
        self.at(time, item);
    }

    fn tell(&mut self, event: Event) {
        self.note(|| format!("-> {event:?}"));
        match &event {
            Event::CoordinatorReady { attempt, rank } => {
                self.coordinator_ready_seen.insert((*attempt, *rank));
            }
            Event::EnginesComplete(_) | Event::EnginesMissing(_) => self.known = Some(event.clone()),
            Event::TornDown { attempt } if self.torn == *attempt => self.record = None,
            _ => {}
        }
        self.machine.handle_event(Time::from_millis(self.now), event);
        self.drain();
    }

    fn drain(&mut self) {
        let mut count = 0;
        while let Some(action) = self.machine.poll_action() {
            count += 1;
            assert!(count < 200, "actions without end");
            self.note(|| format!("   {action:?}"));
            self.perform(action);
        }
        let live: BTreeSet<Attempt> = self.open.keys().map(|(attempt, _)| *attempt).collect();
        assert!(live.len() <= 1, "{}: {live:?}", law::ONE_ATTEMPT);
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Probe { attempt } => self.connect(attempt, Link::Probe),
            Action::ConnectHandshake { attempt, rank } => {
                assert_eq!(self.tearing_down, None, "{}", law::ONE_ATTEMPT);
                self.connect(attempt, Link::Handshake(rank));
            }
            Action::SendHello { attempt, rank } => {
                if let Some(generation) = self.generation(attempt, Link::Handshake(rank)) {
                    let item = Item::Hello(generation, attempt, rank);
                    self.send(attempt, Link::Handshake(rank), false, item);
                }
            }
            Action::ConnectCoordinator { attempt, rank, .. } => {
                self.connect(attempt, Link::Coordinator(rank));
            }
            Action::OpenRoute { attempt, rank, api_server, .. } => {
                if self.record.is_none() {
                    let (engines, addresses) = self.machine.terms().unwrap();
                    let (engines, addresses) = (engines.clone(), addresses.clone());
                    self.record = Some((engines, addresses, false, self.named[&attempt]));
                }
                self.connect(attempt, Link::Route(rank, api_server))
            }
            Action::AdoptRoute { attempt, rank, api_server } => {
                let link = Link::Route(rank, api_server);
                let event = match self.generation(attempt, link) {
                    Some(_) => Event::RouteOpen { attempt, rank, api_server },
                    None => Self::lost(attempt, link),
                };
                self.report(attempt, link, event);
            }
            Action::SendReady { attempt, rank, .. } => {
                if self.has_coordinator[&attempt] {
                    assert!(
                        self.coordinator_ready_seen.contains(&(attempt, rank)),
                        "{}: rank {rank}",
                        law::READY_SECOND
                    );
                }
                if let Some(generation) = self.generation(attempt, Link::Handshake(rank)) {
                    let item = Item::Ready(generation, rank);
                    self.send(attempt, Link::Handshake(rank), false, item);
                }
            }
            Action::CloseHandshake { attempt } => {
                self.open.retain(|(a, link), _| *a != attempt || !matches!(link, Link::Handshake(_)));
            }
            Action::Teardown { attempt, told_dead, .. } => {
                assert_eq!(self.tearing_down, None, "{}", law::ONE_ATTEMPT);
                self.attached = false;
                self.tearing_down = Some(attempt);
                self.torn = attempt;
                let generation = self.named.get(&attempt).copied();
                if let (Some(generation), false) = (generation, told_dead.is_empty()) {
                    self.send(attempt, Link::Teardown, false, Item::Farewell(generation));
                }
                self.open.retain(|(a, _), _| *a != attempt);
                let torn_down = Item::Machine(Event::TornDown { attempt });
                self.send(attempt, Link::Teardown, true, torn_down);
            }
            Action::StartWave { .. } => self.waves_passed += 1,
            Action::Attached { .. } => {
                self.attached = true;
                if let Some((_, _, complete, _)) = &mut self.record {
                    *complete = true;
                }
            }
            Action::JoinCoordinator { .. } | Action::Refused { .. } => {}
            Action::Done => {
                assert!(!self.done);
                assert!(
                    self.open.keys().all(|(_, link)| *link == Link::Probe),
                    "{}: {:?}",
                    law::ENDS_REMOVED,
                    self.open
                );
                self.done = true;
            }
        }
    }

    fn connect(&mut self, attempt: Attempt, link: Link) {
        self.send(attempt, link, false, Item::Connect(attempt, link));
    }

    fn generation(&self, attempt: Attempt, link: Link) -> Option<u64> {
        self.open.get(&(attempt, link)).copied()
    }

    fn report(&mut self, attempt: Attempt, link: Link, event: Event) {
        self.send(attempt, link, true, Item::Machine(event));
    }

    /// The event that tells that a connection is closed, or was not accepted.
    fn lost(attempt: Attempt, link: Link) -> Event {
        let reason = "closed".to_owned();
        match link {
            Link::Probe => Event::ProbeFailed { attempt, reason },
            Link::Handshake(rank) => Event::HandshakeLost { attempt, rank, reason },
            Link::Coordinator(rank) => Event::CoordinatorLost { attempt, rank, reason },
            Link::Route(rank, api_server) => Event::RouteLost { attempt, rank, api_server, reason },
            Link::Teardown => Event::TornDown { attempt },
        }
    }

    fn connected(&mut self, attempt: Attempt, link: Link) {
        if attempt <= self.torn {
            // Its connect was cancelled.
            return;
        }
        let handshake_over = |process: &Process| process.readies.len() == usize::from(process.size);
        let generation = match (&self.process, link) {
            (Some(process), Link::Probe | Link::Handshake(_)) if !handshake_over(process) => {
                Some(process.generation)
            }
            (_, Link::Probe | Link::Handshake(_)) => None,
            // Data and coordinator ports are random: only the process that named them has them.
            (Some(process), _) => {
                self.named.get(&attempt).copied().filter(|generation| *generation == process.generation)
            }
            (None, _) => None,
        };
        let Some(generation) = generation else {
            return self.report(attempt, link, Self::lost(attempt, link));
        };
        let event = match link {
            Link::Probe => Event::ProbeOk { attempt, peer: Ipv4Addr::LOCALHOST.into(), mismatch: None },
            Link::Handshake(rank) => Event::HandshakeConnected { attempt, rank },
            Link::Route(rank, api_server) => Event::RouteOpen { attempt, rank, api_server },
            Link::Coordinator(rank) => {
                self.open.insert((attempt, link), generation);
                let item = Item::Subscribe(generation, rank);
                return self.send(attempt, link, false, item);
            }
            Link::Teardown => return,
        };
        if link != Link::Probe {
            self.open.insert((attempt, link), generation);
        }
        self.report(attempt, link, event);
    }

    fn process_of(&mut self, generation: u64) -> Option<&mut Process> {
        self.process.as_mut().filter(|process| process.generation == generation)
    }

    fn hello(&mut self, generation: u64, attempt: Attempt, rank: EngineIndex) {
        let (size, lockstep) = (self.size, self.lockstep);
        let Some(process) = self.process_of(generation) else {
            return;
        };
        if rank.0 >= process.size {
            return self.stop("HELLO of an unknown rank");
        }
        if !process.hellos.insert(rank) {
            // One that lost a connection in the middle of its life cannot go on anyway.
            assert!(process.broken, "{}: frontend {generation}, rank {rank}", law::ONE_HELLO);
            return self.stop("second HELLO");
        }
        let addresses = Addresses {
            inputs: (0..process.api_servers).map(|n| format!("tcp://frontend:i{generation}.{n}")).collect(),
            outputs: (0..process.api_servers).map(|n| format!("tcp://frontend:o{generation}.{n}")).collect(),
            coordinator_input: process.coordinator.then(|| "tcp://frontend:b".to_owned()),
            coordinator_output: process.coordinator.then(|| "tcp://frontend:k".to_owned()),
            frontend_stats_publish_address: process.coordinator.then(|| "f".to_owned()),
        };
        let coordinator = process.coordinator;
        let mut init = Init::independent(addresses);
        if lockstep && size > 1 {
            init.parallel_config
                .push(("data_parallel_size".to_owned(), ConfigValue::Int(process.size.into())));
        }
        self.has_coordinator.insert(attempt, coordinator);
        self.named.insert(attempt, generation);
        let payload: Bytes = init.encode();
        self.report(attempt, Link::Handshake(rank), Event::Init { attempt, rank, payload });
    }

    fn subscribe(&mut self, generation: u64, rank: EngineIndex) {
        let Some(process) = self.process_of(generation) else {
            return;
        };
        process.subscribed.insert(rank);
        if process.subscribed.len() < process.size.into() || process.coordinator_ready {
            return;
        }
        process.coordinator_ready = true;
        for (attempt, link) in self.links(generation) {
            if let Link::Coordinator(rank) = link {
                self.report(attempt, link, Event::CoordinatorReady { attempt, rank });
            }
        }
        let time = self.now + self.rng.random_range(0..5000);
        self.at(time, Item::Broadcast(generation));
    }

    fn ready(&mut self, generation: u64, rank: EngineIndex) {
        let Some(process) = self.process_of(generation) else {
            return;
        };
        if !process.hellos.contains(&rank) || !process.readies.insert(rank) {
            return self.stop("READY out of turn");
        }
        if !process.accepts_ready {
            return self.stop("configuration mismatch");
        }
        if process.readies.len() == usize::from(process.size) {
            // Startup is over: the handshake socket is closed.
            for (attempt, link) in self.links(generation) {
                if matches!(link, Link::Handshake(_)) {
                    self.open.remove(&(attempt, link));
                    self.report(attempt, link, Self::lost(attempt, link));
                }
            }
        }
    }

    fn broadcast(&mut self, generation: u64) {
        let Some(process) = self.process_of(generation) else {
            return;
        };
        process.waves += 1;
        let wave = Wave(process.waves);
        for (attempt, link) in self.links(generation) {
            if let Link::Coordinator(rank) = link {
                let event = Event::StartWave { attempt, rank, wave };
                if rank.0 == 0 {
                    self.waves_expected += 1;
                }
                self.report(attempt, link, event);
            }
        }
    }

    fn links(&self, generation: u64) -> Vec<(Attempt, Link)> {
        self.open.iter().filter(|(_, to)| **to == generation).map(|(key, _)| *key).collect()
    }

    fn start(&mut self) {
        if self.process.is_some() {
            return;
        }
        self.generations += 1;
        let storm = self.now < STORM;
        // What is started last fits.
        let misfit = storm && self.rng.random_bool(0.4);
        let size = if misfit && self.rng.random_bool(0.6) { self.rng.random_range(1..5) } else { self.size };
        self.process = Some(Process {
            generation: self.generations,
            size,
            api_servers: self.rng.random_range(1..3),
            coordinator: self.lockstep || self.rng.random_bool(0.7),
            accepts_ready: !misfit || self.rng.random_bool(0.5),
            hellos: BTreeSet::new(),
            readies: BTreeSet::new(),
            subscribed: BTreeSet::new(),
            coordinator_ready: false,
            broken: false,
            waves: 0,
        });
        let generation = self.generations;
        self.note(|| format!("frontend {generation} of size {size} starts"));
        if storm {
            let life = if self.rng.random_bool(0.5) {
                self.rng.random_range(0..200)
            } else {
                self.rng.random_range(0..40_000)
            };
            let time = self.now + life;
            self.at(time, Item::StopFrontend);
        }
    }

    fn stop(&mut self, why: &str) {
        let Some(process) = self.process.take() else {
            return;
        };
        self.note(|| format!("frontend {} stops: {why}", process.generation));
        for (attempt, link) in self.links(process.generation) {
            self.open.remove(&(attempt, link));
            self.report(attempt, link, Self::lost(attempt, link));
        }
        let time = self.now + self.rng.random_range(0..8000);
        self.at(time, Item::StartFrontend);
    }

    /// One connection breaks while the process lives on.
    fn break_route(&mut self) {
        let routes: Vec<_> = self
            .open
            .keys()
            .filter(|(_, link)| matches!(link, Link::Route(..) | Link::Coordinator(_)))
            .copied()
            .collect();
        if self.attached && !routes.is_empty() {
            let (attempt, link) = routes[self.rng.random_range(0..routes.len())];
            self.open.remove(&(attempt, link));
            self.note(|| format!("{link:?} breaks"));
            if let Some(process) = &mut self.process {
                process.broken = true;
            }
            self.report(attempt, link, Self::lost(attempt, link));
        }
    }

    /// The sidecar is killed, and another one starts. The routes are in other processes.
    fn restart(&mut self) {
        self.note(|| "the sidecar is killed".to_owned());
        let record = self.record.take();
        self.machine = Attachment::new("frontend:1", STALL);
        let of_attempt = |item: &Item| match item {
            Item::Machine(event) => {
                !matches!(event, Event::EnginesComplete(_) | Event::EnginesMissing(_) | Event::FreeSlots(_))
            }
            Item::Connect(..) | Item::Hello(..) => true,
            _ => false,
        };
        self.queue.retain(|_, item| !of_attempt(item));
        let routes = std::mem::take(&mut self.open);
        let routes = routes.into_iter().filter(|((_, link), _)| matches!(link, Link::Route(..)));
        self.open = routes.map(|((_, link), generation)| ((1, link), generation)).collect();
        (self.tearing_down, self.torn, self.attached) = (None, 0, false);
        self.coordinator_ready_seen.clear();
        self.has_coordinator.clear();
        self.named.clear();
        self.last.clear();
        if let Some(process) = &mut self.process {
            // Its handshake connections were closed in the middle, unless it was over.
            process.broken |= process.readies.len() < process.size.into();
        }
        if let Some((engines, addresses, complete, generation)) = record {
            self.has_coordinator.insert(1, addresses.coordinator_input.is_some());
            self.named.insert(1, generation);
            self.record = Some((engines.clone(), addresses.clone(), complete, generation));
            self.tell(Event::FreeSlots(8));
            self.tell(Event::Adopt { engines, addresses, complete });
        } else {
            assert!(self.open.is_empty(), "routes that nobody has written down: {:?}", self.open);
        }
        self.tell(Event::FreeSlots(8));
        if let Some(known) = self.known.clone() {
            self.tell(known);
        }
    }

    fn step(&mut self, item: Item) {
        match item {
            Item::Machine(event) => {
                if let Event::TornDown { attempt } = &event
                    && self.tearing_down == Some(*attempt)
                {
                    self.tearing_down = None;
                }
                self.tell(event);
            }
            Item::Connect(attempt, link) => self.connected(attempt, link),
            Item::Hello(generation, attempt, rank) => self.hello(generation, attempt, rank),
            Item::Ready(generation, rank) => self.ready(generation, rank),
            Item::Subscribe(generation, rank) => self.subscribe(generation, rank),
            Item::Farewell(generation) => {
                if self.process_of(generation).is_some() {
                    self.stop("ENGINE_CORE_DEAD");
                }
            }
            Item::StartFrontend => self.start(),
            Item::StopFrontend => self.stop("killed"),
            Item::Broadcast(generation) => self.broadcast(generation),
        }
    }

    /// Runs until `end`, or until `done`.
    fn run(&mut self, end: u64) {
        let mut steps = 0;
        loop {
            steps += 1;
            assert!(steps < 200_000, "livelock");
            let timer =
                self.machine.poll_timeout().map(|at| u64::try_from(at.since_start().as_millis()).unwrap());
            let next = self.queue.first_key_value().map(|((time, _), _)| *time);
            let Some(time) = [timer, next].into_iter().flatten().min() else {
                return;
            };
            if time > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(time);
            if next.is_some_and(|next| next <= time) {
                let (_, item) = self.queue.pop_first().unwrap();
                self.step(item);
            } else {
                self.machine.handle_timeout(Time::from_millis(self.now));
                self.drain();
            }
        }
    }
}
