//! What nodes hold, and how they do what the leader's driver tells them. What must never be done is checked here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dp_sidecar_protocol::machine::lifecycle::{Event, Found};
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use rand::Rng;

use super::law;
use super::{RANKS, World, node_of};

/// How far a process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Launched,
    Hello,
    Ready,
}

#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) incarnation: Incarnation,
    pub(super) stage: Stage,
    /// Told to stop.
    stopping: bool,
}

/// What a rank's node holds, none of it in the leader's sidecar.
#[derive(Clone, Debug, Default)]
pub(super) struct Rank {
    pub(super) process: Option<Process>,
    /// The data path.
    pub(super) sockets: Option<Incarnation>,
    pub(super) facts: bool,
    pub(super) admitted: bool,
    newest: Incarnation,
    /// The follower's (or the leader's) handshake task.
    pub(super) expected: Option<Incarnation>,
    pub(super) said: Vec<Event>,
    pub(super) ended: Option<String>,
    /// Incarnations that were ever started.
    started: BTreeSet<Incarnation>,
    /// The committed weights were brought into this incarnation.
    pub(super) restored: Option<Incarnation>,
}

/// A command of the leader's driver on its way to a node.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Prepare(EngineIndex, Incarnation),
    Spawn(EngineIndex, Incarnation),
    Stop(EngineIndex),
    Down(EngineIndex, Incarnation),
    Ready(EngineIndex, Incarnation),
    Admit(EngineIndex, Incarnation),
}

#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) away: bool,
    /// The follower's sidecar does not run.
    pub(super) down: bool,
    pub(super) commands: VecDeque<Command>,
    pub(super) events: VecDeque<Event>,
}

impl World {
    /// A node does what it was told, or a command to a node that is away runs into its deadline.
    pub(super) fn command(&mut self) -> Result<(), String> {
        let number = self.rng.random_range(0..self.nodes.len());
        let node = &mut self.nodes[number];
        if node.away {
            // Spawn fails at once, the others wait for a while.
            let Some(at) = node.commands.iter().position(|c| matches!(c, Command::Spawn(..))) else {
                if self.rng.random_bool(0.1)
                    && let Some(command) = self.nodes[number].commands.pop_front()
                {
                    return self.failed(&command);
                }
                return Ok(());
            };
            let command = node.commands.remove(at).unwrap();
            return self.failed(&command);
        }
        match node.commands.pop_front() {
            Some(command) => self.execute(number, &command),
            None => Ok(()),
        }
    }

    fn failed(&mut self, command: &Command) -> Result<(), String> {
        self.say(&format!("no answer to {command:?}"));
        let (Command::Prepare(rank, incarnation) | Command::Spawn(rank, incarnation)) = *command else {
            return Ok(());
        };
        self.event(Event::StartFailed { rank, incarnation, reason: "deadline".to_owned() })
    }

    pub(super) fn execute(&mut self, number: usize, command: &Command) -> Result<(), String> {
        self.say(&format!("node {number} does {command:?}"));
        match *command {
            Command::Prepare(rank, incarnation) => {
                let state = self.ranks.get_mut(&rank).unwrap();
                // Asked again, it is as it was.
                if state.expected != Some(incarnation) || state.sockets != Some(incarnation) {
                    state.newest = state.newest.max(incarnation);
                    state.sockets = Some(incarnation);
                    state.facts = false;
                    state.admitted = false;
                    state.expected = Some(incarnation);
                    state.said.clear();
                }
                self.answer(number, Event::Prepared { rank, incarnation });
            }
            Command::Spawn(rank, incarnation) => {
                let state = self.ranks.get_mut(&rank).unwrap();
                if state.process.is_some() {
                    let reason = "not gone yet".to_owned();
                    self.answer(number, Event::StartFailed { rank, incarnation, reason });
                    return Ok(());
                }
                if !state.started.insert(incarnation) {
                    return Err(format!("{}: {incarnation} of rank {rank} twice", law::NEW_NUMBER));
                }
                if state.started.last() != Some(&incarnation) {
                    return Err(format!(
                        "{}: rank {rank}: {incarnation} after {:?}",
                        law::NEW_NUMBER,
                        state.started
                    ));
                }
                state.process = Some(Process { incarnation, stage: Stage::Launched, stopping: false });
                state.ended = None;
                self.answer(number, Event::Spawned { rank, incarnation });
            }
            Command::Stop(rank) => {
                let blamed = &self.blamed;
                let state = self.ranks.get_mut(&rank).unwrap();
                let admitted = state.admitted;
                if let Some(process) = &mut state.process {
                    if admitted && !process.stopping && !blamed.contains(&process.incarnation) {
                        return Err(format!("{}: rank {rank}: {state:?}", law::HEALTHY));
                    }
                    process.stopping = true;
                }
            }
            Command::Down(rank, incarnation) => {
                let state = self.ranks.get_mut(&rank).unwrap();
                if state.sockets == Some(incarnation) {
                    if state.admitted && !self.blamed.contains(&incarnation) {
                        return Err(format!("{}, nor taken down: rank {rank}: {state:?}", law::HEALTHY));
                    }
                    state.sockets = None;
                    state.facts = false;
                    state.admitted = false;
                }
            }
            Command::Ready(rank, incarnation) => {
                let state = self.ranks.get_mut(&rank).unwrap();
                state.facts |= state.sockets == Some(incarnation);
            }
            Command::Admit(rank, incarnation) => {
                let state = self.ranks.get_mut(&rank).unwrap();
                if state.sockets != Some(incarnation) {
                    return Ok(());
                }
                let alive = state.process.as_ref().filter(|p| p.incarnation == incarnation);
                if alive.is_some_and(|process| process.stage < Stage::Ready) {
                    return Err(format!("{}: rank {rank}: {state:?}", law::COMPLETE));
                }
                if alive.is_some() && state.restored != Some(incarnation) {
                    return Err(format!("{}: rank {rank}: {state:?}", law::RESTORED));
                }
                state.admitted = true;
                self.check_generation()?;
            }
        }
        Ok(())
    }

    /// Admitted lockstep engines that live are of one generation.
    fn check_generation(&self) -> Result<(), String> {
        let admitted = self.ranks.values().filter(|r| r.admitted);
        let lives: BTreeSet<_> = admitted.filter_map(|r| r.process.as_ref().map(|p| p.incarnation)).collect();
        if self.lockstep && lives.iter().filter(|life| !self.blamed.contains(life)).count() > 1 {
            return Err(format!("{}: {lives:?}", law::ONE_GENERATION));
        }
        Ok(())
    }

    /// Something to tell the leader; lost if its link is.
    pub(super) fn answer(&mut self, number: usize, event: Event) {
        if !self.nodes[number].away {
            self.nodes[number].events.push_back(event);
        }
    }

    pub(super) fn deliver(&mut self) -> Result<(), String> {
        let number = self.rng.random_range(0..self.nodes.len());
        match self.nodes[number].events.pop_front() {
            Some(event) => self.event(event),
            None => Ok(()),
        }
    }

    /// An engine comes a step further, or ends.
    pub(super) fn progress(&mut self) {
        let rank = EngineIndex(self.rng.random_range(0..RANKS));
        let number = node_of(rank);
        let down = self.nodes[number].down;
        let state = self.ranks.get_mut(&rank).unwrap();
        let Some(process) = &mut state.process else {
            return;
        };
        let incarnation = process.incarnation;
        if process.stopping {
            self.exit(rank, "stopped");
            return;
        }
        // Its handshake is with the sidecar of its node.
        if state.expected != Some(incarnation) || state.sockets != Some(incarnation) || down {
            return;
        }
        let said = match process.stage {
            Stage::Launched => {
                process.stage = Stage::Hello;
                vec![Event::Connected { rank, incarnation }]
            }
            Stage::Hello => {
                process.stage = Stage::Ready;
                vec![Event::Registered { rank, incarnation }, Event::HandshakeReady { rank, incarnation }]
            }
            Stage::Ready => return,
        };
        state.said.extend(said.clone());
        for event in said {
            self.answer(number, event);
        }
    }

    pub(super) fn exit(&mut self, rank: EngineIndex, reason: &str) {
        let state = self.ranks.get_mut(&rank).unwrap();
        let Some(process) = state.process.take() else {
            return;
        };
        let incarnation = process.incarnation;
        self.blamed.insert(incarnation);
        state.ended = Some(reason.to_owned());
        if state.sockets == Some(incarnation) {
            state.sockets = None;
            state.facts = false;
            state.admitted = false;
            self.answer(node_of(rank), Event::Lost { rank, incarnation, reason: reason.to_owned() });
        }
        self.answer(node_of(rank), Event::Exited { rank, incarnation, reason: reason.to_owned() });
    }

    /// What a sidecar finds on a node when it begins, or when the link is back.
    pub(super) fn found(&self, number: usize) -> BTreeMap<EngineIndex, Found> {
        let ranks = self.ranks.iter().filter(|(rank, _)| node_of(**rank) == number);
        ranks
            .map(|(&rank, state)| {
                let stopping = state.process.as_ref().is_some_and(|p| p.stopping);
                let found = Found {
                    newest: state.newest,
                    sockets: state.sockets,
                    ready: state.facts && !stopping,
                    admitted: state.admitted,
                    process: state.process.as_ref().map(|p| p.incarnation),
                    expected: state.expected,
                    ended: state.ended.clone(),
                };
                (rank, found)
            })
            .collect()
    }
}
