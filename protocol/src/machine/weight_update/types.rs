//! What goes in and out of [`super::WeightUpdate`].

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ledger::Begun;
use super::record::{Commit, Outcome, Record};
use super::vocabulary::{Call, Checkpoint, NodeId, Participant, PauseMode, Phase, WorkerReport};
use crate::{EngineIndex, Incarnation, UpdateId, WeightVersion};

/// An update that is asked for.
#[derive(Clone, Debug)]
pub struct Begin {
    /// Its name. The same name again after success gives the same record again.
    pub id: UpdateId,
    /// Refuse unless this version is the current one.
    pub from_version: Option<WeightVersion>,
    /// Label of the new weights.
    pub to_version: WeightVersion,
    /// Directory of the new checkpoint.
    pub source: String,
    /// What happens to running requests.
    pub mode: PauseMode,
    /// How long the pause in the asked mode may take before all ranks are paused with `abort`.
    pub pause_deadline: Duration,
    /// All engines that serve now.
    pub participants: BTreeMap<EngineIndex, Participant>,
    /// Somebody paused the engines before: they are not resumed at the end.
    pub paused_before: bool,
    /// Parts of the engines' memory sleep, and are to be woken up by whoever has put them to sleep. Not the weights.
    pub asleep: bool,
    /// Engines may hold weights that did not come from an update of ours, so a rollback must reload
    /// all of them.
    pub external_weights: bool,
    /// The version that is replaced is kept nowhere: an engine whose load fails gets the new version once more,
    /// and is fenced when that fails as well.
    pub forward_only: bool,
}

/// Engines that live on from before a restart of the sidecar are to be brought to the committed weights.
#[derive(Clone, Debug)]
pub struct Recover {
    /// The update that was open, or a name for the recovery; its participants are the engines that are taken over: of a
    /// lockstep group all, or none.
    pub begin: Begin,
    /// The update that was open has a commit record: it is rolled forward. Else it is rolled back.
    pub committed: bool,
    /// The committed version, which all engines are brought to.
    pub version: WeightVersion,
    /// Its whole digest, if there is one: what a node has staged must be it.
    pub digest: Option<String>,
}

/// Which of the two checkpoints a load is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The one the update brings.
    New,
    /// The one it replaces.
    Previous,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody wants an update. Answered by [`Action::Refuse`] or, at its end, [`Action::Done`].
    Begin(Begin),
    /// A sidecar takes over engines of which it is not certain what they hold. Ends with [`Action::Done`]. Ignored
    /// while an update runs.
    Recover(Recover),
    /// The record of what is about to happen is durable, or is certain never to be.
    BegunWritten { result: Result<(), String> },
    /// A node has checked both directories.
    Staged {
        node: NodeId,
        /// The new checkpoint; in a recovery the committed one.
        new: Checkpoint,
        /// The one that the engines hold; `None`: there is no way back, and the caller accepts it.
        previous: Option<Checkpoint>,
    },
    /// A node found a fault in the directory, or cannot read it.
    StageFailed { node: NodeId, error: String },
    /// No new request passes the virtual engines of any rank.
    AdmissionClosed,
    /// The gate could not be closed.
    AdmissionFailed { error: String },
    /// A rank answered to [`Action::Pause`].
    Paused {
        call: Call,
        /// The engine's answer.
        result: Result<(), String>,
    },
    /// A rank answered to [`Action::Load`].
    Loaded {
        call: Call,
        /// `target` of the action.
        target: Target,
        /// One report per worker, or why there is none.
        result: Result<Vec<WorkerReport>, String>,
    },
    /// The commit record is durable, or is certain never to be.
    CommitWritten { result: Result<Option<String>, String> },
    /// Whether the commit record is, or will be, durable cannot be found out.
    CommitUnknown { error: String },
    /// Whether a pause or a resume of a rank is, or will be, in force cannot be found out.
    CallLost {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
        error: String,
    },
    /// A rank answered to [`Action::SetVersion`].
    VersionSet {
        call: Call,
        /// `Ok(false)`: its vLLM is too old to stamp outputs.
        result: Result<bool, String>,
    },
    /// A rank answered to [`Action::ResetCaches`].
    CachesReset {
        call: Call,
        /// `Ok(false)`: not reset, blocks are in use.
        result: Result<bool, String>,
    },
    /// A rank answered to [`Action::Resume`].
    Resumed {
        call: Call,
        /// The engine's answer.
        result: Result<(), String>,
    },
    /// [`Action::Fence`] is in force: nothing that a frontend sends reaches the engine any more. Without this word
    /// an update does not go on past its pause, as the engine may be serving the old weights.
    Fenced {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
    },
    /// An engine is gone.
    EngineLost {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
        reason: String,
    },
    /// The operator wants the running update to end without a commit. After the commit point: ignored.
    Abort,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Check the directories on this node. Generation goes on.
    Stage {
        node: NodeId,
        /// The new checkpoint.
        source: String,
    },
    /// Make this durable: from here on engines are touched.
    WriteBegun { begun: Box<Begun> },
    /// Close the gate for new requests at the virtual engines of all ranks.
    CloseAdmission,
    /// Call `pause_scheduler(mode, clear_cache)`. All ranks' actions come together and must be sent
    /// without waiting for one another (a lockstep rank answers only when all have it).
    Pause {
        /// Not the first when the mode was changed after the deadline.
        call: Call,
        /// What happens to running requests.
        mode: PauseMode,
        /// Always false: the caches are reset explicitly, so that the answer is seen.
        clear_cache: bool,
    },
    /// Load through the shim. All ranks' actions come together.
    Load {
        call: Call,
        /// Which of the two.
        target: Target,
        /// What to load, and what must be consumed.
        checkpoint: Checkpoint,
    },
    /// Make the commit record durable. This is the commit point.
    WriteCommit { commit: Commit },
    /// Call `set_weight_version(version)`.
    SetVersion { call: Call, version: WeightVersion },
    /// Call `reset_prefix_cache(reset_running_requests, ..)`, then the multi-modal and encoder caches.
    ResetCaches {
        call: Call,
        /// Preempt what still holds blocks (kept requests are computed anew).
        reset_running_requests: bool,
    },
    /// Call `resume_scheduler()`. All ranks' actions come together and must be sent without waiting for
    /// one another (a lockstep rank blocks until all have it).
    Resume { call: Call },
    /// Open the gate at the virtual engines of all ranks. Fenced ranks are not admitted, so nothing
    /// reaches them.
    OpenAdmission,
    /// Keep this engine from serving; it must be started again and brought to the committed weights. Answered by
    /// [`Event::Fenced`].
    Fence {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
        /// Why, for logs and for the operator.
        why: String,
    },
    /// Something changed that is worth showing; see [`super::WeightUpdate::snapshot`].
    Progress,
    /// A request for an update is not taken.
    Refuse { id: UpdateId, refusal: Refusal },
    /// The update has ended, or had ended long ago when the same id was sent again.
    Done(Box<Record>),
}

/// Why an update was not begun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Refusal {
    /// One at a time.
    #[error("update {running} is running ({phase})")]
    Busy {
        /// The one that runs.
        running: UpdateId,
        phase: Phase,
    },
    /// The caller's idea of the current version is wrong.
    #[error("current weight version is {actual}, update {id} expected {expected}")]
    WrongVersion {
        id: UpdateId,
        expected: WeightVersion,
        /// What is current.
        actual: String,
    },
    /// There is nobody to update.
    #[error("no engine is serving")]
    NoEngines,
    /// The id was used for something else.
    #[error("update {id} was already committed from {source_dir}")]
    IdUsed {
        id: UpdateId,
        /// The directory it was committed from.
        source_dir: String,
    },
    /// Another controller has the lock.
    #[error("{holder}")]
    Controlled {
        /// Which, and what it does.
        holder: String,
    },
    /// A load into memory that is not there ends a worker.
    #[error(
        "the weights of rank {} sleep: wake them up first (`sidecar wake --tag weights`, or wake_up with \
         tags=[\"weights\"]), then update, then wake up the rest",
        list(ranks)
    )]
    Asleep { ranks: Vec<EngineIndex> },
    /// Adapters alone bring no model.
    #[error(
        "the weights were discarded by a sleep of level 2: load weights first (`sidecar update --path`), adapters with \
         them or after"
    )]
    NoWeights,
    /// These ranks would go on with the old weights.
    #[error("rank {} may be serving the current weights, but is not reached", list(ranks))]
    Unreached { ranks: Vec<EngineIndex> },
    /// Lockstep engines are updated together.
    #[error("the lockstep group is not complete: rank {} is not serving", list(ranks))]
    Incomplete {
        /// Which are missing.
        ranks: Vec<EngineIndex>,
    },
    /// A recovery goes first.
    #[error("engines are taken over after a restart of the sidecar")]
    TakenOver,
}

impl Refusal {
    /// As records have it.
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Busy { .. } | Self::Controlled { .. } | Self::TakenOver => Outcome::RefusedBusy,
            Self::WrongVersion { .. } => Outcome::RefusedVersion,
            Self::NoEngines
            | Self::IdUsed { .. }
            | Self::Asleep { .. }
            | Self::NoWeights
            | Self::Unreached { .. }
            | Self::Incomplete { .. } => Outcome::RefusedInvalid,
        }
    }
}

fn list(ranks: &[EngineIndex]) -> String {
    ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
