//! What goes in and out of [`super::Control`].

use std::collections::BTreeMap;
use std::time::Duration;

use rmpv::Value;
use serde::{Deserialize, Serialize};

use crate::machine::held_call::{HeldCall, Verdict};
use crate::machine::memory::{Memory, Weights};
use crate::machine::policy::{Effect, Wake};
use crate::{EngineIndex, FrontendId, GroupKind, PausedBy};

use super::asleep::{wakes_without_weights, would_go_ahead};

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
        /// What it holds; of a new engine the default.
        memory: Memory,
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
    /// The holder is about to put engines to sleep, or to wake them up.
    Calling {
        owner: OwnerId,
        ranks: Vec<EngineIndex>,
        /// What the call does.
        effect: Effect,
    },
    /// An engine has answered to that.
    Called {
        owner: OwnerId,
        rank: EngineIndex,
        /// As given before.
        effect: Effect,
        result: Result<Value, String>,
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
    /// Of the engines that are up: a part may sleep, and weights may be gone.
    pub memory: BTreeMap<EngineIndex, Memory>,
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

impl Grant {
    /// A part of the memory of some engine sleeps.
    pub fn asleep(&self) -> bool {
        self.memory.values().any(Memory::sleeps)
    }

    /// Engines into which nothing can be loaded.
    pub fn weights_asleep(&self) -> Vec<EngineIndex> {
        let asleep = self.memory.iter().filter(|(_, memory)| memory.weights_sleep);
        asleep.map(|(rank, _)| *rank).collect()
    }

    /// The weights of some engine were discarded, and nothing was loaded since.
    pub fn without_weights(&self) -> bool {
        self.memory.values().any(|memory| memory.weights == Weights::Gone)
    }

    /// Such an engine would be fully awake, and vLLM would resume it.
    pub fn wakes_without_weights(&self, wake: Wake) -> bool {
        wakes_without_weights(&self.memory, wake)
    }

    /// This engine is awake already, and would be resumed before the others.
    pub fn would_go_ahead(&self, rank: EngineIndex, wake: Wake, kind: GroupKind) -> bool {
        would_go_ahead(&self.memory, kind, rank, wake)
    }
}

/// Plain data about the machine.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Who controls the engines at the moment, and what they do.
    pub holder: Option<String>,
    /// Who has paused the engines.
    pub paused_by: Option<PausedBy>,
    /// `sleep` was called and not all engines are fully awake again.
    pub asleep: bool,
    /// The weights of an engine were discarded, and nothing was loaded since.
    #[serde(default)]
    pub without_weights: bool,
    /// A frontend has loaded weights or stamped a version: what the sidecar last committed may not be
    /// what the engines hold.
    pub external_weights: bool,
    /// Rounds that wait for ranks or for the lock.
    pub waiting_rounds: usize,
    /// Control calls of frontends refused since start.
    pub refused: u64,
}
