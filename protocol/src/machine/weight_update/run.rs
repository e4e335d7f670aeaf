//! One update, from its beginning to its record.

mod commit;
mod faults;
mod load;
mod pause;
mod recover;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::machine::mutation::{Mutation, mutated};
use crate::{EngineIndex, Incarnation, Time, UpdateId, WeightVersion};

use super::Config;
use super::record::{Outcome, RankRecord, Record, Snapshot};
use super::types::{Action, Begin, Event};
use super::vocabulary::{Call, Checkpoint, NodeId, Participant, PauseMode, Phase, RankProgress};

/// How often a load is tried when there is nothing to go back to.
const LOAD_ATTEMPTS: u32 = 2;
/// How often an engine is told its version.
const STAMP_ATTEMPTS: u32 = 2;
/// How often a cache reset is tried.
const RESET_ATTEMPTS: u32 = 2;
/// How often a resume that fails is sent again to that rank. In a lockstep group its peers are inside a
/// barrier by then, so going forward is the only way.
const RESUME_ATTEMPTS: u32 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Staging { waiting: BTreeSet<NodeId> },
    WritingBegun,
    ClosingAdmission,
    Pausing { attempt: u32, mode: PauseMode },
    Loading,
    WritingCommit,
    Finishing,
    RollingBack,
    ResettingAfterRollback,
    Resuming,
    Ended,
}

#[derive(Debug)]
struct Rank {
    node: NodeId,
    /// Neither fenced nor lost.
    active: bool,
    /// Fenced, but it is not known yet to be in force.
    fencing: bool,
    /// An answer is awaited in this step.
    waiting: bool,
    /// The answer to the version stamp is awaited as well: to this attempt.
    stamping: Option<u32>,
    /// Of the load, the cache reset or the resume that was sent last.
    attempt: u32,
    pause_failed: bool,
    /// Does not hold the previous weights any more, as far as is known.
    touched: bool,
    sent_at: Time,
    record: RankRecord,
}

impl Rank {
    /// The call to it that was sent last, or is about to be; `index` is its own.
    const fn call(&self, index: EngineIndex) -> Call {
        Call { rank: index, incarnation: self.record.incarnation, attempt: self.attempt }
    }
}

/// What is different when a sidecar takes over.
#[derive(Debug)]
struct Recovery {
    /// Of the committed weights.
    digest: Option<String>,
}

/// What the handlers need besides the run itself.
struct Cx<'a> {
    now: Time,
    config: &'a Config,
    actions: &'a mut VecDeque<Action>,
}

#[derive(Debug)]
pub(super) struct Run {
    begin: Begin,
    step: Step,
    ranks: BTreeMap<EngineIndex, Rank>,
    new: BTreeMap<NodeId, Checkpoint>,
    previous: BTreeMap<NodeId, Option<Checkpoint>>,
    admission_closed: bool,
    invalid: bool,
    aborted: bool,
    loads_begun: bool,
    load_failed: bool,
    committed: bool,
    /// Engines of an earlier sidecar are brought to the committed weights.
    recovery: Option<Recovery>,
    /// What outputs are stamped with.
    stamp: WeightVersion,
    fenced: BTreeSet<EngineIndex>,
    record: Record,
    started: Time,
    phase: Phase,
    phase_since: Time,
    paused_since: Option<Time>,
    deadline: Option<Time>,
}

impl Run {
    pub(super) fn start(
        now: Time,
        begin: Begin,
        from_version: Option<WeightVersion>,
        config: &Config,
        actions: &mut VecDeque<Action>,
    ) -> Self {
        let ranks = ranks_of(now, &begin.participants);
        let nodes: BTreeSet<NodeId> = ranks.values().map(|rank| rank.node).collect();
        for node in &nodes {
            actions.push_back(Action::Stage { node: *node, source: begin.source.clone() });
        }
        actions.push_back(Action::Progress);
        let record = Record {
            id: begin.id.clone(),
            from_version,
            to_version: begin.to_version.clone(),
            source: begin.source.clone(),
            mode: begin.mode,
            ..Record::default()
        };
        Self {
            stamp: begin.to_version.clone(),
            recovery: None,
            begin,
            step: Step::Staging { waiting: nodes },
            ranks,
            new: BTreeMap::new(),
            previous: BTreeMap::new(),
            admission_closed: false,
            invalid: false,
            aborted: false,
            loads_begun: false,
            load_failed: false,
            committed: false,
            fenced: BTreeSet::new(),
            record,
            started: now,
            phase: Phase::Staging,
            phase_since: now,
            paused_since: None,
            deadline: Some(now + config.stage_timeout),
        }
    }

    pub(super) fn id(&self) -> &UpdateId {
        &self.begin.id
    }

    pub(super) fn to_version(&self) -> &WeightVersion {
        &self.begin.to_version
    }

    pub(super) const fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) const fn past_commit_point(&self) -> bool {
        self.committed
    }

    pub(super) const fn deadline(&self) -> Option<Time> {
        self.deadline
    }

    pub(super) fn ranks(&self) -> BTreeMap<EngineIndex, (Incarnation, RankProgress)> {
        self.ranks
            .iter()
            .map(|(rank, state)| (*rank, (state.record.incarnation, state.record.times.state)))
            .collect()
    }

    pub(super) fn describe(&self, snapshot: &mut Snapshot) {
        snapshot.running = Some(self.begin.id.clone());
        snapshot.phase = self.phase;
        snapshot.past_commit_point = self.committed;
        snapshot.ranks = self.ranks.iter().map(|(rank, state)| (*rank, state.record.times.state)).collect();
        // What a recovery finds is what a leader that is gone has left.
        let sure = |state| self.recovery.is_none() && RankProgress::holds_previous(state);
        let in_doubt = snapshot.ranks.iter().filter(|(_, state)| !sure(**state));
        if mutated(Mutation::NeverInDoubt) {
            return;
        }
        snapshot.in_doubt = in_doubt.map(|(rank, _)| *rank).collect();
    }

    /// The record, once, when the run has ended.
    pub(super) fn take_record(&mut self, now: Time) -> Option<Record> {
        if self.step != Step::Ended {
            return None;
        }
        let mut record = std::mem::take(&mut self.record);
        record.committed = self.committed;
        record.total_ms = millis(now - self.started);
        record.checkpoint = self.new.values().next().cloned();
        record.outcome = if !self.fenced.is_empty() {
            Outcome::Degraded { fenced: self.fenced.iter().copied().collect() }
        } else if self.committed {
            Outcome::Committed
        } else if self.invalid {
            Outcome::RefusedInvalid
        } else if self.loads_begun || self.recovery.is_some() {
            Outcome::RolledBack
        } else {
            Outcome::Aborted
        };
        record.left_paused = self.begin.paused_before;
        record.left_asleep = self.begin.asleep;
        // After an escalation the frozen requests were aborted, and nothing went on.
        record.may_mix_versions = self.committed && self.keeps_requests() && !record.pause_escalated;
        if record.may_mix_versions {
            let text = "responses that were running may contain tokens of both versions (mode keep)";
            record.warnings.push(text.to_owned());
        }
        record.ranks =
            std::mem::take(&mut self.ranks).into_iter().map(|(rank, state)| (rank, state.record)).collect();
        Some(record)
    }

    fn keeps_requests(&self) -> bool {
        self.begin.mode == PauseMode::Keep
    }

    pub(super) fn handle(
        &mut self,
        now: Time,
        event: Event,
        config: &Config,
        actions: &mut VecDeque<Action>,
    ) {
        let mut cx = Cx { now, config, actions };
        let cx = &mut cx;
        match event {
            Event::Begin(_) | Event::Recover(_) => {}
            Event::Staged { node, new, previous } => self.staged(cx, node, new, previous),
            Event::StageFailed { node, error } => {
                if matches!(&self.step, Step::Staging { waiting } if waiting.contains(&node)) {
                    self.stage_failed(cx, node, error);
                }
            }
            Event::BegunWritten { result } => self.begun_written(cx, result),
            Event::AdmissionClosed => {
                if self.step == Step::ClosingAdmission {
                    self.start_pause(cx);
                }
            }
            Event::AdmissionFailed { error } => {
                if self.step == Step::ClosingAdmission {
                    self.give_up(cx, format!("admission could not be closed: {error}"));
                }
            }
            Event::Paused { call, result } => self.paused(cx, call, result),
            Event::Loaded { call, target, result } => self.loaded(cx, call, target, result),
            Event::CommitWritten { result } => self.commit_written(cx, result),
            Event::CommitUnknown { error } => {
                if self.step == Step::WritingCommit {
                    let error = format!("it is unknown whether the commit record was written: {error}");
                    self.commit_unknown(cx, error);
                }
            }
            Event::CallLost { rank, incarnation, error } => {
                if self.awaited(rank, incarnation).is_some() {
                    self.fence(cx, rank, &error);
                    self.advance(cx);
                }
            }
            Event::VersionSet { call, result } => self.version_set(cx, call, result),
            Event::CachesReset { call, result } => self.caches_reset(cx, call, result),
            Event::Resumed { call, result } => self.resumed(cx, call, result),
            Event::Fenced { rank, incarnation } => {
                let state = self.ranks.get_mut(&rank);
                if let Some(state) = state.filter(|state| state.record.incarnation == incarnation) {
                    state.fencing = false;
                    self.advance(cx);
                }
            }
            Event::EngineLost { rank, incarnation, reason } => {
                self.engine_lost(cx, rank, incarnation, &reason)
            }
            Event::Abort => self.abort(cx),
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Time, config: &Config, actions: &mut VecDeque<Action>) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let mut cx = Cx { now, config, actions };
        let cx = &mut cx;
        match self.step.clone() {
            Step::Staging { waiting } => {
                let nodes: Vec<String> = waiting.iter().map(ToString::to_string).collect();
                let error = format!(
                    "the checkpoint was not staged within {:?} on node {}",
                    config.stage_timeout,
                    nodes.join(", ")
                );
                if self.recovery.is_some() {
                    self.fence_those(cx, &error, |state| waiting.contains(&state.node));
                } else {
                    self.fail(error);
                    self.finish(cx);
                }
            }
            Step::WritingBegun => {
                // Nothing was touched; whether the record is there or not does no harm.
                self.fail(format!("the journal was not written within {:?}", config.commit_timeout));
                self.finish(cx);
            }
            Step::ClosingAdmission => {
                self.give_up(cx, format!("admission was not closed within {:?}", config.admission_timeout));
            }
            Step::Pausing { attempt, mode } if mode != PauseMode::Abort => {
                self.record.pause_escalated = true;
                self.send_pause(cx, attempt + 1, PauseMode::Abort);
            }
            Step::Pausing { .. } if self.ranks.values().any(|state| state.fencing) => self.fence_fails(),
            Step::Pausing { .. } => {
                self.fence_silent(cx, "pause", config.abort_pause_timeout);
                self.deadline = Some(now + config.admission_timeout);
            }
            Step::Loading => {
                self.load_failed = true;
                self.fence_silent(cx, "load of the new weights", config.load_timeout);
            }
            Step::WritingCommit => {
                let limit = config.commit_timeout;
                self.commit_unknown(cx, format!("commit record was not written within {limit:?}"));
            }
            Step::Finishing | Step::ResettingAfterRollback => {
                self.fence_silent(cx, "cache reset", config.commit_timeout);
            }
            Step::RollingBack => {
                self.fence_silent(cx, "load of the previous weights", config.load_timeout);
            }
            Step::Resuming => self.fence_silent(cx, "resume", config.resume_timeout),
            Step::Ended => {}
        }
        self.advance(cx);
    }

    /// Goes on when nothing is awaited any more in this step.
    fn advance(&mut self, cx: &mut Cx<'_>) {
        if let Step::Staging { waiting } = &mut self.step {
            let nodes: BTreeSet<NodeId> =
                self.ranks.values().filter(|state| state.active).map(|state| state.node).collect();
            waiting.retain(|node| nodes.contains(node));
        }
        if matches!(self.step, Step::Ended | Step::WritingCommit) {
            return;
        }
        if self.active().is_empty() {
            self.finish(cx);
            return;
        }
        match &self.step {
            Step::Staging { waiting } if waiting.is_empty() && self.recovery.is_some() => {
                self.close_admission(cx);
            }
            Step::Staging { waiting } if waiting.is_empty() => self.write_begun(cx),
            Step::Staging { .. }
            | Step::WritingBegun
            | Step::ClosingAdmission
            | Step::Ended
            | Step::WritingCommit => {}
            _ if !self.all_answered() => {}
            Step::Pausing { .. } => self.all_paused(cx),
            Step::Loading => self.all_loaded(cx),
            Step::RollingBack => {
                let limit = cx.config.commit_timeout;
                self.enter(Step::ResettingAfterRollback, Phase::RollingBack, limit, cx);
                self.reset_caches(cx, |rank| rank.record.times.rollback_ms.is_some());
            }
            Step::Finishing | Step::ResettingAfterRollback => self.start_resume(cx),
            Step::Resuming => self.finish(cx),
        }
    }

    fn all_answered(&self) -> bool {
        let early =
            mutated(Mutation::ResumeBeforeAllAcks) && matches!(self.step, Step::Loading | Step::Finishing);
        if early && self.ranks.values().any(|state| !state.waiting) {
            return true;
        }
        // Later on all have been paused, so that a fenced one does not serve in any case.
        let pausing = matches!(self.step, Step::Pausing { .. }) && !mutated(Mutation::TrustFences);
        !self.ranks.values().any(|state| {
            (state.active && (state.waiting || state.stamping.is_some())) || (pausing && state.fencing)
        })
    }

    // --- small things ---

    fn enter(&mut self, step: Step, phase: Phase, limit: Duration, cx: &mut Cx<'_>) {
        self.step = step;
        self.deadline = Some(cx.now + limit);
        self.enter_phase(cx, phase);
    }

    fn enter_phase(&mut self, cx: &mut Cx<'_>, phase: Phase) {
        let spent = self.record.phases.entry(self.phase).or_default();
        *spent += millis(cx.now - self.phase_since);
        self.phase = phase;
        self.phase_since = cx.now;
    }

    fn active(&self) -> Vec<EngineIndex> {
        self.ranks.iter().filter(|(_, state)| state.active).map(|(rank, _)| *rank).collect()
    }

    fn awaited(&mut self, rank: EngineIndex, incarnation: Incarnation) -> Option<&mut Rank> {
        self.ranks
            .get_mut(&rank)
            .filter(|state| state.active && state.waiting && state.record.incarnation == incarnation)
    }

    /// The first cause sticks.
    fn fail(&mut self, error: String) {
        self.record.error.get_or_insert(error);
    }

    fn warn(&mut self, warning: String) {
        self.record.warnings.push(warning);
    }
}

fn ranks_of(now: Time, participants: &BTreeMap<EngineIndex, Participant>) -> BTreeMap<EngineIndex, Rank> {
    let rank = |participant: &Participant| Rank {
        node: participant.node,
        active: true,
        fencing: false,
        waiting: false,
        stamping: None,
        attempt: 0,
        pause_failed: false,
        touched: false,
        sent_at: now,
        record: RankRecord { incarnation: participant.incarnation, ..RankRecord::default() },
    };
    participants.iter().map(|(index, participant)| (*index, rank(participant))).collect()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
