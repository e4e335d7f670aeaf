//! What goes in and out of [`super::Updates`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use thiserror::Error;

use super::super::ledger::{Ledger, Pause};
use super::super::record::{Adapter, Committed, Record};
use super::super::types::{self as step, Refusal};
use super::super::vocabulary::{Checkpoint, NodeId, PauseMode};
use crate::machine::control::Grant;
use crate::machine::memory::Memory;
use crate::{EngineIndex, Incarnation, UpdateId, WeightVersion};

/// Engines, each with the life that is meant.
pub type Engines = BTreeMap<EngineIndex, Incarnation>;

/// A restore or an adoption; its answer carries the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// An update or a recovery of this process, counted from 1. What belongs to an earlier one is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RunId(pub u64);

/// An update that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Its name. The same name again after success gives the same record again.
    pub id: UpdateId,
    /// Label of the new weights, if the caller wants a certain one.
    pub version: Option<WeightVersion>,
    /// The label otherwise. Not looked at when only adapters change: the version stays then.
    pub made_up_version: WeightVersion,
    /// Refuse unless this version is the current one.
    pub from_version: Option<WeightVersion>,
    /// Where the weights come from, as in records.
    pub source: String,
    /// The weights of the model change, and not only adapters.
    pub weights: bool,
    /// Adapters to set (to a directory) or to remove (`None`), in the order in which they were named.
    pub adapters: Vec<(String, Option<String>)>,
    /// What happens to running requests.
    pub mode: PauseMode,
    /// How long the pause may take before running requests are aborted.
    pub pause_deadline: Duration,
    /// The version that is replaced is kept nowhere.
    pub forward_only: bool,
    /// How long to wait for another controller of the engines.
    pub patience: Duration,
}

/// A rank, as its task reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Seen {
    /// The current life; 0: nothing was heard of it yet.
    pub incarnation: Incarnation,
    /// Requests of frontends are let through.
    pub admitted: bool,
    pub memory: Memory,
}

/// What engines and nodes say before anything is done to them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Found {
    /// Directory of the checkpoint that the engine was started from, or why its shim does not say.
    pub models: BTreeMap<EngineIndex, Result<String, String>>,
    /// Engines that are paused, or do not say. Asked for adoptions only.
    pub paused: BTreeSet<EngineIndex>,
    /// Versions that engines put on their outputs; not there: it does not say, or its vLLM is too old. Asked for
    /// adoptions only.
    pub stamps: BTreeMap<EngineIndex, WeightVersion>,
    /// A node of these engines cannot find the directory of the committed weights.
    pub missing: bool,
}

/// What staging has brought.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Staging {
    /// The new checkpoint on each node, and the one to go back to; `None`: none, and the caller accepts it.
    pub nodes: BTreeMap<NodeId, (Checkpoint, Option<Checkpoint>)>,
    /// Adapters that are set or removed, with the directories that the update named.
    pub adapters: BTreeMap<String, Option<Adapter>>,
    /// The start-up checkpoint, where only adapters change and nothing was committed before.
    pub startup: Option<Checkpoint>,
    /// Directory of the start-up checkpoint on the leader's node.
    pub model_path: String,
    /// What is said with the record of an update that is committed.
    pub warnings: Vec<String>,
}

/// Engines could not be brought, or left, at the committed weights: they are to be started again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// Engines that live on cannot be taken over as they are.
    #[error("engines cannot be taken over: {reason}")]
    Adopt { reason: String },
    /// An engine could not be brought to the committed weights.
    #[error("rank {rank}: cannot be brought to weight version {version}: {reason}")]
    Restore {
        rank: EngineIndex,
        /// The committed version.
        version: WeightVersion,
        /// Names the worker.
        reason: String,
    },
}

#[derive(Clone, Debug)]
pub enum Event {
    /// An update is asked for. Answered by [`Action::Join`], [`Action::Repeat`] or [`Action::Refuse`], or by
    /// [`Action::Accept`] and, at its end, [`Action::Refuse`] or [`Action::Ended`].
    Asked(Ask),
    /// The operator wants the running update to end without a commit.
    Abort,
    /// These engines have just become ready and are to hold the committed weights before they are admitted; of a
    /// lockstep group all at once. Answered by [`Action::Answer`].
    RestoreAsked {
        /// For the answer.
        ticket: Ticket,
        engines: Engines,
    },
    /// These engines live on from before a restart of the sidecar; of a lockstep group all at once. Answered by
    /// [`Action::Answer`].
    AdoptAsked {
        /// For the answer.
        ticket: Ticket,
        engines: Engines,
    },
    /// A rank is not what it was.
    RankSeen {
        rank: EngineIndex,
        /// What it is now.
        seen: Seen,
    },
    /// What the control task knows has changed.
    ControlSeen {
        /// A pause of the operator or a frontend that holds.
        pause: Option<Pause>,
        /// A frontend has loaded weights since the last update.
        external_weights: bool,
    },
    /// Answer to [`Action::Acquire`].
    Acquired {
        run: RunId,
        /// What holds, or who has the lock.
        result: Result<Grant, String>,
    },
    /// Answer to [`Action::Inspect`].
    Inspected { ticket: Ticket, found: Found },
    /// Answer to [`Action::Forget`].
    Forgotten { ticket: Ticket, result: Result<(), String> },
    /// Answer to [`Action::Restore`].
    Restored {
        ticket: Ticket,
        /// The rank that failed, and why.
        result: Result<(), (EngineIndex, String)>,
    },
    /// Answer to [`Action::TakeOver`].
    TakenOver { ticket: Ticket },
    /// Answer to [`Action::Stage`].
    Staged {
        run: RunId,
        /// What was brought, or the node that failed.
        result: Result<Box<Staging>, (NodeId, String)>,
    },
    /// Answer to [`Action::WriteCommit`].
    CommitWritten {
        run: RunId,
        committed: Box<Committed>,
        /// `Err`: it is certain not to be in force. A reason in `Ok`: it is, but may not survive a crash of the machine.
        result: Result<Option<String>, String>,
    },
    /// Answer to a step of the transaction.
    Reported { run: RunId, event: step::Event },
    /// Answer to [`Action::Conclude`].
    Concluded { run: RunId },
    /// What was to be done was not finished, and it is unknown how far it came: it panicked or was cancelled.
    JobLost {
        /// What was to be done.
        action: Box<Action>,
        error: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// The update that was just asked for is taken, and waits for the lock.
    Accept {
        /// Its number from now on.
        run: RunId,
        /// Label of the new weights.
        version: WeightVersion,
    },
    /// The update that was just asked for is the one that runs.
    Join,
    /// The update that was just asked for had been committed, with this record.
    Repeat(Box<Record>),
    /// An update does not begin. No engine was touched.
    Refuse {
        /// Which; `None`: the one that was just asked for.
        run: Option<RunId>,
        refusal: Refusal,
    },
    /// Take the control lock.
    Acquire {
        run: RunId,
        /// Who it is for, for messages.
        owner: String,
        /// How long to wait for the present holder.
        patience: Duration,
    },
    /// Ask the engines what they are.
    Inspect {
        ticket: Ticket,
        engines: Engines,
        /// They live on: are they paused?
        adopted: bool,
        /// A directory that their nodes should see, with the files that count in it.
        directory: Option<Checkpoint>,
    },
    /// What is committed is for another model: take its record off the disk.
    Forget {
        ticket: Ticket,
        /// For the log.
        why: String,
    },
    /// Bring engines that are not admitted yet to the committed weights.
    Restore { ticket: Ticket, engines: Engines, committed: Box<Committed> },
    /// Engines that live on hold the committed weights: open their gates.
    TakeOver {
        ticket: Ticket,
        engines: Engines,
        /// The control task is to know of this pause.
        inherit: Option<Pause>,
    },
    /// A restore or an adoption has ended.
    Answer { ticket: Ticket, result: Result<(), Failure> },
    /// Open those gates of these ranks that are closed.
    OpenGates {
        engines: Engines,
        /// From 1.
        attempt: u32,
    },
    /// Close the gates of these ranks for new requests. Answered by `AdmissionClosed` or `AdmissionFailed`.
    CloseGates { run: RunId, ranks: BTreeSet<EngineIndex> },
    /// Check and fetch the new weights on these nodes; generation goes on.
    Stage {
        run: RunId,
        /// All that take part.
        nodes: BTreeSet<NodeId>,
        /// What the engines hold: the way back. `None`: the start-up checkpoint.
        committed: Option<Box<Committed>>,
    },
    /// Find what engines of this node must load to hold the committed weights. Answered by `Staged` or
    /// `StageFailed` of the transaction.
    StageCommitted {
        run: RunId,
        node: NodeId,
        /// The committed weights. `None`: the start-up checkpoint.
        committed: Option<Box<Committed>>,
        /// Where that was found for the way back of the update that was open.
        before: Option<Checkpoint>,
    },
    /// Make the commit record durable.
    WriteCommit {
        run: RunId,
        committed: Box<Committed>,
        /// From 1. After the first it is unknown what is on the disk.
        attempt: u32,
    },
    /// Make this durable. Later ones win, in whatever order they are written.
    SaveLedger {
        ledger: Box<Ledger>,
        /// This update is about to touch engines: answered by its `BegunWritten`.
        begun: Option<RunId>,
    },
    /// A step of the transaction; never `Stage`, `WriteBegun`, `CloseAdmission`, `OpenAdmission`, `WriteCommit`,
    /// `Refuse` and `Done`.
    Step {
        run: RunId,
        action: step::Action,
        /// From 1.
        attempt: u32,
    },
    /// The update is over: write down how it ended, open gates, settle the staging areas, release the lock.
    Conclude {
        run: RunId,
        conclusion: Box<Conclusion>,
        /// From 1.
        attempt: u32,
    },
    /// Everything is done; those who wait for its record get it.
    Ended { run: RunId },
}

/// What is left to be done when an update or a recovery has ended.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Conclusion {
    pub record: Record,
    /// The version of the weights after it; unknown if a frontend has loaded or discarded weights, and it did not
    /// change that.
    pub version: WeightVersion,
    /// Engines were taken over; no staging area was used.
    pub recovery: bool,
    /// To be written again, with the record.
    pub committed: Option<Committed>,
    /// To be written.
    pub ledger: Ledger,
    /// Gates to open.
    pub gates: BTreeSet<EngineIndex>,
    /// The engines hold what the sidecar has loaded.
    pub weights_known: bool,
    /// The control task is to know of this pause.
    pub inherit: Option<Pause>,
    /// Digests of the adapters that nodes keep, if that may have changed.
    pub adapters: Option<BTreeSet<String>>,
}
