//! The control machine and the ranks' virtual engines in front of engines that sleep: frontends and the operator put
//! them to sleep and wake them up in parts, trainers and updates load, engines die, and the sidecar starts again, in an
//! order that a seed decides.

mod engine;
mod wishes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::control::{self, Control, Grant, OwnerId};
use dp_sidecar_protocol::machine::held_call::{HeldCall, Verdict};
use dp_sidecar_protocol::machine::memory::OwnCall;
use dp_sidecar_protocol::machine::mutation::Mutation;
use dp_sidecar_protocol::machine::policy::Wake;
use dp_sidecar_protocol::machine::virtual_engine::{self as rank, Limits, VirtualEngine};
use dp_sidecar_protocol::output::NewOutputs;
use dp_sidecar_protocol::request::NewRequest;
use dp_sidecar_protocol::utility::{UtilityCall, UtilityOutput};
use dp_sidecar_protocol::{
    CallId, ClientIndex, EngineIndex, FrontendId, GroupKind, Incarnation, PausedBy, Slot, Time, Wave,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rmpv::Value;

use super::laws;
use engine::{Engine, Said, Weights};

/// The laws, by name.
mod law {
    pub(super) const ADMITTED: &str = "no request is admitted to an engine without weights";
    pub(super) const GARBAGE: &str = "nothing is computed without weights";
    pub(super) const THERE: &str = "nothing is computed in memory, or loaded into it, that is not there";
    pub(super) const VERSION: &str = "the reported version is that of the bytes, or unknown";
    pub(super) const ENDS: &str = "after a sleep, a wake, a load and a wake every engine serves";
}

struct Node {
    machine: VirtualEngine,
    engine: Engine,
    alive: bool,
    /// Calls that the control machine was told of and has not decided.
    undecided: BTreeMap<u64, HeldCall>,
    /// On the way to the control machine.
    told: VecDeque<HeldCall>,
}

/// What an owner of the lock does, and which answers it waits for.
struct Job {
    owner: OwnerId,
    update: bool,
    method: &'static str,
    args: Vec<Value>,
    effect: Option<OwnCall>,
    waiting: BTreeSet<u64>,
    good: bool,
}

struct World {
    rng: ChaCha8Rng,
    now: Time,
    control: Control,
    kind: GroupKind,
    nodes: Vec<Node>,
    /// What engines start with.
    committed: u64,
    /// On record: who has paused. Written later than it happens.
    ledger: Option<PausedBy>,
    job: Option<Job>,
    /// What the owner that waits for the lock is about to do.
    plan: Option<(OwnerId, bool, &'static str, Vec<Value>)>,
    /// Calls of the control machine: rank and operation by token.
    errands: BTreeMap<u64, (EngineIndex, u64)>,
    next: u64,
    /// Engines fail no call any more.
    calm: bool,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    answered: u64,
    emptied: u64,
    updates: u64,
    own_loads: u64,
    restarts: u64,
    deaths: u64,
    refused: u64,
}

fn tags(names: &[&str]) -> Vec<Value> {
    vec![Value::Array(names.iter().map(|name| Value::from(*name)).collect())]
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let ranks = rng.random_range(1..=3u16);
        let kind = GroupKind::of(rng.random_bool(0.4));
        let node = |index| Node {
            machine: VirtualEngine::new(rank::Config::new(EngineIndex(index), 2, Limits::default())),
            engine: Engine::default(),
            alive: false,
            undecided: BTreeMap::new(),
            told: VecDeque::new(),
        };
        let mut world = Self {
            rng,
            now: Time::ZERO,
            control: Control::new((0..ranks).map(EngineIndex), kind),
            kind,
            nodes: (0..ranks).map(node).collect(),
            committed: 0,
            ledger: None,
            job: None,
            plan: None,
            errands: BTreeMap::new(),
            next: 0,
            calm: false,
            counts: Counts::default(),
        };
        for at in 0..world.nodes.len() {
            for frontend in 1..=2 {
                world.nodes[at].machine.open_slot(FrontendId(frontend), 0).unwrap();
            }
            world.start(at);
        }
        world
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// An engine comes up with the committed weights.
    fn start(&mut self, at: usize) {
        let life = self.nodes[at].engine.life + 1;
        self.nodes[at].engine = Engine { life, weights: Weights::Good(self.committed), ..Engine::default() };
        self.nodes[at].alive = true;
        let incarnation = Incarnation(life);
        let layout = Box::new(Layout::newest());
        for event in [
            rank::Event::Prepared(incarnation),
            rank::Event::Ready { incarnation, layout },
            rank::Event::Admitted(incarnation),
        ] {
            self.nodes[at].machine.handle_event(self.now, event);
        }
        let (rank, memory) = (index(at), self.nodes[at].machine.memory());
        self.control.handle_event(self.now, control::Event::EngineUp { rank, memory });
    }

    fn die(&mut self, at: usize) {
        self.counts.deaths += 1;
        let incarnation = Incarnation(self.nodes[at].engine.life);
        self.nodes[at].alive = false;
        let reason = "killed".to_owned();
        self.nodes[at]
            .machine
            .handle_event(self.now, rank::Event::Down { incarnation, reason: reason.clone() });
        self.control.handle_event(self.now, control::Event::EngineDown { rank: index(at), reason });
    }

    /// The sidecar ends and another one takes over: ranks, engines and what they hold stay.
    fn restart(&mut self) {
        self.counts.restarts += 1;
        self.control = Control::new((0..self.nodes.len()).map(index), self.kind);
        (self.job, self.plan) = (None, None);
        self.errands.clear();
        for (at, node) in self.nodes.iter_mut().enumerate() {
            // Whoever decides is told of them again.
            let undecided = std::mem::take(&mut node.undecided).into_values();
            node.told = undecided.chain(std::mem::take(&mut node.told)).collect();
            if node.alive {
                let (rank, memory) = (index(at), node.machine.snapshot().memory);
                self.control.handle_event(self.now, control::Event::EngineUp { rank, memory });
            }
        }
        if let Some(by) = self.ledger.clone() {
            let owner = OwnerId(self.number());
            let (name, patience) = ("recovery".to_owned(), Duration::from_secs(1));
            self.control.handle_event(self.now, control::Event::Acquire { owner, name, patience });
            self.control.handle_event(self.now, control::Event::PausedSet { owner, paused_by: Some(by) });
            self.control.handle_event(self.now, control::Event::Release { owner });
            while let Some(action) = self.control.poll_action() {
                if matches!(action, control::Action::Call { .. }) {
                    self.act(action);
                }
            }
        } else {
            // Paused for no reason on record: the recovery, which is not part of this, brings them back.
            let unexplained =
                |node: &Node| node.alive && node.engine.paused && !node.machine.memory().sleeps();
            let lost: Vec<usize> = (0..self.nodes.len()).filter(|at| unexplained(&self.nodes[*at])).collect();
            let all = !lost.is_empty() && self.kind.is_lockstep();
            let lost = if all { (0..self.nodes.len()).collect() } else { lost };
            for at in &lost {
                if self.nodes[*at].alive {
                    self.die(*at);
                }
            }
            for at in lost {
                self.start(at);
            }
        }
    }

    // --- what the operator does ---

    /// The lock is there: does what was planned, unless what it finds forbids it.
    fn granted(&mut self, owner: OwnerId, grant: &Grant) {
        let Some((_, update, method, args)) = self.plan.take_if(|plan| plan.0 == owner) else {
            self.control.handle_event(self.now, control::Event::Release { owner });
            return;
        };
        let wake = match method {
            "wake_up" if args.is_empty() => Some(Wake::All),
            "wake_up" => {
                let has = |tag: &str| args[0].as_array().unwrap().contains(&Value::from(tag));
                Some(Wake::Only { weights: has("weights"), cache: has("kv_cache") })
            }
            _ => None,
        };
        let refused = (update && !grant.weights_asleep().is_empty())
            || self.nodes.iter().any(|node| !node.alive)
            || wake.is_some_and(|wake| grant.wakes_without_weights(wake));
        if refused {
            self.counts.refused += 1;
            self.control.handle_event(self.now, control::Event::Release { owner });
            return;
        }
        let effect = OwnCall::of(method, &args);
        if let Some(OwnCall::Other(effect)) = effect {
            let ranks = (0..self.nodes.len()).map(index).collect();
            self.control.handle_event(self.now, control::Event::Calling { owner, ranks, effect });
        }
        let mut job = Job { owner, update, method, args, effect, waiting: BTreeSet::new(), good: true };
        for at in 0..self.nodes.len() {
            let token = self.number();
            job.waiting.insert(token);
            self.call(at, token, job.method, job.args.clone());
        }
        self.job = Some(job);
    }

    fn call(&mut self, at: usize, token: u64, method: &str, args: Vec<Value>) {
        let (method, timeout) = (method.to_owned(), Duration::from_secs(600));
        self.nodes[at].machine.handle_event(self.now, rank::Event::Call { token, method, args, timeout });
    }

    fn job_answered(&mut self, at: usize, token: u64, result: Result<Value, String>) {
        let Some(job) = &mut self.job else {
            return;
        };
        if !job.waiting.remove(&token) {
            return; // of an earlier sidecar
        }
        job.good &= result.is_ok() && result != Ok(Value::from(false));
        let owner = job.owner;
        if let Some(OwnCall::Other(effect)) = job.effect {
            let event = control::Event::Called { owner, rank: index(at), effect, result };
            self.control.handle_event(self.now, event);
        }
        let Some(job) = self.job.take_if(|job| job.waiting.is_empty()) else {
            return;
        };
        if job.update && job.good {
            self.counts.updates += 1;
            self.committed = self.next_version();
            self.control.handle_event(self.now, control::Event::WeightsKnown { owner });
        } else if job.method == "sleep" {
            let paused_by = Some(PausedBy::Operator);
            self.control.handle_event(self.now, control::Event::PausedSet { owner, paused_by });
        } else if job.method == "wake_up" && job.good && !self.control.snapshot().asleep {
            self.control.handle_event(self.now, control::Event::PausedSet { owner, paused_by: None });
        }
        self.control.handle_event(self.now, control::Event::Release { owner });
    }

    fn next_version(&self) -> u64 {
        self.committed + 1
    }

    // --- what the machines want ---

    fn settle(&mut self) -> Result<(), String> {
        loop {
            let mut idle = true;
            while let Some(action) = self.control.poll_action() {
                idle = false;
                self.act(action);
            }
            for at in 0..self.nodes.len() {
                while let Some(action) = self.nodes[at].machine.poll_action() {
                    idle = false;
                    self.rank_acts(at, action)?;
                }
            }
            if idle {
                return self.check();
            }
        }
    }

    fn act(&mut self, action: control::Action) {
        match action {
            control::Action::Decide { rank, ticket, verdict } => {
                self.counts.refused += u64::from(matches!(verdict, Verdict::Refuse(_)));
                let node = &mut self.nodes[usize::from(rank.0)];
                node.undecided.remove(&ticket);
                node.machine.release(ticket, verdict);
            }
            control::Action::Call { rank, operation, method, args } => {
                let token = self.number();
                self.errands.insert(token, (rank, operation));
                self.call(usize::from(rank.0), token, method, args);
            }
            control::Action::Granted { owner, grant } => self.granted(owner, &grant),
            control::Action::Denied { owner, .. } => {
                self.plan.take_if(|plan| plan.0 == owner);
            }
            control::Action::Note { .. } => {}
        }
    }

    fn rank_acts(&mut self, at: usize, action: rank::Action) -> Result<(), String> {
        match action {
            rank::Action::ToEngine { slot, frames } => {
                let node = &mut self.nodes[at];
                if frames[0][..] == [0] && node.engine.weights == Weights::Garbage {
                    return Err(format!("{}: rank {at}", law::ADMITTED));
                }
                node.engine.inbox.push_back((slot, frames));
            }
            rank::Action::HeldCall(call) => self.nodes[at].told.push_back(call),
            rank::Action::Released { ticket, result } => {
                let event = control::Event::Answered { rank: index(at), ticket, result };
                self.control.handle_event(self.now, event);
            }
            rank::Action::CallAnswered { token, result } => {
                let result = result.map_err(|error| error.to_string());
                if let Some((rank, operation)) = self.errands.remove(&token) {
                    let event = control::Event::CallAnswered { rank, operation, result };
                    self.control.handle_event(self.now, event);
                } else {
                    self.job_answered(at, token, result);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// An engine reads a message, and computes what it may.
    fn engine_turns(&mut self, at: usize) -> Result<(), String> {
        if !self.nodes[at].alive {
            return Ok(());
        }
        let fails = !self.calm && self.rng.random_bool(0.03);
        let next = self.next_version();
        let node = &mut self.nodes[at];
        let said = node.engine.turn(fails, next);
        for said in said {
            let (slot, outputs) = match said {
                Said::Broken(law) => return Err(format!("{law}: rank {at}")),
                Said::Answer { slot, call_id, result } => {
                    let utility_output = Some(UtilityOutput { call_id, result });
                    (slot, NewOutputs { utility_output, ..NewOutputs::default() })
                }
                Said::Finished { slot, id } => {
                    self.counts.answered += 1;
                    (slot, NewOutputs { finished_requests: Some(vec![id]), ..NewOutputs::default() })
                }
            };
            let outputs = NewOutputs { engine_index: index(at), timestamp: 1.0, ..outputs };
            let frames = vec![outputs.encode(&Layout::newest())];
            let node = &mut self.nodes[at];
            let incarnation = Incarnation(node.engine.life);
            node.machine.handle_event(self.now, rank::Event::FromEngine { incarnation, slot, frames });
        }
        let node = &mut self.nodes[at];
        self.counts.emptied += u64::from(std::mem::take(&mut node.engine.emptied));
        self.counts.own_loads += u64::from(std::mem::take(&mut node.engine.own_load));
        Ok(())
    }

    /// What the sidecar says about the version, against the bytes.
    fn check(&self) -> Result<(), String> {
        let updating = self.job.as_ref().is_some_and(|job| job.update);
        if updating || self.control.snapshot().external_weights {
            return Ok(());
        }
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.alive) {
            if node.engine.weights != Weights::Good(self.committed) {
                return Err(format!(
                    "{}: rank {at} holds {:?}, version {} is reported",
                    law::VERSION,
                    node.engine.weights,
                    self.committed
                ));
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.now = self.now + Duration::from_millis(self.rng.random_range(0..400));
        let at = self.rng.random_range(0..self.nodes.len());
        match self.rng.random_range(0..30) {
            0..=2 => self.frontend_calls(),
            3..=5 => self.request(),
            6 => self.operator(),
            7 if self.job.is_none() && self.rng.random_bool(0.3) => {
                let lost = if self.kind.is_lockstep() { 0..self.nodes.len() } else { at..at + 1 };
                for at in lost {
                    match self.nodes[at].alive {
                        true => self.die(at),
                        false => self.start(at),
                    }
                }
            }
            8 if self.job.as_ref().is_none_or(|job| !job.update) && self.rng.random_bool(0.3) => {
                self.restart()
            }
            9 if self.rng.random_bool(0.3) => {
                let frontend = FrontendId(self.rng.random_range(1..=2));
                self.control.handle_event(self.now, control::Event::FrontendGone { frontend });
                self.now = self.now + Duration::from_secs(self.rng.random_range(0..40));
            }
            10 | 11 => self.ledger = self.control.snapshot().paused_by,
            12..=18 => {
                if let Some(call) = self.nodes[at].told.pop_front() {
                    self.nodes[at].undecided.insert(call.ticket, call.clone());
                    self.control.handle_event(self.now, control::Event::Held(call));
                }
            }
            _ => self.engine_turns(at)?,
        }
        self.settle()?;
        if self.control.poll_timeout().is_some_and(|due| due <= self.now) {
            self.control.handle_timeout(self.now);
        }
        self.settle()
    }

    /// Until nothing is on the way any more.
    fn quiesce(&mut self) -> Result<(), String> {
        for _ in 0..80 {
            for at in 0..self.nodes.len() {
                while let Some(call) = self.nodes[at].told.pop_front() {
                    self.nodes[at].undecided.insert(call.ticket, call.clone());
                    self.control.handle_event(self.now, control::Event::Held(call));
                }
                self.engine_turns(at)?;
                self.settle()?;
            }
            self.now = self.now + Duration::from_millis(500);
            self.control.handle_timeout(self.now);
            self.settle()?;
        }
        Ok(())
    }

    /// Whatever was before: the sequence of a trainer brings every engine back.
    fn end(&mut self) -> Result<(), String> {
        for at in 0..self.nodes.len() {
            if !self.nodes[at].alive {
                self.start(at);
            }
        }
        self.quiesce()?;
        let updates = self.counts.updates;
        self.calm = true;
        for (update, method, args) in [
            (false, "sleep", vec![Value::from(2)]),
            (false, "wake_up", tags(&["weights"])),
            (true, "collective_rpc", vec![Value::from("dp_sidecar_load")]),
            (false, "wake_up", vec![]),
        ] {
            self.sidecar(update, method, args);
            self.quiesce()?;
        }
        let state = self.control.snapshot();
        let all = self.nodes.iter().all(|node| node.engine.serves(self.committed));
        if all && !state.external_weights && !state.asleep && self.counts.updates > updates {
            return Ok(());
        }
        let engines: Vec<_> = self.nodes.iter().map(|node| (&node.engine, node.machine.memory())).collect();
        Err(format!("{}: {state:?} {engines:?}", law::ENDS))
    }
}

fn index(at: usize) -> EngineIndex {
    EngineIndex(u16::try_from(at).unwrap())
}

fn simulate(seed: u64) -> Result<Counts, String> {
    let mut world = World::new(seed);
    let run = |world: &mut World| {
        for _ in 0..250 {
            world.step()?;
        }
        world.end()
    };
    run(&mut world).map_err(|broken| format!("seed {seed}: {broken}"))?;
    Ok(world.counts)
}

#[test]
fn nothing_is_answered_with_garbage_and_the_version_is_true_or_unknown_on_every_seed() {
    let mut all = Counts::default();
    for seed in 0..5_000 {
        let counts = simulate(seed).unwrap_or_else(|broken| panic!("{broken}"));
        all.answered += counts.answered;
        all.emptied += counts.emptied;
        all.updates += counts.updates;
        all.own_loads += counts.own_loads;
        all.restarts += counts.restarts;
        all.deaths += counts.deaths;
        all.refused += counts.refused;
    }
    // A simulation that never gets anywhere proves nothing.
    assert!(all.answered > 5_000 && all.emptied > 1_000 && all.updates >= 5_000, "{all:?}");
    assert!(all.own_loads > 100 && all.restarts > 5_000 && all.deaths > 1_000, "{all:?}");
    assert!(all.refused > 1_000, "{all:?}");
}

fn caught(mutation: Mutation, law: &str) {
    laws::caught(mutation, law, 3_000, |seed| simulate(seed).map(|_| ()));
}

#[test]
fn a_whole_wake_without_weights_is_caught() {
    caught(Mutation::WakeWithoutWeights, law::GARBAGE);
}

#[test]
fn a_resume_of_engines_that_sleep_is_caught() {
    caught(Mutation::ResumeAsleep, law::THERE);
}

#[test]
fn a_successor_that_forgets_what_memory_holds_is_caught() {
    caught(Mutation::ForgetMemory, law::VERSION);
}

#[test]
fn a_gate_that_opens_in_front_of_discarded_weights_is_caught() {
    caught(Mutation::ServeWithoutWeights, law::ADMITTED);
}
