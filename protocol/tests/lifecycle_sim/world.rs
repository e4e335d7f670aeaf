//! The leader's driver over two nodes, and what can go wrong between them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use dp_sidecar_protocol::machine::lifecycle::{Action, Event, Lifecycle, LifecycleConfig, Phase};
use dp_sidecar_protocol::machine::restart::RestartPolicy;
use dp_sidecar_protocol::{EngineIndex, GroupKind, Incarnation, Time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "nodes.rs"]
mod nodes;

use nodes::{Command, Node, Rank, Stage};

type Lives = Vec<(EngineIndex, Incarnation)>;

pub(crate) struct World {
    rng: ChaCha8Rng,
    loud: bool,
    lockstep: bool,
    machine: Lifecycle,
    now: Time,
    nodes: Vec<Node>,
    ranks: BTreeMap<EngineIndex, Rank>,
    /// Restores and adoptions that run: the update task.
    updates: VecDeque<(bool, Lives)>,
    /// Incarnations (or whole generations) that something happened to: they may be stopped.
    blamed: BTreeSet<Incarnation>,
    ended: bool,
    pub(crate) steps: u64,
    pub(crate) sidecar_restarts: u64,
    pub(crate) flaps: u64,
    pub(crate) adoptions: u64,
}

const RANKS: u16 = 4;

/// The laws, by name.
pub(crate) mod law {
    pub(crate) const ALL_SERVE: &str = "when faults end, all ranks serve";
    pub(crate) const WHOLE_GROUP: &str = "a lockstep group is called together and of one generation";
    pub(crate) const RESTORED: &str = "no engine serves without the committed weights";
    pub(crate) const NEW_NUMBER: &str = "each life has a new and higher number";
    pub(crate) const HEALTHY: &str = "a healthy engine is not stopped";
    pub(crate) const COMPLETE: &str = "no engine serves before its start is complete";
    pub(crate) const ONE_GENERATION: &str = "one generation serves";
}

fn node_of(rank: EngineIndex) -> usize {
    usize::from(rank.0 / 2)
}

fn config(lockstep: bool) -> LifecycleConfig {
    LifecycleConfig {
        ranks: (0..RANKS).map(EngineIndex).collect(),
        kind: GroupKind::of(lockstep),
        spawn: true,
        startup_timeout: Duration::from_secs(600),
        restart: RestartPolicy { budget: 100_000, ..RestartPolicy::default() },
    }
}

impl World {
    pub(crate) fn new(seed: u64, loud: bool) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let lockstep = rng.random_bool(0.5);
        Self {
            rng,
            loud,
            lockstep,
            machine: Lifecycle::new(config(lockstep), Time::ZERO),
            now: Time::ZERO,
            nodes: vec![Node::default(), Node::default()],
            ranks: (0..RANKS).map(|r| (EngineIndex(r), Rank::default())).collect(),
            updates: VecDeque::new(),
            blamed: BTreeSet::new(),
            ended: false,
            steps: 0,
            sidecar_restarts: 0,
            flaps: 0,
            adoptions: 0,
        }
    }

    pub(crate) fn run(&mut self) -> Result<(), String> {
        self.perform()?;
        self.quiet(400)?;
        for _ in 0..self.rng.random_range(5..25) {
            self.fault();
            // Sometimes everything comes up in between, sometimes nothing does.
            if self.rng.random_bool(0.3) {
                self.quiet(500)?;
            } else {
                for _ in 0..self.rng.random_range(0..12) {
                    self.step()?;
                }
            }
            if self.ended {
                return Ok(());
            }
        }
        for node in 0..self.nodes.len() {
            self.heal(node);
        }
        self.quiet(4_000)?;
        if self.ended {
            return Ok(());
        }
        for (rank, life) in self.machine.snapshot() {
            let world = &self.ranks[&rank];
            let process = world.process.as_ref().map(|p| (p.incarnation, p.stage));
            let whole = life.phase == Phase::Serving
                && process == Some((life.incarnation, Stage::Ready))
                && world.admitted
                && world.sockets == Some(life.incarnation);
            if !whole {
                return Err(format!("{}: rank {rank}: {life:?}, {world:?}", law::ALL_SERVE));
            }
        }
        Ok(())
    }

    /// Lets everything that goes on go on, until all ranks serve.
    fn quiet(&mut self, limit: u32) -> Result<(), String> {
        for _ in 0..limit {
            self.step()?;
            let idle = self.nodes.iter().all(|n| n.commands.is_empty() && n.events.is_empty());
            let serving = self.machine.snapshot().values().all(|l| l.phase == Phase::Serving);
            if self.ended || (serving && idle && self.updates.is_empty()) {
                break;
            }
        }
        Ok(())
    }

    fn say(&self, what: &str) {
        if self.loud {
            println!("{:>6} {what}", self.steps);
        }
    }

    fn event(&mut self, event: Event) -> Result<(), String> {
        self.say(&format!("event {event:?}"));
        self.machine.handle_event(self.now, event);
        self.perform()
    }

    fn perform(&mut self) -> Result<(), String> {
        while let Some(action) = self.machine.poll_action() {
            self.say(&format!("action {action:?}"));
            match action {
                // For those who wait in vain; the simulation has none.
                Action::GiveUp { .. } => {}
                Action::Prepare { rank, incarnation } => self.ask(rank, Command::Prepare(rank, incarnation)),
                Action::Spawn { rank, incarnation } => self.ask(rank, Command::Spawn(rank, incarnation)),
                Action::StopProcess { rank, .. } => self.ask(rank, Command::Stop(rank)),
                Action::Down { rank, incarnation, .. } => self.ask(rank, Command::Down(rank, incarnation)),
                Action::Admit { rank, incarnation } => self.ask(rank, Command::Admit(rank, incarnation)),
                Action::Restore { ranks } => {
                    self.check_group(&ranks)?;
                    for &(rank, incarnation) in &ranks {
                        self.ask(rank, Command::Ready(rank, incarnation));
                    }
                    self.updates.push_back((false, ranks));
                }
                Action::Adopt { ranks } => {
                    self.check_group(&ranks)?;
                    self.adoptions += 1;
                    self.updates.push_back((true, ranks));
                }
                Action::Fail { .. } | Action::Stopped => self.ended = true,
            }
        }
        Ok(())
    }

    /// A lockstep group is called together, and is of one generation.
    fn check_group(&self, ranks: &Lives) -> Result<(), String> {
        let one = ranks.iter().all(|(_, incarnation)| *incarnation == ranks[0].1);
        if self.lockstep && !(one && ranks.len() == usize::from(RANKS)) {
            return Err(format!("{}: {ranks:?}", law::WHOLE_GROUP));
        }
        Ok(())
    }

    fn ask(&mut self, rank: EngineIndex, command: Command) {
        self.nodes[node_of(rank)].commands.push_back(command);
    }

    /// One thing that goes on by itself.
    fn step(&mut self) -> Result<(), String> {
        self.steps += 1;
        match self.rng.random_range(0..10) {
            0..4 => self.command()?,
            4..7 => self.deliver()?,
            7..9 => self.progress(),
            _ => self.update()?,
        }
        if self.rng.random_bool(0.2)
            && let Some(due) = self.machine.poll_timeout()
            && due.saturating_since(self.now) < Duration::from_secs(100)
        {
            self.now = self.now.max(due);
            self.machine.handle_timeout(self.now);
            self.perform()?;
        }
        Ok(())
    }

    /// The update task ends a restore or an adoption.
    fn update(&mut self) -> Result<(), String> {
        let Some((adoption, ranks)) = self.updates.pop_front() else {
            return Ok(());
        };
        let reachable = ranks.iter().all(|(rank, _)| !self.nodes[node_of(*rank)].away);
        let alive = ranks.iter().all(|(rank, incarnation)| self.ranks[rank].sockets == Some(*incarnation));
        if reachable && alive && self.rng.random_bool(0.97) {
            for (rank, incarnation) in &ranks {
                let state = self.ranks.get_mut(rank).unwrap();
                if adoption && state.restored != Some(*incarnation) {
                    return Err(format!("{}: rank {rank} is adopted", law::RESTORED));
                }
                state.restored = Some(*incarnation);
            }
            return self.event(Event::Restored { ranks });
        }
        if reachable {
            self.blamed.extend(ranks.iter().map(|(_, incarnation)| *incarnation));
        }
        self.event(Event::RestoreFailed { ranks, reason: "not restored".to_owned() })
    }

    fn fault(&mut self) {
        let rank = EngineIndex(self.rng.random_range(0..RANKS));
        match self.rng.random_range(0..10) {
            0 => {
                self.say(&format!("engine {rank} dies"));
                self.exit(rank, "killed");
            }
            1 => self.lose_sockets(rank),
            2 => self.kill_keeper(),
            3 | 4 => self.restart_leader(),
            5 => self.cut(1),
            6 => self.kill_follower(),
            7 | 8 => self.heal(1),
            _ => {
                let life = self.machine.snapshot().remove(&rank).map(|l| l.incarnation);
                self.blamed.extend(life);
                let fence = Event::Fence { rank, reason: "told to".to_owned() };
                self.nodes[0].events.push_back(fence);
            }
        }
    }

    /// The connection of an engine breaks; its process goes on.
    fn lose_sockets(&mut self, rank: EngineIndex) {
        let state = self.ranks.get_mut(&rank).unwrap();
        let connected = state.process.as_ref().filter(|p| p.stage > Stage::Launched).map(|p| p.incarnation);
        let Some(incarnation) = state.sockets.take_if(|sockets| Some(*sockets) == connected) else {
            return;
        };
        self.say(&format!("engine {rank} loses its connection"));
        self.blamed.insert(incarnation);
        let state = self.ranks.get_mut(&rank).unwrap();
        state.facts = false;
        state.admitted = false;
        self.answer(node_of(rank), Event::Lost { rank, incarnation, reason: "closed".to_owned() });
    }

    fn kill_keeper(&mut self) {
        let number = self.rng.random_range(0..self.nodes.len());
        self.say(&format!("keeper of node {number} dies"));
        let ranks: Vec<_> = self.ranks.keys().copied().filter(|r| node_of(*r) == number).collect();
        for &rank in &ranks {
            let state = self.ranks.get_mut(&rank).unwrap();
            if let Some(process) = state.process.take() {
                self.blamed.insert(process.incarnation);
                state.sockets = None;
                state.facts = false;
                state.admitted = false;
            }
            state.ended = None;
        }
        // What was told to the old one is gone.
        self.nodes[number].commands.retain(|c| !matches!(c, Command::Stop(_)));
        self.answer(number, Event::KeeperLost { ranks });
    }

    /// Kill -9 of the leader's sidecar, and the next one.
    fn restart_leader(&mut self) {
        self.say("the leader's sidecar is killed and started again");
        self.sidecar_restarts += 1;
        // Its start waits for all nodes.
        for number in 0..self.nodes.len() {
            let commands = std::mem::take(&mut self.nodes[number].commands);
            for command in commands {
                // On its way when the end came: done or not, nobody hears of it.
                if !self.nodes[number].away && self.rng.random_bool(0.3) {
                    let done = self.execute(number, &command);
                    if let Err(broken) = done {
                        panic!("{broken}");
                    }
                } else {
                    break;
                }
            }
            let node = &mut self.nodes[number];
            node.away = false;
            node.down = false;
            node.events.clear();
        }
        self.updates.clear();
        for (_, state) in self.ranks.iter_mut().filter(|(rank, _)| node_of(**rank) == 0) {
            state.expected = None;
            state.said.clear();
        }
        // Half-started engines are to be stopped, and so is an incomplete lockstep group.
        let spared = |r: &Rank| {
            r.facts && r.sockets.is_some() && r.sockets == r.process.as_ref().map(|p| p.incarnation)
        };
        let first = self.ranks[&EngineIndex(0)].sockets;
        let whole = self.ranks.values().all(|r| spared(r) && r.sockets == first);
        let lives = self.ranks.values().filter(|r| !spared(r) || (self.lockstep && !whole));
        let lives: Vec<_> =
            lives.flat_map(|r| [r.sockets, r.process.as_ref().map(|p| p.incarnation)]).collect();
        self.blamed.extend(lives.into_iter().flatten());
        let mut found = self.found(0);
        found.extend(self.found(1));
        self.say(&format!("found {found:?}"));
        self.machine = Lifecycle::resume(config(self.lockstep), &found, self.now);
        if let Err(broken) = self.perform() {
            panic!("{broken}");
        }
    }

    fn cut(&mut self, number: usize) {
        if self.nodes[number].away {
            return;
        }
        self.say(&format!("node {number} is cut off"));
        self.flaps += 1;
        self.nodes[number].away = true;
        // Events are lost. Answers are asked for again, but for those of a start.
        for event in std::mem::take(&mut self.nodes[number].events).into_iter().rev() {
            match event {
                Event::Prepared { rank, incarnation } => {
                    self.nodes[number].commands.push_front(Command::Prepare(rank, incarnation));
                }
                Event::Spawned { rank, incarnation } | Event::StartFailed { rank, incarnation, .. } => {
                    let reason = "connection lost".to_owned();
                    self.nodes[0].events.push_back(Event::StartFailed { rank, incarnation, reason });
                }
                _ => {}
            }
        }
        let ranks = self.ranks.keys().copied().filter(|r| node_of(*r) == number).collect();
        self.machine.handle_event(self.now, Event::NodeAway { ranks });
    }

    fn kill_follower(&mut self) {
        self.cut(1);
        self.say("the follower's sidecar is killed");
        self.nodes[1].down = true;
        for (_, state) in self.ranks.iter_mut().filter(|(rank, _)| node_of(**rank) == 1) {
            state.expected = None;
            state.said.clear();
            if let Some(process) = &state.process
                && process.stage < Stage::Ready
            {
                self.blamed.insert(process.incarnation);
            }
        }
    }

    fn heal(&mut self, number: usize) {
        if !std::mem::take(&mut self.nodes[number].away) {
            return;
        }
        self.say(&format!("node {number} is back"));
        self.nodes[number].down = false;
        let found = self.found(number);
        self.nodes[number].events.push_back(Event::NodeBack { found: found.clone() });
        for (rank, found) in found {
            let state = &self.ranks[&rank];
            if found.expected.is_some() {
                self.nodes[number].events.extend(state.said.clone());
            }
        }
    }
}
