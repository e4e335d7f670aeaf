//! One controller at a time.
//!
//! A frontend's control call (pause, resume, sleep, weight methods) is fanned out by the frontend to all
//! ranks as separate messages. Held at each rank, the calls are gathered here into *rounds*: a round
//! runs when every rank has its call, and only one round runs at a time, so that with several frontends
//! all ranks see the calls in the same order. A lockstep group that is paused or resumed in part hangs
//! (`docs/weight-update.md`).
//!
//! The sidecar's own work (update, operator) takes the same lock. While it holds it, calls of frontends are
//! refused with a message that names the holder.
//!
//! Who has paused the engines is remembered: a resume of engines that are not paused is answered without
//! asking them; an update does not resume what it has not paused; a frontend that paused and died is
//! resumed for after a grace; an engine that starts again into a pause is paused.
//!
//! What the engines' memory holds is followed as well ([`Memory`]): engines of which a part sleeps are not resumed, and
//! none is woken up completely whose weights were discarded, before others are loaded.

mod asleep;
mod lives;
mod rounds;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rmpv::Value;

use crate::machine::held_call::{HeldCall, Verdict};
use crate::machine::memory::{Memory, Weights};
use crate::machine::mutation::{Mutation, mutated};
use crate::machine::policy::{Effect, Policy};
use crate::{EngineIndex, FrontendId, GroupKind, PausedBy, Time};

use asleep::NO_WEIGHTS;
pub use types::{Action, Event, Grant, OwnerId, Severity, Snapshot};

/// Rounds kept waiting; more are refused.
const MAX_ROUNDS: usize = 256;

/// How long to wait for the calls of the other ranks.
const GATHER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a round may keep the lock. A pause in mode `wait` lasts as long as the longest response.
pub const ROUND_TIMEOUT: Duration = Duration::from_secs(1800);
/// How long a pause outlives the frontend that asked for it.
const PAUSE_GRACE: Duration = Duration::from_secs(30);

/// The same call, at all ranks.
#[derive(Debug)]
struct Round {
    frontend: FrontendId,
    api_server: u32,
    method: String,
    args: Vec<Value>,
    tickets: BTreeMap<EngineIndex, u64>,
    deadline: Time,
}

impl Round {
    fn fits(&self, held: &HeldCall) -> bool {
        self.frontend == held.frontend
            && self.api_server == held.api_server
            && self.method == held.method
            && self.args == held.args
            && !self.tickets.contains_key(&held.rank)
    }

    fn effect(&self) -> Effect {
        match Policy::of(&self.method, &self.args) {
            Policy::Control(effect) => effect,
            Policy::Forward => Effect::Other,
            Policy::Refuse(_) => Effect::Weights { loads: false },
        }
    }

    fn name(&self) -> String {
        format!("{} of frontend {}", self.method, self.frontend)
    }
}

/// What the machine does on its own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    /// Lifts the pause of a frontend that is gone.
    LiftPause,
    /// Pauses engines that started again into a pause.
    PauseAgain,
}

#[derive(Debug)]
enum Holder {
    Round {
        round: Round,
        waiting: BTreeSet<EngineIndex>,
        results: BTreeMap<EngineIndex, Result<Value, String>>,
        /// The frontend went away meanwhile: when its pause is lifted.
        lease_ends: Option<Time>,
        deadline: Time,
    },
    Owner {
        owner: OwnerId,
        name: String,
        doing: String,
    },
    Errand {
        errand: Errand,
        operation: u64,
        effect: Effect,
        waiting: BTreeSet<EngineIndex>,
        failures: Vec<String>,
        deadline: Time,
    },
}

impl Holder {
    fn describe(&self) -> String {
        match self {
            Self::Round { round, .. } => round.name(),
            Self::Owner { name, doing, .. } if doing.is_empty() => name.clone(),
            Self::Owner { name, doing, .. } => format!("{name} ({doing})"),
            Self::Errand { errand, .. } => match errand {
                Errand::LiftPause => "lifting the pause of a frontend that is gone".to_owned(),
                Errand::PauseAgain => "pausing engines that started again".to_owned(),
            },
        }
    }

    const fn deadline(&self) -> Option<Time> {
        match self {
            Self::Round { deadline, .. } | Self::Errand { deadline, .. } => Some(*deadline),
            Self::Owner { .. } => None,
        }
    }
}

#[derive(Debug)]
struct Waiter {
    owner: OwnerId,
    name: String,
    deadline: Time,
}

#[derive(Debug)]
pub struct Control {
    /// All ranks of the deployment.
    ranks: BTreeSet<EngineIndex>,
    kind: GroupKind,
    actions: VecDeque<Action>,
    up: BTreeSet<EngineIndex>,
    gathering: VecDeque<Round>,
    ready: VecDeque<Round>,
    waiters: VecDeque<Waiter>,
    holder: Option<Holder>,
    paused_by: Option<PausedBy>,
    /// Of the engines that are up.
    memory: BTreeMap<EngineIndex, Memory>,
    external_weights: bool,
    /// When the pause of a frontend that is gone is lifted.
    lease_ends: Option<Time>,
    /// Engines that started again into a pause.
    pause_again: BTreeSet<EngineIndex>,
    next_operation: u64,
    refused: u64,
}

impl Control {
    /// A machine in front of engines that are all down yet.
    pub fn new(ranks: impl IntoIterator<Item = EngineIndex>, kind: GroupKind) -> Self {
        Self {
            ranks: ranks.into_iter().collect(),
            kind,
            actions: VecDeque::new(),
            up: BTreeSet::new(),
            gathering: VecDeque::new(),
            ready: VecDeque::new(),
            waiters: VecDeque::new(),
            holder: None,
            paused_by: None,
            memory: BTreeMap::new(),
            external_weights: false,
            lease_ends: None,
            pause_again: BTreeSet::new(),
            next_operation: 0,
            refused: 0,
        }
    }

    /// Takes an event in. Never fails.
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Held(held) => self.held(now, held),
            Event::Answered { rank, ticket, result } => self.answered(rank, ticket, result),
            Event::CallAnswered { rank, operation, result } => self.call_answered(rank, operation, result),
            Event::EngineUp { rank, memory } => self.engine_up(rank, memory),
            Event::EngineDown { rank, reason } => self.engine_down(rank, &reason),
            Event::FrontendGone { frontend } => self.frontend_gone(now, frontend),
            Event::Acquire { owner, name, patience } => {
                self.waiters.push_back(Waiter { owner, name, deadline: now + patience })
            }
            Event::Doing { owner, what } => {
                if let Some(Holder::Owner { owner: held_by, doing, .. }) = &mut self.holder
                    && *held_by == owner
                {
                    *doing = what;
                }
            }
            Event::PausedSet { owner, paused_by } => {
                if self.is_held_by(owner) {
                    self.set_paused(paused_by);
                }
            }
            Event::Calling { owner, ranks, effect } => {
                if self.is_held_by(owner) {
                    self.sent(&ranks, effect);
                }
            }
            Event::Called { owner, rank, effect, result } => {
                if self.is_held_by(owner) {
                    self.remember(rank, effect, &result);
                }
            }
            Event::WeightsKnown { owner } => {
                if self.is_held_by(owner) {
                    self.external_weights = false;
                    for memory in self.memory.values_mut() {
                        memory.weights = Weights::Known;
                    }
                }
            }
            Event::Release { owner } => {
                self.waiters.retain(|waiter| waiter.owner != owner);
                if self.is_held_by(owner) {
                    self.holder = None;
                }
            }
        }
        self.proceed(now);
    }

    /// To be called when [`Self::poll_timeout`] is due. Harmless when it is not.
    pub fn handle_timeout(&mut self, now: Time) {
        let (late, gathering) =
            std::mem::take(&mut self.gathering).into_iter().partition(|round| round.deadline <= now);
        self.gathering = gathering;
        for round in late {
            if mutated(Mutation::DropLateRounds) {
                continue;
            }
            let has = list(round.tickets.keys());
            let missing = list(self.ranks.iter().filter(|rank| !round.tickets.contains_key(rank)));
            let text = format!(
                "{} came in for rank {has} only, not for rank {missing} within {:?}",
                round.name(),
                GATHER_TIMEOUT
            );
            self.refuse(round, &text);
        }
        self.holder_timeout(now);
        // Whoever can have the lock now gets it, even in the last moment.
        self.proceed(now);
        let holder = self.holder.as_ref().map(Holder::describe);
        let (late, waiters) =
            std::mem::take(&mut self.waiters).into_iter().partition(|waiter| waiter.deadline <= now);
        self.waiters = waiters;
        for waiter in Vec::from(late) {
            self.actions.push_back(Action::Denied {
                owner: waiter.owner,
                holder: holder.clone().unwrap_or_default(),
            });
        }
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let lease = self.lease_ends.filter(|_| self.holder.is_none());
        let gathering = self.gathering.iter().map(|round| round.deadline);
        let waiters = self.waiters.iter().map(|waiter| waiter.deadline);
        let holder = self.holder.as_ref().and_then(Holder::deadline);
        gathering.chain(waiters).chain(holder).chain(lease).min()
    }

    /// Plain data.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            holder: self.holder.as_ref().map(Holder::describe),
            paused_by: self.paused_by.clone(),
            asleep: self.sleeps(),
            without_weights: self.is_empty(),
            external_weights: self.external_weights,
            waiting_rounds: self.gathering.len() + self.ready.len(),
            refused: self.refused,
        }
    }

    // --- gathering ---

    fn held(&mut self, now: Time, held: HeldCall) {
        let mut single = Round {
            frontend: held.frontend,
            api_server: held.api_server,
            method: held.method.clone(),
            args: held.args.clone(),
            tickets: BTreeMap::from([(held.rank, held.ticket)]),
            deadline: now + GATHER_TIMEOUT,
        };
        if let Some(Holder::Owner { .. }) = &self.holder {
            let text = self.busy_text();
            self.refuse(single, &text);
            return;
        }
        if !self.ranks.contains(&held.rank) {
            let text = format!("rank {} is not one of this deployment", held.rank);
            self.refuse(single, &text);
            return;
        }
        let mut gathering = self.gathering.iter();
        let fitting = if mutated(Mutation::GatherNewestFirst) {
            gathering.rposition(|round| round.fits(&held))
        } else {
            gathering.position(|round| round.fits(&held))
        };
        if let Some(at) = fitting {
            let round = &mut self.gathering[at];
            round.tickets.insert(held.rank, held.ticket);
            if round.tickets.len() < self.ranks.len() {
                return;
            }
            let Some(complete) = self.gathering.remove(at) else {
                return;
            };
            single = complete;
        } else if self.gathering.len() + self.ready.len() >= MAX_ROUNDS {
            self.refuse(single, "too many control calls are waiting");
            return;
        }
        if single.tickets.len() == self.ranks.len() {
            self.ready.push_back(single);
        } else {
            self.gathering.push_back(single);
        }
    }

    fn refuse(&mut self, round: Round, text: &str) {
        for (rank, ticket) in round.tickets {
            self.refused += 1;
            self.actions.push_back(Action::Decide {
                rank,
                ticket,
                verdict: Verdict::Refuse(format!("refused by the sidecar: {text}")),
            });
        }
    }

    fn answer(&mut self, round: Round, value: &Value) {
        for (rank, ticket) in round.tickets {
            self.actions.push_back(Action::Decide { rank, ticket, verdict: Verdict::Answer(value.clone()) });
        }
    }

    fn busy_text(&self) -> String {
        let holder = self.holder.as_ref().map(Holder::describe);
        format!("{} is running", holder.unwrap_or_default())
    }

    // --- the lock ---

    fn is_held_by(&self, owner: OwnerId) -> bool {
        matches!(&self.holder, Some(Holder::Owner { owner: held_by, .. }) if *held_by == owner)
    }

    /// Gives the free lock to whoever is next: the sidecar's own work, errands, rounds.
    fn proceed(&mut self, now: Time) {
        while self.holder.is_none() {
            if let Some(waiter) = self.waiters.pop_front() {
                self.grant(waiter);
            } else if self.lease_ends.is_some_and(|ends| ends <= now) {
                self.lift_pause(now);
            } else if self.may_pause_again() {
                self.pause_restarted(now);
            } else if let Some(round) = self.ready.pop_front() {
                self.run(now, round);
            } else {
                return;
            }
        }
    }

    fn grant(&mut self, waiter: Waiter) {
        self.holder = Some(Holder::Owner { owner: waiter.owner, name: waiter.name, doing: String::new() });
        let text = self.busy_text();
        let gathering = std::mem::take(&mut self.gathering);
        let ready = std::mem::take(&mut self.ready);
        for round in gathering.into_iter().chain(ready) {
            self.refuse(round, &text);
        }
        let grant = Grant {
            paused_by: self.paused_by.clone(),
            external_weights: self.external_weights,
            memory: self.memory.clone(),
        };
        self.actions.push_back(Action::Granted { owner: waiter.owner, grant });
    }

    fn holder_timeout(&mut self, now: Time) {
        let due = self.holder.as_ref().and_then(Holder::deadline);
        if due.is_none_or(|due| now < due) {
            return;
        }
        match &mut self.holder {
            Some(Holder::Round { round, waiting, results, .. }) => {
                let text = format!(
                    "{} was not answered by rank {} within {:?}",
                    round.name(),
                    list(waiting.iter()),
                    ROUND_TIMEOUT
                );
                for rank in std::mem::take(waiting) {
                    results.insert(rank, Err("not answered in time".to_owned()));
                }
                self.note(Severity::Warning, text);
                self.finish_round_if_done();
            }
            Some(Holder::Errand { waiting, failures, .. }) => {
                for rank in std::mem::take(waiting) {
                    failures.push(format!("rank {rank} did not answer in time"));
                }
                self.finish_errand_if_done();
            }
            _ => {}
        }
    }

    fn note(&mut self, severity: Severity, text: String) {
        self.actions.push_back(Action::Note { severity, text });
    }
}

fn list<'a>(ranks: impl IntoIterator<Item = &'a EngineIndex>) -> String {
    let ranks: Vec<String> = ranks.into_iter().map(ToString::to_string).collect();
    ranks.join(", ")
}
