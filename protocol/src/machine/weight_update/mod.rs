//! Weight updates as transactions over all engines.
//!
//! One update at a time: `IDLE -> STAGING -> PREPARED -> PAUSING -> LOADING -> VERIFYING ->
//! COMMITTING -> RESUMING -> IDLE`, or on the way `ROLLING_BACK`. The rules it keeps:
//!
//! * A directory that does not check out touches no engine.
//! * All ranks are paused at once and resumed at once; nothing is loaded before every rank has
//!   paused, and no rank is resumed that holds torn weights or other weights than its peers.
//! * The commit record is the commit point: before it every failure leads back to the previous
//!   weights, after it the way is only forward.
//! * What is about to happen is on record before the first engine is touched, so that a sidecar that takes
//!   over knows which engines to bring to the committed weights ([`Event::Recover`]).
//! * An engine that can be brought neither forward nor back is fenced: it does not serve until it was
//!   started again at the committed version. Lockstep engines are fenced as a group.
//! * Every step has a deadline, so every update ends.
//!
//! Facts of vLLM behind them: `docs/weight-update.md`.

mod fit;
mod ledger;
mod record;
mod run;
#[cfg(test)]
mod simulation;
mod types;
pub mod updates;
mod vocabulary;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::{EngineIndex, GroupKind, Incarnation, Time, UpdateId, WeightVersion};

pub use fit::{Fit, OddTensor, Renames};
pub use ledger::{Begun, Ledger, Pause};
pub use record::{Adapter, Commit, Committed, EngineTimes, Outcome, RankRecord, Record, Snapshot};
use run::Run;
pub use types::{Action, Begin, Event, Recover, Refusal, Target};
pub use vocabulary::{
    Call, Checkpoint, Extent, NodeId, Participant, PauseMode, Phase, RankProgress, WorkerReport, WorkerState,
};

/// How many committed ids are remembered, so that a repeated request is answered with the same record.
const REMEMBERED: usize = 16;

/// Settings that hold for all updates.
#[derive(Clone, Debug)]
pub struct Config {
    /// Engines in lockstep are paused, resumed, fenced and restarted as one.
    pub kind: GroupKind,
    /// For reading and hashing both directories.
    pub stage_timeout: Duration,
    /// For closing admission.
    pub admission_timeout: Duration,
    /// For a pause with mode `abort`. A lockstep group agrees on a pause only every `dp_sync_interval`
    /// steps, so not too short.
    pub abort_pause_timeout: Duration,
    /// For a load on all ranks.
    pub load_timeout: Duration,
    /// For the commit record, the version stamps and the cache resets, each.
    pub commit_timeout: Duration,
    /// For the resume of all ranks.
    pub resume_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kind: GroupKind::default(),
            stage_timeout: Duration::from_secs(3600),
            admission_timeout: Duration::from_secs(10),
            abort_pause_timeout: Duration::from_secs(60),
            load_timeout: Duration::from_secs(900),
            commit_timeout: Duration::from_secs(60),
            resume_timeout: Duration::from_secs(120),
        }
    }
}

#[derive(Debug)]
pub struct WeightUpdate {
    config: Config,
    actions: VecDeque<Action>,
    run: Option<Run>,
    /// What the engines hold, as far as this machine knows.
    current: WeightVersion,
    /// Committed records, newest last.
    committed: VecDeque<Record>,
}

impl WeightUpdate {
    /// A machine in front of engines that hold `current`. `last` is the last committed record, if the
    /// journal has one.
    pub fn new(config: Config, current: WeightVersion, last: Option<Record>) -> Self {
        Self { config, actions: VecDeque::new(), run: None, current, committed: last.into_iter().collect() }
    }

    /// Takes an event in. Never fails: what is wrong with it is ignored or comes out as an action.
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Begin(begin) => self.begin(now, begin),
            Event::Recover(recover) => {
                if self.run.is_none() {
                    self.run = Some(Run::recover(now, recover, &self.config, &mut self.actions));
                }
            }
            other => {
                if let Some(run) = &mut self.run {
                    run.handle(now, other, &self.config, &mut self.actions);
                }
            }
        }
        self.settle(now);
    }

    /// To be called when [`Self::poll_timeout`] is due. Harmless when it is not.
    pub fn handle_timeout(&mut self, now: Time) {
        if let Some(run) = &mut self.run {
            run.handle_timeout(now, &self.config, &mut self.actions);
        }
        self.settle(now);
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.run.as_ref().and_then(Run::deadline)
    }

    /// Plain data.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            version: self.current.clone(),
            committed: self.committed.back().map(|record| record.id.clone()),
            ..Snapshot::default()
        };
        if let Some(run) = &self.run {
            run.describe(&mut snapshot);
        }
        snapshot
    }

    /// What the running update has found and done so far, for progress displays.
    pub fn running_ranks(&self) -> BTreeMap<EngineIndex, (Incarnation, RankProgress)> {
        self.run.as_ref().map(Run::ranks).unwrap_or_default()
    }

    fn begin(&mut self, now: Time, begin: Begin) {
        match self.check(&begin) {
            Ok(None) => {
                let from = (!begin.external_weights).then(|| self.current.clone());
                let run = Run::start(now, begin, from, &self.config, &mut self.actions);
                self.run = Some(run);
            }
            Ok(Some(record)) => self.actions.push_back(Action::Done(Box::new(record))),
            Err(refusal) => self.actions.push_back(Action::Refuse { id: begin.id, refusal }),
        }
    }

    /// What would come of [`Event::Begin`] now: it begins (`None`), or had succeeded before with this
    /// record.
    ///
    /// # Errors
    /// The refusal.
    pub fn check(&self, begin: &Begin) -> Result<Option<Record>, Refusal> {
        if let Some(run) = &self.run {
            return Err(Refusal::Busy { running: run.id().clone(), phase: run.phase() });
        }
        if let Some(record) = self.remembered(&begin.id) {
            if record.source != begin.source || record.to_version != begin.to_version {
                return Err(Refusal::IdUsed { id: begin.id.clone(), source_dir: record.source.clone() });
            }
            return Ok(Some(record.clone()));
        }
        if let Some(expected) = &begin.from_version {
            let actual = if begin.external_weights {
                "unknown (a frontend has loaded weights)".to_owned()
            } else {
                self.current.0.clone()
            };
            if begin.external_weights || *expected != self.current {
                return Err(Refusal::WrongVersion {
                    id: begin.id.clone(),
                    expected: expected.clone(),
                    actual,
                });
            }
        }
        if begin.participants.is_empty() {
            return Err(Refusal::NoEngines);
        }
        Ok(None)
    }

    /// A commit record is durable; `running`: of the run that waits for it, and not of one that has given up.
    fn is_committed(&mut self, running: bool, commit: &Commit) {
        self.current = commit.version.clone();
        if !running {
            self.remember(Record::of_commit(commit));
        }
    }

    fn remember(&mut self, record: Record) {
        self.committed.retain(|earlier| earlier.id != record.id);
        if self.committed.len() == REMEMBERED {
            self.committed.pop_front();
        }
        self.committed.push_back(record);
    }

    fn remembered(&self, id: &UpdateId) -> Option<&Record> {
        self.committed.iter().find(|record| record.id == *id)
    }

    /// Takes over what a run that has ended leaves behind.
    fn settle(&mut self, now: Time) {
        let Some(run) = &mut self.run else {
            return;
        };
        if run.past_commit_point() {
            // From here a restarted engine is to be brought to the new version.
            self.current = run.to_version().clone();
        }
        if let Some(record) = run.take_record(now) {
            if record.committed {
                self.remember(record.clone());
            }
            self.run = None;
            self.actions.push_back(Action::Done(Box::new(record)));
        }
    }
}
