//! What goes into the lifecycle machine and what comes out.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::machine::restart::RestartPolicy;
use crate::{EngineIndex, GroupKind, Incarnation};

/// What the machine needs to know in advance.
#[derive(Clone, Debug)]
pub struct LifecycleConfig {
    /// The ranks of the deployment, whichever node they run on.
    pub ranks: Vec<EngineIndex>,
    /// In lockstep all ranks share one fate.
    pub kind: GroupKind,
    /// True when the sidecar starts the processes (through the keeper); false when somebody else does.
    pub spawn: bool,
    /// From the start of a process until READY; then it counts as failed. Not used for engines that
    /// somebody else starts: they may come at any time.
    pub startup_timeout: Duration,
    /// When to start again after a failure, and when to give up.
    pub restart: RestartPolicy,
}

/// What a node reports about one of its ranks to a sidecar that has just connected to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The newest incarnation that any process of the node knows of.
    pub newest: Incarnation,
    /// The incarnation whose sockets are open and whose engine was not lost.
    pub sockets: Option<Incarnation>,
    /// That engine has completed its handshake, and what it said is kept.
    pub ready: bool,
    /// Frontends' traffic is let through to it.
    pub admitted: bool,
    /// The incarnation of the running process (none where somebody else starts engines).
    pub process: Option<Incarnation>,
    /// The incarnation whose handshake the node's sidecar expects or carries on.
    pub expected: Option<Incarnation>,
    /// How the last process ended, if nobody has heard of that yet.
    pub ended: Option<String>,
}

impl Found {
    /// The incarnation that can go on without being started again.
    pub(super) fn alive(&self, spawn: bool) -> Option<Incarnation> {
        let alive = self.ready && (!spawn || self.process == self.sockets);
        self.sockets.filter(|_| alive)
    }
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Sockets are bound and the handshake expects the engine.
    Prepared { rank: EngineIndex, incarnation: Incarnation },
    /// Sockets could not be bound, or the process could not be started.
    StartFailed { rank: EngineIndex, incarnation: Incarnation, reason: String },
    /// The process was started.
    Spawned { rank: EngineIndex, incarnation: Incarnation },
    /// HELLO came.
    Connected { rank: EngineIndex, incarnation: Incarnation },
    /// The registration frame came, and its version is supported.
    Registered { rank: EngineIndex, incarnation: Incarnation },
    /// READY came.
    HandshakeReady { rank: EngineIndex, incarnation: Incarnation },
    /// The committed weights are in these ranks, verified and stamped: [`Action::Restore`] or
    /// [`Action::Adopt`] is done.
    Restored {
        /// Ranks and the incarnations that were restored.
        ranks: Vec<(EngineIndex, Incarnation)>,
    },
    /// They are not.
    RestoreFailed {
        /// Ranks and incarnations that were tried.
        ranks: Vec<(EngineIndex, Incarnation)>,
        reason: String,
    },
    /// The engine's connection closed or it said ENGINE_CORE_DEAD.
    Lost { rank: EngineIndex, incarnation: Incarnation, reason: String },
    /// The process started for the rank has ended, strays included.
    Exited {
        rank: EngineIndex,
        incarnation: Incarnation,
        /// Exit status and last log lines.
        reason: String,
    },
    /// This engine must not serve (version not supported, rollback failed, rules broken).
    Fence { rank: EngineIndex, reason: String },
    /// The processes of these ranks are gone because their keeper was killed; start over.
    KeeperLost {
        /// The ranks of its node.
        ranks: Vec<EngineIndex>,
    },
    /// The link to a node is lost: what its engines do is not known, and nothing is concluded from that.
    NodeAway {
        /// The ranks of the node.
        ranks: Vec<EngineIndex>,
    },
    /// A node joined again.
    NodeBack {
        /// What it reports about each of its ranks.
        found: BTreeMap<EngineIndex, Found>,
    },
    /// Stop everything.
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Bind sockets and expect the engine.
    Prepare {
        rank: EngineIndex,
        /// Its new incarnation.
        incarnation: Incarnation,
    },
    /// Start the process.
    Spawn { rank: EngineIndex, incarnation: Incarnation },
    /// Stop the process of this incarnation, strays included; answered by [`Event::Exited`].
    StopProcess { rank: EngineIndex, incarnation: Incarnation },
    /// Tell everybody that the engine is gone.
    Down { rank: EngineIndex, incarnation: Incarnation, reason: String },
    /// It is not started again: what waits for it waits in vain.
    GiveUp { rank: EngineIndex, reason: String },
    /// Bring the committed weights into these ranks, together.
    Restore {
        /// Ranks and incarnations.
        ranks: Vec<(EngineIndex, Incarnation)>,
    },
    /// These engines were admitted by the sidecar before this one: make sure that they hold the committed
    /// weights, together, without disturbing them. Answered like [`Action::Restore`].
    Adopt {
        /// Ranks and incarnations.
        ranks: Vec<(EngineIndex, Incarnation)>,
    },
    /// Let the frontends' traffic through. Repeating it changes nothing.
    Admit { rank: EngineIndex, incarnation: Incarnation },
    /// The sidecar cannot do its work and must end.
    Fail {
        /// What happened, naming rank and stage.
        reason: String,
        /// True when a time limit ran out, false when an engine exited or failed.
        timeout: bool,
    },
    /// Everything is stopped.
    Stopped,
}

/// Name of a state, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waiting out a back-off.
    Waiting,
    /// Binding sockets.
    Preparing,
    /// Process started or awaited; handshake not complete.
    Starting,
    /// HELLO answered with INIT; loading the model.
    Connected,
    /// Handshake complete.
    Ready,
    /// Loading the committed weights.
    Restoring,
    /// Admitted by the sidecar before this one, and serving; its weights are being made sure of.
    Adopting,
    /// Admitted.
    Serving,
    /// Being stopped.
    Stopping,
    /// Not started again: the restart budget is spent.
    GivenUp,
    /// Stopped on request.
    Stopped,
}

impl Phase {
    /// An engine may be there, and talk.
    pub(super) const fn is_open(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Connected | Self::Ready | Self::Restoring | Self::Adopting | Self::Serving
        )
    }

    /// A life that has begun, and is not being ended.
    pub(super) const fn is_alive(self) -> bool {
        self.is_open() || matches!(self, Self::Preparing)
    }
}

/// Plain data about one rank.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RankLife {
    pub phase: Phase,
    pub incarnation: Incarnation,
    /// How often it was started again.
    pub restarts: u64,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
}
