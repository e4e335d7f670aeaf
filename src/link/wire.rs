//! What travels over a link: frames of `u32` length (big endian) and one msgpack value with named fields.
//!
//! The asking side sends [`Down`], the serving side [`Up`]. Requests are answered in any order. Everything the
//! serving side knows is told by [`Request::State`] after each (re)connection; events that happened while nobody
//! was connected are not repeated, the state says what came of them.

use std::net::SocketAddr;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::driver::handles::{
    EngineFacts, HandshakeEvent, HeldCall, NodeState, ProcessEvent, RankEvent, RankSnapshot, RouteLost,
    SlotAddresses, StageEvent, StageRequest, StageState, Verdict,
};

/// Version of the link. Another one is refused.
pub const LINK_VERSION: u32 = 1;
/// Longest frame, in bytes. Weights do not travel on the link.
pub const MAX_FRAME: usize = 16 << 20;

/// From the asking side.
#[expect(clippy::large_enum_variant, reason = "the large ones are rare, and none is kept")]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Down {
    /// First message of a connection.
    Hello {
        /// [`LINK_VERSION`].
        version: u32,
        /// Names the asking process. The same one after a reconnect may ask again with ids it has used: a request
        /// that still runs, or a call that was answered, is not begun a second time.
        session: Uuid,
    },
    /// Do something; answered by [`Up::Answer`] with the same id.
    Request {
        /// Unique in this session, in the order in which requests are to be handed on.
        id: u64,
        /// What.
        request: Request,
    },
    /// Are you there? Sent when nothing else was for a while.
    Ping,
}

/// From the serving side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Up {
    /// Answer to [`Down::Hello`].
    Hello {
        /// [`LINK_VERSION`].
        version: u32,
    },
    /// Answer to a request.
    Answer {
        /// Of the request.
        id: u64,
        /// What came of it.
        result: Result<Answer, String>,
    },
    /// Something happened.
    Event(Event),
    /// Answer to [`Down::Ping`].
    Pong,
}

/// What can be asked for: the commands of the handles, without their reply channels.
#[expect(clippy::large_enum_variant, reason = "the large ones are rare, and none is kept")]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// [`Answer::State`].
    State,
    /// [`crate::driver::handles::RankCommand::Prepare`]: [`Answer::Addresses`]. Repeating it for the same
    /// incarnation gives the same sockets.
    Prepare {
        /// Which rank.
        rank: EngineIndex,
        /// Its new incarnation.
        incarnation: Incarnation,
    },
    /// `RankCommand::EngineReady`, with what frontends are told about the engine: kept by the serving side, so
    /// that a restarted sidecar finds it in the state.
    EngineReady {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Its facts.
        facts: EngineFacts,
    },
    /// `RankCommand::Admit`.
    Admit {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// `RankCommand::EngineDown`.
    EngineDown {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why.
        reason: String,
    },
    /// `RankCommand::Admission`.
    Admission {
        /// Which rank.
        rank: EngineIndex,
        /// Open?
        open: bool,
    },
    /// `RankCommand::Call`: [`Answer::Value`].
    Call {
        /// Which rank.
        rank: EngineIndex,
        /// Names the call, over all links that it crosses: it is made once.
        key: Uuid,
        /// vLLM's method name.
        method: String,
        /// Positional arguments.
        args: Vec<rmpv::Value>,
        /// Milliseconds.
        timeout_ms: u64,
    },
    /// `RankCommand::OpenRoute`: [`Answer::Slot`]. Its loss comes as [`Event::RouteLost`].
    OpenRoute {
        /// Which rank.
        rank: EngineIndex,
        /// The attachment.
        frontend: FrontendId,
        /// Which of its API servers.
        api_server: u32,
        /// Where to connect the DEALER.
        input_address: String,
        /// Where to connect the PUSH.
        output_address: String,
        /// First message on the DEALER.
        registration: Bytes,
        /// Milliseconds.
        connect_timeout_ms: u64,
    },
    /// `RankCommand::AdoptRoute`: [`Answer::Slot`]. Its loss comes as [`Event::RouteLost`].
    AdoptRoute {
        /// Which rank.
        rank: EngineIndex,
        /// The attachment.
        frontend: FrontendId,
        /// Which of its API servers.
        api_server: u32,
    },
    /// `RankCommand::CloseRoutes`.
    CloseRoutes {
        /// Which rank.
        rank: EngineIndex,
        /// Whose.
        frontend: FrontendId,
    },
    /// `RankCommand::Release`: [`Answer::Value`].
    Release {
        /// Which rank.
        rank: EngineIndex,
        /// Of the held call.
        ticket: u64,
        /// The decision.
        verdict: Verdict,
    },
    /// `EdgeCommand::Prepare`: [`Answer::Coordinator`].
    EdgePrepare {
        /// Which rank.
        rank: EngineIndex,
        /// Its new incarnation.
        incarnation: Incarnation,
    },
    /// `EdgeCommand::Publish`.
    EdgePublish {
        /// To these ranks' engines.
        ranks: Vec<EngineIndex>,
        /// The message.
        frames: Vec<Bytes>,
    },
    /// `EdgeCommand::Note`.
    EdgeNote {
        /// Current wave.
        wave: Wave,
        /// Is it running?
        running: bool,
    },
    /// `EdgeCommand::Close`.
    EdgeClose {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// `HandshakeCommand::Expect`: [`Answer::Address`]. Peer link only.
    Expect {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// The INIT payload.
        init: Bytes,
    },
    /// `HandshakeCommand::Forget`. Peer link only.
    Forget {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// `ProcessCommand::Spawn`: [`Answer::Pid`]. Peer link only.
    Spawn {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Where the engine says HELLO.
        handshake: SocketAddr,
    },
    /// `ProcessCommand::Stop`. Peer link only.
    StopEngine {
        /// Which rank.
        rank: EngineIndex,
    },
    /// `StageCommand`: [`Answer::Stage`]. Peer link only.
    Stage(StageRequest),
    /// Relay link: end everything and exit. Peer link: the deployment stops; the follower stops its engines and
    /// ends.
    Shutdown,
}

impl Request {
    /// What it is, for errors and logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Prepare { .. } => "sockets for an engine",
            Self::EngineReady { .. } => "engine ready",
            Self::Admit { .. } => "admit",
            Self::EngineDown { .. } => "engine down",
            Self::Admission { .. } => "admission",
            Self::Call { .. } => "call",
            Self::OpenRoute { .. } => "route",
            Self::AdoptRoute { .. } => "adoption of a route",
            Self::CloseRoutes { .. } => "closing of routes",
            Self::Release { .. } => "release of a control call",
            Self::EdgePrepare { .. } => "coordinator sockets",
            Self::EdgePublish { .. } => "publication",
            Self::EdgeNote { .. } => "note of the wave",
            Self::EdgeClose { .. } => "closing of coordinator sockets",
            Self::Expect { .. } => "handshake listener",
            Self::Forget { .. } => "end of a handshake",
            Self::Spawn { .. } => "start of an engine",
            Self::StopEngine { .. } => "stop of an engine",
            Self::Stage(_) => "staging",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What came of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to say.
    Done,
    /// Everything there is to know.
    State(Box<NodeState>),
    /// Sockets of the data path.
    Addresses(SlotAddresses),
    /// `coordinator_input` and `coordinator_output` of INIT.
    Coordinator(String, String),
    /// Result of a utility call.
    Value(rmpv::Value),
    /// The slot that was taken.
    Slot(u32),
    /// Where the engine says HELLO.
    Address(SocketAddr),
    /// The process.
    Pid(u32),
    /// State of the staging area.
    Stage(Box<StageState>),
}

/// Something that happened on the serving side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// Of a rank task.
    Rank(RankEvent),
    /// A rank's numbers have changed.
    Snapshot(RankSnapshot),
    /// A control call of a frontend is held.
    Held(HeldCall),
    /// A request went to a lockstep engine.
    Wake(EngineIndex),
    /// A route ended.
    RouteLost(RouteLost),
    /// From the engine-facing sockets of the DP coordinator.
    Edge(crate::driver::handles::EdgeEvent),
    /// Of the handshake task. Peer link only.
    Handshake(HandshakeEvent),
    /// Of the keeper. Peer link only.
    Process(ProcessEvent),
    /// Of the staging area. Peer link only.
    Stage(StageEvent),
}
