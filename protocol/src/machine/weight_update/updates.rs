//! What happens around the transaction: which engines take part, what goes first, what ends it all.
//!
//! * Engines that become ready are brought to the committed weights, and engines that live on from before a restart
//!   are looked at, while no update runs; an update begins when none of that is under way.
//! * Whether the committed weights are followed or forgotten is decided once per process, before any engine loads.
//! * Work that is lost is an event: what waited for it fails, is done again, or its engines are fenced. Nothing waits
//!   for ever.

mod asked;
mod engines;
pub(super) mod lost;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Action as Step, Config, Event as Answer, WeightUpdate};
use super::{Begun, Committed, Ledger, NodeId, Pause, RankProgress, Record, Recover, Refusal, Snapshot};
use crate::machine::control::Grant;
use crate::machine::mutation::{Mutation, mutated};
use crate::{EngineIndex, Incarnation, Time, UpdateId, WeightVersion};

pub use types::{Action, Ask, Conclusion, Engines, Event, Failure, Found, RunId, Seen, Staging, Ticket};

/// How often work is begun that must be done in the end.
const ATTEMPTS: u32 = 3;

/// An engine that holds the committed weights.
#[derive(Clone, Copy, Debug)]
struct Life {
    incarnation: Incarnation,
    /// It was seen admitted; when it is not any more, it is lost.
    admitted: bool,
}

/// A restore or an adoption.
#[derive(Clone, Debug)]
struct Job {
    ticket: Ticket,
    engines: Engines,
    adopted: bool,
    /// The commit that they are being brought to.
    commit: Option<UpdateId>,
}

impl Job {
    const fn new(ticket: Ticket, engines: Engines, adopted: bool) -> Self {
        Self { ticket, engines, adopted, commit: None }
    }
}

#[derive(Debug)]
enum Kind {
    Update(Box<Ask>),
    Recovery(Box<Recovery>),
}

/// Engines that are taken over.
#[derive(Debug)]
struct Recovery {
    recover: Recover,
    /// The update that was open.
    begun: Option<Begun>,
    job: Job,
}

#[derive(Debug)]
enum Stage {
    /// Waits for the control lock.
    Locking,
    /// Has it, and waits for restores and adoptions.
    Locked(Grant),
    Running,
    Concluding(Box<Conclusion>),
}

/// The update that is asked for or runs.
#[derive(Debug)]
struct Asked {
    run: RunId,
    id: UpdateId,
    version: WeightVersion,
    kind: Kind,
    stage: Stage,
    staging: Option<Box<Staging>>,
    /// A write of its commit record was lost: another one that fails says nothing about it.
    commit_lost: bool,
}

impl Asked {
    /// Its engines are, or may be, touched: nothing else may touch them.
    const fn has_begun(&self) -> bool {
        matches!(self.kind, Kind::Recovery(_)) || matches!(self.stage, Stage::Running | Stage::Concluding(_))
    }
}

#[derive(Debug)]
pub struct Updates {
    config: Config,
    /// All ranks of the deployment.
    nodes: BTreeMap<EngineIndex, NodeId>,
    machine: WeightUpdate,
    actions: VecDeque<Action>,
    committed: Option<Committed>,
    /// The committed weights are followed, or there are none.
    decided: bool,
    /// There were some, but they could not be followed.
    forgotten: bool,
    ledger: Ledger,
    /// What the control task said last.
    control: (Option<Pause>, bool),
    seen: BTreeMap<EngineIndex, Seen>,
    lives: BTreeMap<EngineIndex, Life>,
    /// Restores and adoptions that have not begun.
    waiting: VecDeque<Job>,
    /// Those that have: no update begins meanwhile.
    jobs: BTreeMap<Ticket, Job>,
    /// Adoptions that are accepted, but not answered yet.
    taken_over: BTreeSet<Ticket>,
    runs: u64,
    asked: Option<Asked>,
    /// Nodes that the transaction wants staged; gathered, since they depend on each other.
    to_stage: BTreeSet<NodeId>,
    open_gates: bool,
}

impl Updates {
    /// A machine for these ranks, with what the journal has.
    pub fn new(
        config: Config,
        nodes: BTreeMap<EngineIndex, NodeId>,
        committed: Option<Committed>,
        ledger: Ledger,
    ) -> Self {
        Self {
            machine: transaction(&config, committed.as_ref()),
            config,
            nodes,
            actions: VecDeque::new(),
            decided: committed.is_none(),
            forgotten: false,
            committed,
            ledger,
            control: (None, false),
            seen: BTreeMap::new(),
            lives: BTreeMap::new(),
            waiting: VecDeque::new(),
            jobs: BTreeMap::new(),
            taken_over: BTreeSet::new(),
            runs: 0,
            asked: None,
            to_stage: BTreeSet::new(),
            open_gates: false,
        }
    }

    /// Takes an event in. Never fails: what is wrong with it is ignored or comes out as an action.
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Asked(ask) => self.ask(ask),
            Event::Abort => self.machine.handle_event(now, Answer::Abort),
            Event::RestoreAsked { ticket, engines } => {
                self.waiting.push_back(Job::new(ticket, engines, false));
            }
            Event::AdoptAsked { ticket, engines } => self.adopt(Job::new(ticket, engines, true)),
            Event::RankSeen { rank, seen } => self.rank_seen(now, rank, seen),
            Event::ControlSeen { pause, external_weights } => self.control_seen(pause, external_weights),
            Event::Acquired { run, result } => self.acquired(now, run, result),
            Event::Inspected { ticket, found } => self.inspected(ticket, &found),
            Event::Forgotten { ticket, result } => self.forgotten(ticket, result),
            Event::Restored { ticket, result: Ok(()) } => self.restored(ticket),
            Event::Restored { ticket, result: Err((rank, reason)) } => {
                self.failed(ticket, Some(rank), reason)
            }
            Event::TakenOver { ticket } => {
                if self.taken_over.remove(&ticket) {
                    self.actions.push_back(Action::Answer { ticket, result: Ok(()) });
                }
            }
            Event::Staged { run, result } => self.staged(now, run, result),
            Event::CommitWritten { run, committed, result } => {
                self.commit_written(now, run, *committed, result);
            }
            Event::Reported { run, event } => self.reported(now, run, event),
            Event::Concluded { run } => self.concluded(run),
            Event::JobLost { action, error } => self.job_lost(now, *action, &error),
        }
        self.settle(now);
    }

    /// To be called when [`Self::poll_timeout`] is due. Harmless when it is not.
    pub fn handle_timeout(&mut self, now: Time) {
        self.machine.handle_timeout(now);
        self.settle(now);
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.machine.poll_timeout()
    }

    /// Plain data. An update counts as running from when it is taken until everything about it is done.
    pub fn snapshot(&self) -> Snapshot {
        let running = self.asked.as_ref().map(|asked| asked.id.clone());
        let external_weights = self.ledger.external_weights;
        let mut snapshot = Snapshot { running, external_weights, ..self.machine.snapshot() };
        // Those of a run that is under way are in its own account.
        let left = self.seen.iter().filter(|(rank, seen)| {
            !snapshot.ranks.contains_key(rank) && self.ledger.suspects(**rank, seen.incarnation)
        });
        let left: Vec<EngineIndex> = left.map(|(rank, _)| *rank).collect();
        if !mutated(Mutation::NeverInDoubt) {
            snapshot.in_doubt.extend(left);
        }
        snapshot
    }

    pub const fn committed(&self) -> Option<&Committed> {
        self.committed.as_ref()
    }

    /// Engines that can be updated.
    pub fn lives(&self) -> impl Iterator<Item = (EngineIndex, Incarnation)> {
        self.lives.iter().map(|(rank, life)| (*rank, life.incarnation))
    }

    /// The update, or the recovery, that is asked for or runs.
    pub fn run(&self) -> Option<RunId> {
        self.asked.as_ref().map(|asked| asked.run)
    }

    fn node_of(&self, rank: EngineIndex) -> NodeId {
        self.nodes.get(&rank).copied().unwrap_or_default()
    }

    fn current(&mut self, run: RunId) -> Option<&mut Asked> {
        self.asked.as_mut().filter(|asked| asked.run == run)
    }

    fn reported(&mut self, now: Time, run: RunId, event: Answer) {
        if self.current(run).is_some() {
            self.machine.handle_event(now, event);
        }
    }

    /// Until there is nothing more to be begun.
    fn settle(&mut self, now: Time) {
        self.relay();
        self.start_waiting(now);
        self.relay();
    }

    fn start_waiting(&mut self, now: Time) {
        if !self.asked.as_ref().is_some_and(Asked::has_begun) {
            // The first one decides whether the committed weights are followed.
            while mutated(Mutation::ForgetPerJob) || self.decided || self.jobs.is_empty() {
                // An adoption may become a recovery, and there is one at a time of these.
                let idle = self.asked.is_none() && !self.jobs.values().any(|job| job.adopted);
                let next = self.waiting.iter().position(|job| idle || !job.adopted);
                let Some(job) = next.and_then(|at| self.waiting.remove(at)) else {
                    break;
                };
                self.inspect(job);
            }
        }
        if self.jobs.is_empty() {
            self.begin_asked(now);
        }
    }

    fn save_ledger(&mut self, begun: Option<RunId>) {
        let ledger = Box::new(self.ledger.clone());
        self.actions.push_back(Action::SaveLedger { ledger, begun });
    }

    fn control_seen(&mut self, pause: Option<Pause>, external_weights: bool) {
        let before = std::mem::replace(&mut self.control, (pause, external_weights));
        // What was before this sidecar is not known to the control task: only changes count.
        if self.control.0 != before.0 {
            self.ledger.pause.clone_from(&self.control.0);
        }
        if self.control.1 != before.1 {
            self.ledger.external_weights = self.control.1;
        }
        if self.control != before {
            self.save_ledger(None);
        }
    }
}

fn transaction(config: &Config, committed: Option<&Committed>) -> WeightUpdate {
    let version = committed.map(|committed| committed.commit.version.clone());
    let last = committed.map(|committed| {
        let record = committed.record.clone();
        record.unwrap_or_else(|| Record::of_commit(&committed.commit))
    });
    WeightUpdate::new(config.clone(), version.unwrap_or_default(), last)
}
