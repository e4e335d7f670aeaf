//! One update, from its beginning to its record.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::{EngineIndex, Incarnation, Time, UpdateId, WeightVersion};

use super::types::{
    Action, Begin, Checkpoint, Commit, Event, NodeId, Outcome, PauseMode, Phase, RankRecord,
    RankState, Record, Snapshot, Target, WorkerReport, WorkerState,
};
use super::{Config, RankState as State};

/// How often a cache reset is tried.
const RESET_ATTEMPTS: u32 = 2;
/// How often a resume that fails is sent again to that rank. In a lockstep group its peers are inside a
/// barrier by then, so going forward is the only way.
const RESUME_ATTEMPTS: u32 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Staging { waiting: BTreeSet<NodeId> },
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
    /// An answer is awaited in this step.
    waiting: bool,
    /// The answer to the version stamp is awaited as well.
    stamping: bool,
    /// Of the cache reset or the resume that was sent last.
    attempt: u32,
    pause_failed: bool,
    /// Does not hold the previous weights any more, as far as is known.
    touched: bool,
    sent_at: Time,
    record: RankRecord,
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
    fenced: BTreeSet<EngineIndex>,
    record: Record,
    started: Time,
    phase: Phase,
    phase_since: Time,
    paused_since: Option<Time>,
    deadline: Option<Time>,
    #[cfg(test)]
    pub(super) mutation: Option<super::Mutation>,
}

impl Run {
    pub(super) fn start(
        now: Time,
        begin: Begin,
        from_version: Option<WeightVersion>,
        config: &Config,
        actions: &mut VecDeque<Action>,
    ) -> Self {
        let ranks: BTreeMap<_, _> = begin
            .participants
            .iter()
            .map(|(rank, participant)| {
                let rank_state = Rank {
                    node: participant.node,
                    active: true,
                    waiting: false,
                    stamping: false,
                    attempt: 0,
                    pause_failed: false,
                    touched: false,
                    sent_at: now,
                    record: RankRecord {
                        incarnation: participant.incarnation,
                        ..RankRecord::default()
                    },
                };
                (*rank, rank_state)
            })
            .collect();
        let nodes: BTreeSet<NodeId> = ranks.values().map(|rank| rank.node).collect();
        for node in &nodes {
            actions.push_back(Action::Stage {
                node: *node,
                source: begin.source.clone(),
            });
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
            #[cfg(test)]
            mutation: None,
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

    pub(super) fn ranks(&self) -> BTreeMap<EngineIndex, (Incarnation, RankState)> {
        self.ranks
            .iter()
            .map(|(rank, state)| (*rank, (state.record.incarnation, state.record.state)))
            .collect()
    }

    pub(super) fn describe(&self, snapshot: &mut Snapshot) {
        snapshot.running = Some(self.begin.id.clone());
        snapshot.phase = self.phase;
        snapshot.past_commit_point = self.committed;
        snapshot.ranks = self
            .ranks
            .iter()
            .map(|(rank, state)| (*rank, state.record.state))
            .collect();
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
            Outcome::Degraded {
                fenced: self.fenced.iter().copied().collect(),
            }
        } else if self.committed {
            Outcome::Committed
        } else if self.invalid {
            Outcome::RefusedInvalid
        } else if self.loads_begun {
            Outcome::RolledBack
        } else {
            Outcome::Aborted
        };
        record.left_paused = self.begin.paused_before;
        // After an escalation the frozen requests were aborted, and nothing went on.
        record.may_mix_versions =
            self.committed && self.keeps_requests() && !record.pause_escalated;
        record.ranks = std::mem::take(&mut self.ranks)
            .into_iter()
            .map(|(rank, state)| (rank, state.record))
            .collect();
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
        let mut cx = Cx {
            now,
            config,
            actions,
        };
        let cx = &mut cx;
        match event {
            Event::Begin(_) => {}
            Event::Staged {
                node,
                new,
                previous,
            } => self.staged(cx, node, new, previous),
            Event::StageFailed { node, error } => {
                if matches!(&self.step, Step::Staging { waiting } if waiting.contains(&node)) {
                    self.invalid = true;
                    self.fail(error);
                    self.finish(cx);
                }
            }
            Event::AdmissionClosed => {
                if self.step == Step::ClosingAdmission {
                    self.start_pause(cx);
                }
            }
            Event::AdmissionFailed { error } => {
                if self.step == Step::ClosingAdmission {
                    self.fail(format!("admission could not be closed: {error}"));
                    self.finish(cx);
                }
            }
            Event::Paused {
                rank,
                incarnation,
                attempt,
                result,
            } => self.paused(cx, rank, incarnation, attempt, result),
            Event::Loaded {
                rank,
                incarnation,
                target,
                result,
            } => self.loaded(cx, rank, incarnation, target, result),
            Event::CommitWritten { result } => self.commit_written(cx, result),
            Event::VersionSet {
                rank,
                incarnation,
                result,
            } => self.version_set(cx, rank, incarnation, result),
            Event::CachesReset {
                rank,
                incarnation,
                attempt,
                result,
            } => self.caches_reset(cx, rank, incarnation, attempt, result),
            Event::Resumed {
                rank,
                incarnation,
                attempt,
                result,
            } => self.resumed(cx, rank, incarnation, attempt, result),
            Event::EngineLost {
                rank,
                incarnation,
                reason,
            } => self.engine_lost(cx, rank, incarnation, &reason),
            Event::Abort => self.abort(cx),
        }
    }

    pub(super) fn handle_timeout(
        &mut self,
        now: Time,
        config: &Config,
        actions: &mut VecDeque<Action>,
    ) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let mut cx = Cx {
            now,
            config,
            actions,
        };
        let cx = &mut cx;
        match self.step.clone() {
            Step::Staging { waiting } => {
                let nodes: Vec<String> = waiting.iter().map(ToString::to_string).collect();
                self.fail(format!(
                    "the directory was not read within {:?} on node {}",
                    config.stage_timeout,
                    nodes.join(", ")
                ));
                self.finish(cx);
            }
            Step::ClosingAdmission => {
                self.fail(format!(
                    "admission was not closed within {:?}",
                    config.admission_timeout
                ));
                self.finish(cx);
            }
            Step::Pausing { attempt, mode } if mode != PauseMode::Abort => {
                self.record.pause_escalated = true;
                self.send_pause(cx, attempt + 1, PauseMode::Abort);
            }
            Step::Pausing { .. } => self.fence_silent(cx, "pause", config.abort_pause_timeout),
            Step::Loading => {
                self.load_failed = true;
                self.fence_silent(cx, "load of the new weights", config.load_timeout);
            }
            Step::WritingCommit => {
                // Whether the record is, or will be, on the disk is unknown. What the engines hold must
                // follow the record, so they start again by it.
                self.fail(format!(
                    "commit record was not written within {:?}",
                    config.commit_timeout
                ));
                for rank in self.active() {
                    self.fence(cx, rank, "it is unknown whether the update is committed");
                }
                self.finish(cx);
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

    // --- steps forward ---

    fn staged(
        &mut self,
        cx: &mut Cx<'_>,
        node: NodeId,
        new: Checkpoint,
        previous: Option<Checkpoint>,
    ) {
        let Step::Staging { waiting } = &mut self.step else {
            return;
        };
        if !waiting.remove(&node) {
            return;
        }
        if let Some((other, first)) = self.new.iter().next() {
            let same = first.tensors == new.tensors
                && first.bytes == new.bytes
                && first.digest == new.digest;
            if !same {
                let error = format!(
                    "nodes {other} and {node} see different checkpoints at {}: digest {} and {}",
                    self.begin.source,
                    first.digest.as_deref().unwrap_or("none"),
                    new.digest.as_deref().unwrap_or("none"),
                );
                self.invalid = true;
                self.fail(error);
                self.finish(cx);
                return;
            }
        }
        if previous.is_none() {
            self.warn(format!(
                "the previous checkpoint is not there any more on node {node}: no way back"
            ));
        }
        self.new.insert(node, new);
        self.previous.insert(node, previous);
        self.advance(cx);
    }

    fn close_admission(&mut self, cx: &mut Cx<'_>) {
        self.admission_closed = true;
        self.enter(cx, Step::ClosingAdmission, Phase::Prepared);
        self.deadline = Some(cx.now + cx.config.admission_timeout);
        cx.actions.push_back(Action::CloseAdmission);
    }

    fn start_pause(&mut self, cx: &mut Cx<'_>) {
        self.paused_since = Some(cx.now);
        let mode = self.begin.mode;
        let step = Step::Pausing { attempt: 0, mode };
        self.enter(cx, step, Phase::Pausing);
        for rank in self.ranks.values_mut() {
            rank.sent_at = cx.now;
        }
        self.send_pause(cx, 1, mode);
    }

    /// To all ranks, also those that have answered an earlier attempt: a lockstep group pauses together
    /// or not at all. Only answers to the last attempt count, since a rank must not be loaded while a
    /// pause is in flight.
    fn send_pause(&mut self, cx: &mut Cx<'_>, attempt: u32, mode: PauseMode) {
        self.step = Step::Pausing { attempt, mode };
        let limit = if mode == PauseMode::Abort {
            cx.config.abort_pause_timeout
        } else {
            self.begin.pause_deadline
        };
        self.deadline = Some(cx.now + limit);
        #[cfg(test)]
        let forgotten = (self.mutation == Some(super::Mutation::ForgetOneRankInPause))
            .then(|| self.active().pop())
            .flatten();
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            #[cfg(test)]
            if Some(*rank) == forgotten {
                continue;
            }
            state.waiting = true;
            state.pause_failed = false;
            state.record.state = State::Pausing;
            cx.actions.push_back(Action::Pause {
                rank: *rank,
                incarnation: state.record.incarnation,
                attempt,
                mode,
                clear_cache: false,
            });
        }
        cx.actions.push_back(Action::Progress);
    }

    fn paused(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        attempt: u32,
        result: Result<(), String>,
    ) {
        let current = matches!(self.step, Step::Pausing { attempt: now, .. } if now == attempt);
        let Some(state) = current.then(|| self.awaited(rank, incarnation)).flatten() else {
            return;
        };
        state.waiting = false;
        state.record.pause_ms = Some(millis(cx.now - state.sent_at));
        match result {
            Ok(()) => state.record.state = State::Paused,
            Err(error) => {
                state.pause_failed = true;
                state.record.state = State::Serving;
                state.record.errors.push(format!("pause failed: {error}"));
                self.fail(format!("rank {rank}: pause failed: {error}"));
            }
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    fn all_paused(&mut self, cx: &mut Cx<'_>) {
        let active = self.ranks.values().filter(|state| state.active);
        let failed = active.clone().filter(|state| state.pause_failed).count();
        let all = active.count();
        if failed == 0 && !self.aborted {
            self.start_load(cx, Target::New);
        } else if failed == 0 || !cx.config.lockstep {
            // For an independent engine a resume without a pause is a no-op.
            self.start_resume(cx);
        } else if failed == all && matches!(self.step, Step::Pausing { attempt: 1, .. }) {
            // Nobody has paused (after a second attempt the first one may be in force); a resume of a lockstep group that is not paused can hang it.
            self.finish(cx);
        } else if let Some(rank) = self.active().first() {
            self.fence(
                cx,
                *rank,
                "the group is paused in part and cannot be resumed",
            );
            self.finish(cx);
        }
    }

    fn start_load(&mut self, cx: &mut Cx<'_>, target: Target) {
        match target {
            Target::New => {
                self.loads_begun = true;
                self.enter(cx, Step::Loading, Phase::Loading);
            }
            Target::Previous => self.enter(cx, Step::RollingBack, Phase::RollingBack),
        }
        self.deadline = Some(cx.now + cx.config.load_timeout);
        let any_touched = self
            .ranks
            .values()
            .any(|state| state.active && state.touched);
        let external = self.begin.external_weights;
        for rank in self.active() {
            let Some(state) = self.ranks.get_mut(&rank) else {
                continue;
            };
            let checkpoint = match target {
                Target::New => self.new.get(&state.node).cloned(),
                Target::Previous => self.previous.get(&state.node).cloned().flatten(),
            };
            if target == Target::Previous {
                #[cfg(test)]
                if self.mutation == Some(super::Mutation::RollBackFailedRanksOnly)
                    && state.record.state == State::Loaded
                {
                    continue;
                }
                if !(state.touched || (external && any_touched)) {
                    continue;
                }
            }
            let Some(checkpoint) = checkpoint else {
                self.fence(cx, rank, "there is no previous checkpoint to go back to");
                continue;
            };
            state.waiting = true;
            state.sent_at = cx.now;
            state.record.state = match target {
                Target::New => State::Loading,
                Target::Previous => State::RollingBack,
            };
            cx.actions.push_back(Action::Load {
                rank,
                incarnation: state.record.incarnation,
                target,
                checkpoint,
            });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    fn loaded(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        target: Target,
        result: Result<Vec<WorkerReport>, String>,
    ) {
        let expected = match self.step {
            Step::Loading => Target::New,
            Step::RollingBack => Target::Previous,
            _ => return,
        };
        if target != expected {
            return;
        }
        let Some(node) = self.awaited(rank, incarnation).map(|state| state.node) else {
            return;
        };
        let wanted = match target {
            Target::New => self.new.get(&node).cloned(),
            Target::Previous => self.previous.get(&node).cloned().flatten(),
        };
        let wanted = wanted.unwrap_or_default();
        let (fault, workers) = match result {
            Ok(workers) => (verify(&workers, &wanted), workers),
            Err(error) => (Some(format!("load failed: {error}")), Vec::new()),
        };
        let unchanged = !workers.is_empty()
            && workers
                .iter()
                .all(|worker| worker.state == WorkerState::Unchanged);
        let unverified = fault.is_none()
            && wanted.digest.is_some()
            && workers.iter().any(|worker| worker.digest.is_none());
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        state.waiting = false;
        state.record.workers = workers;
        let took = millis(cx.now - state.sent_at);
        match (target, &fault) {
            (Target::New, None) => {
                state.touched = true;
                state.record.load_ms = Some(took);
                state.record.state = State::Loaded;
            }
            (Target::New, Some(_)) => {
                state.touched = !unchanged;
                state.record.load_ms = Some(took);
                state.record.state = State::LoadFailed;
                self.load_failed = true;
            }
            (Target::Previous, None) => {
                state.touched = false;
                state.record.rollback_ms = Some(took);
                state.record.state = State::RolledBack;
            }
            (Target::Previous, Some(_)) => state.record.rollback_ms = Some(took),
        }
        if let Some(fault) = fault {
            let fault = format!("rank {rank}: {fault}");
            if target == Target::Previous {
                self.fence(cx, rank, &format!("rollback failed: {fault}"));
            } else {
                state.record.errors.push(fault.clone());
                self.fail(fault);
            }
        }
        if unverified {
            self.warn(format!(
                "rank {rank}: the digest was not computed there (module blake3 missing?); counts and bytes agree"
            ));
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    fn all_loaded(&mut self, cx: &mut Cx<'_>) {
        if self.load_failed {
            self.start_load(cx, Target::Previous);
            return;
        }
        self.enter_phase(cx, Phase::Verifying);
        // Each report was compared with the manifest when it came; what is left is that all agree, which
        // follows from all being equal to the same manifest.
        self.enter(cx, Step::WritingCommit, Phase::Committing);
        self.deadline = Some(cx.now + cx.config.commit_timeout);
        cx.actions.push_back(Action::Progress);
        #[cfg(test)]
        if self.mutation == Some(super::Mutation::SkipCommitRecord) {
            self.commit_written(cx, Ok(()));
            return;
        }
        cx.actions.push_back(Action::WriteCommit {
            commit: Commit {
                id: self.begin.id.clone(),
                version: self.begin.to_version.clone(),
                checkpoint: self.new.values().next().cloned().unwrap_or_default(),
            },
        });
    }

    fn commit_written(&mut self, cx: &mut Cx<'_>, result: Result<(), String>) {
        if self.step != Step::WritingCommit {
            return;
        }
        if let Err(error) = result {
            self.fail(format!("commit record could not be written: {error}"));
            self.load_failed = true;
            self.start_load(cx, Target::Previous);
            return;
        }
        self.committed = true;
        self.enter(cx, Step::Finishing, Phase::Committing);
        self.deadline = Some(cx.now + cx.config.commit_timeout);
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            state.stamping = true;
            cx.actions.push_back(Action::SetVersion {
                rank: *rank,
                incarnation: state.record.incarnation,
                version: self.begin.to_version.clone(),
            });
        }
        self.reset_caches(cx, |_| true);
    }

    fn reset_caches(&mut self, cx: &mut Cx<'_>, which: impl Fn(&Rank) -> bool) {
        // With `keep` frozen requests hold blocks, and vLLM would answer false.
        let reset_running_requests = self.keeps_requests();
        for (rank, state) in &mut self.ranks {
            if !state.active || !which(state) {
                continue;
            }
            state.waiting = true;
            state.attempt = 1;
            cx.actions.push_back(Action::ResetCaches {
                rank: *rank,
                incarnation: state.record.incarnation,
                attempt: 1,
                reset_running_requests,
            });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    fn version_set(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        result: Result<(), String>,
    ) {
        if self.step != Step::Finishing {
            return;
        }
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        if !state.active || !state.stamping || state.record.incarnation != incarnation {
            return;
        }
        state.stamping = false;
        if let Err(error) = result {
            self.warn(format!(
                "rank {rank}: outputs do not carry the version: {error}"
            ));
        }
        self.advance(cx);
    }

    fn caches_reset(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        attempt: u32,
        result: Result<bool, String>,
    ) {
        let rolling_back = match self.step {
            Step::Finishing => false,
            Step::ResettingAfterRollback => true,
            _ => return,
        };
        let Some(state) = self.awaited(rank, incarnation) else {
            return;
        };
        if state.attempt != attempt {
            return;
        }
        let why = match result {
            Ok(true) => {
                state.waiting = false;
                if !rolling_back {
                    state.record.state = State::Stamped;
                }
                cx.actions.push_back(Action::Progress);
                self.advance(cx);
                return;
            }
            Ok(false) => "blocks are in use".to_owned(),
            Err(error) => error,
        };
        if attempt < RESET_ATTEMPTS {
            state.attempt += 1;
            cx.actions.push_back(Action::ResetCaches {
                rank,
                incarnation,
                attempt: attempt + 1,
                reset_running_requests: true,
            });
            return;
        }
        if rolling_back && !self.begin.external_weights {
            // What the cache holds was computed with the weights that are loaded again.
            if let Some(state) = self.awaited(rank, incarnation) {
                state.waiting = false;
            }
            self.warn(format!(
                "rank {rank}: caches were not reset after the rollback: {why}"
            ));
        } else {
            self.fence(
                cx,
                rank,
                &format!("caches of the previous weights could not be reset: {why}"),
            );
        }
        self.advance(cx);
    }

    fn start_resume(&mut self, cx: &mut Cx<'_>) {
        if self.begin.paused_before {
            self.finish(cx);
            return;
        }
        self.enter(cx, Step::Resuming, Phase::Resuming);
        self.deadline = Some(cx.now + cx.config.resume_timeout);
        for (rank, state) in self.ranks.iter_mut().filter(|(_, state)| state.active) {
            state.waiting = true;
            state.attempt = 1;
            state.record.state = State::Resuming;
            cx.actions.push_back(Action::Resume {
                rank: *rank,
                incarnation: state.record.incarnation,
                attempt: 1,
            });
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    fn resumed(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        attempt: u32,
        result: Result<(), String>,
    ) {
        if self.step != Step::Resuming {
            return;
        }
        let Some(state) = self.awaited(rank, incarnation) else {
            return;
        };
        if state.attempt != attempt {
            return;
        }
        match result {
            Ok(()) => {
                state.waiting = false;
                state.record.state = State::Resumed;
            }
            Err(error) if attempt < RESUME_ATTEMPTS => {
                state.attempt += 1;
                state.record.errors.push(format!("resume failed: {error}"));
                cx.actions.push_back(Action::Resume {
                    rank,
                    incarnation,
                    attempt: attempt + 1,
                });
            }
            Err(error) => self.fence(cx, rank, &format!("resume failed: {error}")),
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    /// Goes on when nothing is awaited any more in this step.
    fn advance(&mut self, cx: &mut Cx<'_>) {
        if let Step::Staging { waiting } = &mut self.step {
            let nodes: BTreeSet<NodeId> = self
                .ranks
                .values()
                .filter(|state| state.active)
                .map(|state| state.node)
                .collect();
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
            Step::Staging { waiting } if waiting.is_empty() => self.close_admission(cx),
            Step::Staging { .. } | Step::ClosingAdmission | Step::Ended | Step::WritingCommit => {}
            _ if !self.all_answered() => {}
            Step::Pausing { .. } => self.all_paused(cx),
            Step::Loading => self.all_loaded(cx),
            Step::RollingBack => {
                self.enter(cx, Step::ResettingAfterRollback, Phase::RollingBack);
                self.deadline = Some(cx.now + cx.config.commit_timeout);
                self.reset_caches(cx, |rank| rank.record.rollback_ms.is_some());
            }
            Step::Finishing | Step::ResettingAfterRollback => self.start_resume(cx),
            Step::Resuming => self.finish(cx),
        }
    }

    fn all_answered(&self) -> bool {
        #[cfg(test)]
        {
            let early = match self.mutation {
                Some(super::Mutation::ResumeBeforeAllAcks) => {
                    matches!(self.step, Step::Loading | Step::Finishing)
                }
                Some(super::Mutation::RollBackAtFirstFailure) => {
                    self.step == Step::Loading && self.load_failed
                }
                _ => false,
            };
            if early && self.ranks.values().any(|state| !state.waiting) {
                return true;
            }
        }
        !self
            .ranks
            .values()
            .any(|state| state.active && (state.waiting || state.stamping))
    }

    // --- what goes wrong ---

    fn abort(&mut self, cx: &mut Cx<'_>) {
        let text = "aborted by the operator".to_owned();
        match &self.step {
            Step::Staging { .. } | Step::ClosingAdmission => {
                self.fail(text);
                self.finish(cx);
            }
            Step::Pausing { .. } => {
                self.aborted = true;
                self.fail(text);
                // A pause of a lockstep group cannot be cancelled: it must complete first. An
                // independent engine may be resumed while it drains.
                if !cx.config.lockstep {
                    self.start_resume(cx);
                }
            }
            Step::Loading => {
                self.load_failed = true;
                self.fail(text);
            }
            _ => {}
        }
    }

    fn engine_lost(
        &mut self,
        cx: &mut Cx<'_>,
        rank: EngineIndex,
        incarnation: Incarnation,
        reason: &str,
    ) {
        let known = self
            .ranks
            .get(&rank)
            .is_some_and(|state| state.active && state.record.incarnation == incarnation);
        if !known || self.step == Step::Ended {
            return;
        }
        if !cx.config.lockstep {
            self.drop_rank(rank, State::Lost, format!("engine was lost: {reason}"));
            self.warn(format!(
                "rank {rank} was lost during {} ({reason}); it comes back at the committed version",
                self.phase
            ));
        } else {
            if !self.committed {
                self.fail(format!(
                    "rank {rank} was lost during {} ({reason}); its group starts again",
                    self.phase
                ));
            }
            self.warn(format!(
                "the group starts again at the committed version, because rank {rank} was lost: {reason}"
            ));
            for peer in self.active() {
                let Some(state) = self.ranks.get(&peer) else {
                    continue;
                };
                if peer != rank {
                    cx.actions.push_back(Action::Fence {
                        rank: peer,
                        incarnation: state.record.incarnation,
                        why: format!("rank {rank} of its lockstep group was lost: {reason}"),
                    });
                }
                let why = format!("rank {rank} of the group was lost: {reason}");
                self.drop_rank(peer, State::Lost, why);
            }
        }
        cx.actions.push_back(Action::Progress);
        self.advance(cx);
    }

    /// Fences everybody who has not answered in this step.
    fn fence_silent(&mut self, cx: &mut Cx<'_>, what: &str, limit: Duration) {
        let silent: Vec<EngineIndex> = self
            .ranks
            .iter()
            .filter(|(_, state)| state.active && (state.waiting || state.stamping))
            .map(|(rank, _)| *rank)
            .collect();
        for rank in silent {
            self.fence(cx, rank, &format!("no answer to {what} within {limit:?}"));
        }
    }

    fn fence(&mut self, cx: &mut Cx<'_>, rank: EngineIndex, why: &str) {
        if !self.ranks.get(&rank).is_some_and(|state| state.active) {
            return;
        }
        self.fail(format!("rank {rank} is fenced: {why}"));
        let group = if cx.config.lockstep {
            self.active()
        } else {
            vec![rank]
        };
        for member in group {
            let Some(state) = self.ranks.get(&member) else {
                continue;
            };
            let why = if member == rank {
                why.to_owned()
            } else {
                format!("lockstep group of rank {rank}: {why}")
            };
            cx.actions.push_back(Action::Fence {
                rank: member,
                incarnation: state.record.incarnation,
                why: why.clone(),
            });
            self.fenced.insert(member);
            self.drop_rank(member, State::Fenced, why);
        }
        cx.actions.push_back(Action::Progress);
    }

    fn drop_rank(&mut self, rank: EngineIndex, last: State, why: String) {
        if let Some(state) = self.ranks.get_mut(&rank) {
            state.active = false;
            state.waiting = false;
            state.stamping = false;
            state.record.state = last;
            state.record.errors.push(why);
        }
    }

    fn finish(&mut self, cx: &mut Cx<'_>) {
        if self.step == Step::Ended {
            return;
        }
        if let Some(since) = self.paused_since {
            self.record.paused_ms = Some(millis(cx.now - since));
        }
        self.enter_phase(cx, Phase::Idle);
        self.step = Step::Ended;
        self.deadline = None;
        if self.admission_closed {
            cx.actions.push_back(Action::OpenAdmission);
        }
        cx.actions.push_back(Action::Progress);
    }

    // --- small things ---

    fn enter(&mut self, cx: &mut Cx<'_>, step: Step, phase: Phase) {
        self.step = step;
        self.enter_phase(cx, phase);
    }

    fn enter_phase(&mut self, cx: &mut Cx<'_>, phase: Phase) {
        let spent = self.record.phases.entry(self.phase).or_default();
        *spent += millis(cx.now - self.phase_since);
        self.phase = phase;
        self.phase_since = cx.now;
    }

    fn active(&self) -> Vec<EngineIndex> {
        self.ranks
            .iter()
            .filter(|(_, state)| state.active)
            .map(|(rank, _)| *rank)
            .collect()
    }

    fn awaited(&mut self, rank: EngineIndex, incarnation: Incarnation) -> Option<&mut Rank> {
        self.ranks.get_mut(&rank).filter(|state| {
            state.active && state.waiting && state.record.incarnation == incarnation
        })
    }

    /// The first cause sticks.
    fn fail(&mut self, error: String) {
        self.record.error.get_or_insert(error);
    }

    fn warn(&mut self, warning: String) {
        self.record.warnings.push(warning);
    }
}

fn verify(workers: &[WorkerReport], wanted: &Checkpoint) -> Option<String> {
    if workers.is_empty() {
        return Some("no worker answered to the load".to_owned());
    }
    workers.iter().find_map(|worker| worker.fault(wanted))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
