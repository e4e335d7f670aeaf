//! What goes into the DP coordinator machine and what comes out.

use crate::layout::Layout;
use crate::stats::Load;
use crate::{EngineIdentity, EngineIndex, FrontendId, Incarnation, Wave};

/// At which step of which wave stats were taken. Ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// `current_wave` of the stats; 0 from independent engines.
    pub wave: Wave,
    /// `step_counter`.
    pub step: u64,
}

/// What an engine told its DP coordinator: a single-frame `EngineCoreOutputs`. Engines set exactly
/// one of the three.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Load, and when it was taken.
    pub stats: Option<(Load, Stamp)>,
    /// The group has finished this wave (rank 0 only).
    pub wave_complete: Option<Wave>,
    /// The engine runs in this wave, and the others should.
    pub start_wave: Option<Wave>,
}

impl Report {
    /// Load only.
    pub fn stats(load: Load, stamp: Stamp) -> Self {
        Self { stats: Some((load, stamp)), ..Self::default() }
    }

    /// End of a wave.
    pub fn wave_complete(wave: Wave) -> Self {
        Self { wave_complete: Some(wave), ..Self::default() }
    }

    pub fn start_wave(wave: Wave) -> Self {
        Self { start_wave: Some(wave), ..Self::default() }
    }
}

/// The engine a START_DP_WAVE is not meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclude {
    /// By number: the engine ignores the message.
    Index(EngineIndex),
    /// By identity, as Python frontends write it in FIRST_REQ and vLLM's coordinator passes it on. An
    /// engine compares it with its number, so it excludes nobody.
    Identity(EngineIdentity),
}

/// An engine that was there before this machine was, and has subscribed to its DP coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopted {
    pub rank: EngineIndex,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// It has had READY: its handshake is complete.
    pub ready: bool,
    /// Frontends' requests are let through to it.
    pub admitted: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The connection to a node was made, or made again after messages may have been lost: this is what stands there.
    /// Reports of its engines may have overtaken it.
    Adopted {
        /// The newest wave that was heard of there.
        wave: Wave,
        /// Its engines. One that is not named is not down because of that.
        engines: Vec<Adopted>,
    },
    /// The version of the engines is known, or has changed.
    Version(Box<Layout>),
    /// An engine has subscribed (again).
    Subscribed {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
    },
    /// An engine has reported.
    Report {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
        report: Report,
    },
    /// A directly connected frontend sends a request to paused engines.
    #[cfg(any(test, feature = "test-support"))]
    FirstRequest {
        /// The engine that gets the request.
        target: Option<Exclude>,
        /// The wave the frontend believes in.
        wave: Wave,
    },
    /// The DP coordinator of an attached frontend broadcast START_DP_WAVE.
    StartWave {
        frontend: FrontendId,
        /// The wave it names.
        wave: Wave,
    },
    /// A request was sent to this engine of a lockstep group.
    Wake { rank: EngineIndex },
    /// Frontends' requests are let through to this rank.
    Admitted { rank: EngineIndex },
    /// This life of the rank is over; with it that of a lockstep group.
    EngineDown {
        rank: EngineIndex,
        /// Which life of it.
        incarnation: Incarnation,
    },
    /// A frontend's DP coordinator wants to hear of the engines.
    FrontendAttached { frontend: FrontendId },
    /// A frontend is gone.
    FrontendDetached { frontend: FrontendId },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Publish READY to these engines.
    SendReady { to: Vec<EngineIndex> },
    /// Publish START_DP_WAVE to all engines.
    SendStartWave {
        /// The wave to run in.
        wave: Wave,
        /// Who is not meant, though it gets the message.
        exclude: Option<Exclude>,
    },
    /// Send the report that is being handled to every attached frontend's DP coordinator, as it came.
    Forward {
        /// Whose report it is.
        rank: EngineIndex,
    },
    /// Say this in the engine's name to a frontend's DP coordinator.
    Tell {
        /// Which frontend; all when `None`.
        frontend: Option<FrontendId>,
        /// In whose name.
        rank: EngineIndex,
        report: Report,
    },
    /// An event was not taken as its sender meant it. For the log.
    Note(Note),
}

/// Why an event was not taken as its sender meant it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// A rank that is not in the group.
    OutOfRange {
        rank: EngineIndex,
        /// Size of the group.
        size: u16,
    },
    /// A message of a life that is over.
    Stale {
        rank: EngineIndex,
        /// The life the message is from.
        incarnation: Incarnation,
    },
    /// READY was withheld because the engine's version dies of a second one.
    SecondReadyWithheld { rank: EngineIndex },
    /// The engines' version has no FIRST_REQ.
    #[cfg(any(test, feature = "test-support"))]
    FirstRequestUnsupported,
    /// Admitted without having been started.
    AdmittedWhileDown { rank: EngineIndex },
}

/// Plain data for status and metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub wave: Wave,
    /// Whether the group runs, as far as engines have reported.
    pub running: bool,
    /// Load by rank, as last reported.
    pub loads: Vec<Load>,
    /// Ranks that have subscribed in their current life.
    pub subscribed: u16,
    /// The engines count waves from the machine's number. Until then a restarted lockstep group must
    /// not be given requests or control calls.
    pub in_step: bool,
}
