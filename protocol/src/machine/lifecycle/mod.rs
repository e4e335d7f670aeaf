//! Which rank is in which life: prepare, start, handshake, restore the committed weights, serve, and
//! what follows when an engine is lost.
//!
//! Independent ranks (dense models) live alone. Lockstep ranks (MoE) live and die together: when one
//! is lost all are stopped, and they start again as one generation, with the same incarnation number
//! and new ports, because the collective groups of the old one cannot be joined again.
//!
//! | state | leaves it on |
//! |---|---|
//! | `Waiting(until)` | the back-off is over -> `Preparing` |
//! | `Preparing` | sockets bound, INIT known -> `Starting` (spawned, or awaited) |
//! | `Starting` | READY and the registration frame -> `Ready` |
//! | `Ready` | alone, or when the whole group is ready -> `Restoring` |
//! | `Restoring` | committed weights loaded and verified -> `Serving` |
//! | `Adopting` | the same, of an engine that served before this sidecar was there |
//! | `Serving` | lost, fenced -> `Stopping` |
//! | `Stopping` | the process is gone -> `Waiting`, or `GivenUp` when the budget is spent |

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::machine::mutation::{Mutation, mutated};
use crate::machine::restart::Restart;
use crate::{EngineIndex, Incarnation, Time};

mod adoption;
mod ending;
mod types;

pub use types::{Action, Event, Found, LifecycleConfig, Phase, RankLife};

#[derive(Debug)]
struct RankState {
    phase: Phase,
    incarnation: Incarnation,
    /// Process exists or may exist (spawn mode).
    process: bool,
    /// Its start was confirmed.
    spawned: bool,
    registered: bool,
    handshaken: bool,
    since: Time,
    until: Option<Time>,
    restart: Restart,
    restarts: u64,
    /// Was admitted in some life.
    served: bool,
    /// What happened to this incarnation may have been missed: its node was away.
    unsure: bool,
    /// It ends for a reason of ours: the next life begins at once, and nothing is charged.
    discarded: bool,
    last_error: Option<String>,
}

impl RankState {
    /// A failure now means that the deployment does not come up, rather than that an engine died.
    fn first_life(&self) -> bool {
        !self.served && self.restarts == 0
    }
}

/// The machine, see the module text.
#[derive(Debug)]
pub struct Lifecycle {
    config: LifecycleConfig,
    ranks: BTreeMap<EngineIndex, RankState>,
    actions: VecDeque<Action>,
    /// Incarnation number of the newest start; never reused.
    newest: u64,
    /// Ranks of nodes that cannot be reached.
    away: BTreeSet<EngineIndex>,
    /// All ranks have served at least once.
    started: bool,
    stopping: bool,
    failed: bool,
    stopped_reported: bool,
}

impl Lifecycle {
    /// A machine that begins to prepare all ranks at `now`.
    pub fn new(config: LifecycleConfig, now: Time) -> Self {
        let mut machine = Self::idle(config, now);
        machine.handle_timeout(now);
        machine
    }

    fn idle(config: LifecycleConfig, now: Time) -> Self {
        let ranks = config
            .ranks
            .iter()
            .map(|&rank| {
                let state = RankState {
                    phase: Phase::Waiting,
                    incarnation: Incarnation(0),
                    process: false,
                    spawned: false,
                    registered: false,
                    handshaken: false,
                    since: now,
                    until: Some(now),
                    restart: Restart::new(config.restart),
                    restarts: 0,
                    served: false,
                    unsure: false,
                    discarded: false,
                    last_error: None,
                };
                (rank, state)
            })
            .collect();
        Self {
            config,
            ranks,
            actions: VecDeque::new(),
            newest: 0,
            away: BTreeSet::new(),
            started: false,
            stopping: false,
            failed: false,
            stopped_reported: false,
        }
    }

    /// Starts what is due and fails what took too long.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.stopping || self.failed {
            return;
        }
        let due: Vec<EngineIndex> = self
            .ranks
            .iter()
            .filter(|(rank, s)| s.until.is_some_and(|until| until <= now) && !self.away.contains(rank))
            .map(|(&rank, _)| rank)
            .collect();
        let mut begin = Vec::new();
        for rank in due {
            let Some(state) = self.ranks.get_mut(&rank) else {
                continue;
            };
            match state.phase {
                Phase::Waiting => begin.push(rank),
                Phase::Starting | Phase::Connected => {
                    let stage = match (state.phase, state.registered) {
                        (Phase::Starting, _) => "no HELLO",
                        (_, false) => "HELLO, but no registration frame (model still loading?)",
                        (_, true) => "registered, but no READY",
                    };
                    let limit = self.config.startup_timeout;
                    let reason = format!("engine {rank} did not become ready within {limit:?}: {stage}");
                    state.until = None;
                    self.lose(now, rank, &reason, true);
                }
                _ => state.until = None,
            }
        }
        if self.config.kind.is_lockstep() {
            // One generation: the group starts only when every rank is free to.
            let all_waiting = self.away.is_empty()
                && self
                    .ranks
                    .values()
                    .all(|s| s.phase == Phase::Waiting && s.until.is_none_or(|until| until <= now));
            if self.config.spawn && !all_waiting {
                return;
            }
        }
        if begin.is_empty() {
            return;
        }
        if self.config.kind.is_lockstep() {
            let generation = if self.config.spawn { self.next() } else { self.join_generation() };
            for rank in begin {
                self.prepare(now, rank, generation);
            }
        } else {
            for rank in begin {
                let incarnation = self.next();
                self.prepare(now, rank, incarnation);
            }
        }
    }

    fn next(&mut self) -> Incarnation {
        self.newest += 1;
        Incarnation(self.newest)
    }

    /// Engines that somebody else starts leave and come one by one: a rank that comes back joins the
    /// generation that was opened when the first of the old group was lost.
    fn join_generation(&mut self) -> Incarnation {
        let open = self.newest > 0
            && self.ranks.values().any(|s| {
                s.incarnation.0 == self.newest
                    && matches!(s.phase, Phase::Preparing | Phase::Starting | Phase::Connected)
            });
        let old_alive = self.ranks.values().any(|s| {
            s.incarnation.0 == self.newest
                && matches!(
                    s.phase,
                    Phase::Stopping | Phase::Serving | Phase::Adopting | Phase::Restoring | Phase::Ready
                )
        });
        if open && !old_alive { Incarnation(self.newest) } else { self.next() }
    }

    fn prepare(&mut self, now: Time, rank: EngineIndex, incarnation: Incarnation) {
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        if state.incarnation.0 > 0 && !state.discarded {
            state.restarts += 1;
        }
        state.discarded = false;
        state.unsure = false;
        state.spawned = false;
        state.phase = Phase::Preparing;
        state.restart.started();
        state.incarnation = incarnation;
        state.registered = false;
        state.handshaken = false;
        state.process = false;
        state.since = now;
        state.until = None;
        self.actions.push_back(Action::Prepare { rank, incarnation });
    }

    /// Takes in what happened. Reports about an older incarnation change nothing.
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Stop => self.stop(),
            Event::NodeAway { ranks } => self.node_away(&ranks),
            Event::NodeBack { found } => self.node_back(now, &found),
            Event::KeeperLost { ranks } => self.keeper_lost(now, &ranks),
            Event::Prepared { rank, incarnation } => {
                let spawn_until = self.config.spawn.then_some(now + self.config.startup_timeout);
                if let Some(state) = self.current(rank, incarnation, &[Phase::Preparing]) {
                    state.phase = Phase::Starting;
                    state.since = now;
                    if spawn_until.is_some() {
                        state.process = true;
                        state.until = spawn_until;
                        self.actions.push_back(Action::Spawn { rank, incarnation });
                    }
                }
            }
            Event::StartFailed { rank, incarnation, reason } => {
                if let Some(state) = self.current(rank, incarnation, &[Phase::Preparing, Phase::Starting])
                    // Its node has told otherwise: only the answer was lost.
                    && !state.spawned
                {
                    state.process = false;
                    let text = format!("engine {rank} could not be started: {reason}");
                    if self.away.contains(&rank) {
                        self.set_aside(now, rank, &text);
                    } else {
                        self.lose(now, rank, &text, false);
                    }
                } else if let Some(state) = self.current(rank, incarnation, &[Phase::Stopping])
                    && !state.spawned
                {
                    // It was lost before it was there: nothing to wait for.
                    self.exited(now, rank, incarnation, &reason);
                }
            }
            Event::Spawned { rank, incarnation } => self.spawned(rank, incarnation),
            Event::Connected { rank, incarnation } => {
                self.prepared_early(now, rank, incarnation);
                if let Some(state) = self.current(rank, incarnation, &[Phase::Starting]) {
                    state.phase = Phase::Connected;
                }
            }
            Event::Registered { rank, incarnation } => {
                self.heard(now, rank, incarnation, |state| state.registered = true);
            }
            Event::HandshakeReady { rank, incarnation } => {
                self.heard(now, rank, incarnation, |state| state.handshaken = true);
            }
            Event::Restored { ranks } => {
                for (rank, incarnation) in ranks {
                    let phases = [Phase::Restoring, Phase::Adopting];
                    if let Some(state) = self.current(rank, incarnation, &phases) {
                        state.phase = Phase::Serving;
                        state.served = true;
                        state.since = now;
                        state.restart.ready(now);
                        self.actions.push_back(Action::Admit { rank, incarnation });
                    }
                }
                self.started |= self.ranks.values().all(|s| s.phase == Phase::Serving);
            }
            Event::RestoreFailed { ranks, reason } => {
                // Over a link that is lost nothing can be said about them: asked again when it is back.
                let unknown = ranks.iter().any(|(rank, _)| self.away.contains(rank))
                    && !mutated(Mutation::BlameLostLink);
                for (rank, incarnation) in ranks {
                    let text =
                        format!("engine {rank}: the committed weights could not be restored: {reason}");
                    if self.current(rank, incarnation, &[Phase::Restoring]).is_some() {
                        if unknown {
                            self.set_aside(now, rank, &text);
                        } else {
                            self.lose(now, rank, &text, false);
                        }
                    } else if !unknown && self.current(rank, incarnation, &[Phase::Adopting]).is_some() {
                        self.lose(now, rank, &text, false);
                    }
                }
            }
            Event::Lost { rank, incarnation, reason } => {
                let current = self.ranks.get(&rank).filter(|s| s.incarnation == incarnation);
                if current.is_some_and(|s| s.phase.is_open()) {
                    self.lose(now, rank, &format!("engine {rank} was lost: {reason}"), false);
                } else if !self.config.spawn && self.current(rank, incarnation, &[Phase::Stopping]).is_some()
                {
                    self.gone(now, rank);
                }
            }
            Event::Exited { rank, incarnation, reason } => self.exited(now, rank, incarnation, &reason),
            Event::Fence { rank, reason } => {
                if self.ranks.get(&rank).is_some_and(|s| s.phase.is_alive()) {
                    self.lose(now, rank, &format!("engine {rank} is fenced: {reason}"), false);
                }
            }
        }
    }

    /// A process is there. Whoever asked for it may have been told meanwhile that its node's keeper was lost, or that
    /// the start took too long.
    fn spawned(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        match state.phase {
            Phase::Waiting => self.stop_stray(rank, incarnation),
            phase if phase.is_open() && state.incarnation == incarnation => state.spawned = true,
            _ => self.actions.push_back(Action::StopProcess { rank, incarnation }),
        }
    }

    fn current(
        &mut self,
        rank: EngineIndex,
        incarnation: Incarnation,
        phases: &[Phase],
    ) -> Option<&mut RankState> {
        self.ranks.get_mut(&rank).filter(|s| s.incarnation == incarnation && phases.contains(&s.phase))
    }

    /// An engine that was waiting to say HELLO may go through its whole handshake before the news
    /// that its rank is prepared gets here: that it speaks shows that it is.
    fn prepared_early(&mut self, now: Time, rank: EngineIndex, incarnation: Incarnation) {
        if self.config.spawn {
            return;
        }
        if let Some(state) = self.current(rank, incarnation, &[Phase::Preparing]) {
            state.phase = Phase::Starting;
            state.since = now;
        }
    }

    /// The registration frame or READY came: its handshake is complete when both have.
    fn heard(
        &mut self,
        now: Time,
        rank: EngineIndex,
        incarnation: Incarnation,
        note: impl FnOnce(&mut RankState),
    ) {
        self.prepared_early(now, rank, incarnation);
        let lockstep = self.config.kind.is_lockstep();
        let Some(state) = self.current(rank, incarnation, &[Phase::Starting, Phase::Connected]) else {
            return;
        };
        note(state);
        if !(state.registered && state.handshaken) {
            return;
        }
        state.phase = Phase::Ready;
        state.until = None;
        state.since = now;
        if lockstep {
            let generation = state.incarnation;
            let all = self.ranks.values().all(|s| s.phase == Phase::Ready && s.incarnation == generation);
            if all {
                let ranks: Vec<_> = self.ranks.iter().map(|(&r, s)| (r, s.incarnation)).collect();
                for state in self.ranks.values_mut() {
                    state.phase = Phase::Restoring;
                }
                self.actions.push_back(Action::Restore { ranks });
            }
        } else {
            state.phase = Phase::Restoring;
            let ranks = vec![(rank, state.incarnation)];
            self.actions.push_back(Action::Restore { ranks });
        }
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.stopping || self.failed {
            return None;
        }
        let reachable = || self.ranks.iter().filter(|(rank, _)| !self.away.contains(rank)).map(|(_, s)| s);
        let limits = reachable().filter(|s| s.phase != Phase::Waiting);
        let limit = limits.filter_map(|s| s.until).min();
        let waiting = reachable().filter(|s| s.phase == Phase::Waiting);
        let begin = if self.config.kind.is_lockstep() && self.config.spawn {
            // The group begins together, when the last of it may.
            let all = self.away.is_empty() && self.ranks.values().all(|s| s.phase == Phase::Waiting);
            waiting.filter_map(|s| s.until).max().filter(|_| all)
        } else {
            waiting.filter_map(|s| s.until).min()
        };
        limit.into_iter().chain(begin).min()
    }

    /// All ranks serve, or have served once.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Plain data for status.
    pub fn snapshot(&self) -> BTreeMap<EngineIndex, RankLife> {
        self.ranks
            .iter()
            .map(|(&rank, s)| {
                let life = RankLife {
                    phase: s.phase,
                    incarnation: s.incarnation,
                    restarts: s.restarts,
                    last_error: s.last_error.clone(),
                };
                (rank, life)
            })
            .collect()
    }
}
