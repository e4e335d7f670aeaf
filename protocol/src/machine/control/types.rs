//! What goes in and out of [`super::Control`].

use std::time::Duration;

use rmpv::Value;
use serde::{Deserialize, Serialize};

use crate::machine::held_call::{HeldCall, Verdict};
use crate::{EngineIndex, FrontendId, PausedBy};

/// Names one holder of the lock. Chosen by the driver, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OwnerId(pub u64);

#[derive(Clone, Debug)]
pub enum Event {
    /// A rank holds a control call.
    Held(HeldCall),
    /// A rank's engine has answered a call that was forwarded (its frontend has the answer).
    Answered {
        rank: EngineIndex,
        ticket: u64,
        /// The engine's answer.
        result: Result<Value, String>,
    },
    /// An engine answered to [`Action::Call`].
    CallAnswered {
        rank: EngineIndex,
        /// `operation` of the action.
        operation: u64,
        /// The engine's answer.
        result: Result<Value, String>,
    },
    /// An engine can be called (again). A new engine is not paused.
    EngineUp {
        rank: EngineIndex,
    },
    /// An engine is gone.
    EngineDown {
        rank: EngineIndex,
        reason: String,
    },
    FrontendGone {
        frontend: FrontendId,
    },
    /// The sidecar itself wants to control the engines.
    Acquire {
        owner: OwnerId,
        /// For messages: `update u1`, `operator pause`.
        name: String,
        /// Give up waiting for the present holder after this long.
        patience: Duration,
    },
    /// What the holder is doing, for messages: `loading`.
    Doing {
        owner: OwnerId,
        what: String,
    },
    /// The holder has paused all engines, or resumed them (`None`).
    PausedSet {
        owner: OwnerId,
        /// What holds now.
        paused_by: Option<PausedBy>,
    },
    /// The holder has found the engines paused, as a predecessor of this machine knew them.
    Inherited {
        owner: OwnerId,
        /// Who has paused them.
        paused_by: PausedBy,
        /// They sleep.
        asleep: bool,
    },
    /// The holder knows which weights the engines hold.
    WeightsKnown {
        owner: OwnerId,
    },
    /// The holder is done. A waiting request is withdrawn the same way.
    Release {
        owner: OwnerId,
    },
}

/// How much somebody should care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// An operator did it, or must know of it.
    Info,
    /// Something was not as it should be.
    Warning,
}

/// How the engines are when somebody takes the lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// Who had paused the engines before.
    pub paused_by: Option<PausedBy>,
    /// A frontend has loaded weights; which ones is unknown.
    pub external_weights: bool,
    /// The engines are asleep: their weights are not in place.
    pub asleep: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Tell a rank what to do with a held call. The decisions of a round come together and must be sent
    /// without waiting for one another.
    Decide { rank: EngineIndex, ticket: u64, verdict: Verdict },
    /// Call the engine on the control slot. The calls of an operation come together and must be sent
    /// without waiting for one another.
    Call {
        rank: EngineIndex,
        /// Names the operation.
        operation: u64,
        /// vLLM's method name.
        method: &'static str,
        /// Positional arguments.
        args: Vec<Value>,
    },
    /// The lock is theirs.
    Granted { owner: OwnerId, grant: Grant },
    /// Somebody else held the lock for too long.
    Denied {
        /// Who waited.
        owner: OwnerId,
        /// Who holds it, and what they do.
        holder: String,
    },
    /// Worth a line in the log.
    Note {
        /// How much.
        severity: Severity,
        /// The line.
        text: String,
    },
}

/// Plain data about the machine.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Who controls the engines at the moment, and what they do.
    pub holder: Option<String>,
    /// Who has paused the engines.
    pub paused_by: Option<PausedBy>,
    /// `sleep` was called and the engines are not fully awake again.
    pub asleep: bool,
    /// A frontend has loaded weights or stamped a version: what the sidecar last committed may not be
    /// what the engines hold.
    pub external_weights: bool,
    /// Rounds that wait for ranks or for the lock.
    pub waiting_rounds: usize,
    /// Control calls of frontends refused since start.
    pub refused: u64,
}
