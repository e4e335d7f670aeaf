//! Events, actions and snapshot of the attachment machine.

use core::net::IpAddr;
use std::fmt;

use bytes::Bytes;
use serde::Serialize;

use crate::handshake::Addresses;
use crate::{EngineIndex, Wave};

/// The engines that the frontend is going to see.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Engines {
    /// `--data-parallel-size`.
    pub size: u16,
    /// The ranks step in lockstep (MoE).
    pub lockstep: bool,
    /// Their `parallel_config_hash`, if engines of this kind have one.
    pub parallel_config_hash: Option<String>,
}

/// Numbers the attempts to attach. What belongs to an earlier attempt is ignored.
pub type Attempt = u64;

#[derive(Clone, Debug)]
pub enum Event {
    /// A predecessor of this machine attached the frontend, and its data paths may be open still. First of all events.
    Adopt {
        /// The engines the frontend sees.
        engines: Engines,
        /// Of its INIT.
        addresses: Addresses,
        /// It was attached. Else it cannot be told how far the handshake got, and the attempt is given up.
        complete: bool,
    },
    /// All ranks have completed their handshake once.
    EnginesComplete(Engines),
    /// These ranks are still missing.
    EnginesMissing(Vec<EngineIndex>),
    /// The slots that are free for API servers, on the rank that has the fewest.
    FreeSlots(u32),
    /// A fresh TCP connection to the handshake address was accepted.
    ProbeOk {
        attempt: Attempt,
        /// Who accepted it.
        peer: IpAddr,
        /// Why the process behind it cannot fit, if that is known without asking it.
        mismatch: Option<String>,
    },
    /// Nobody accepts there.
    ProbeFailed {
        attempt: Attempt,
        /// What the connect said.
        reason: String,
    },
    /// The handshake socket of a rank is connected.
    HandshakeConnected { attempt: Attempt, rank: EngineIndex },
    /// The handshake socket of a rank could not connect, or its connection has closed.
    HandshakeLost { attempt: Attempt, rank: EngineIndex, reason: String },
    /// A message came on the handshake socket of a rank; only INIT is expected.
    Init { attempt: Attempt, rank: EngineIndex, payload: Bytes },
    /// The frontend's DP coordinator broadcast READY to a rank.
    CoordinatorReady { attempt: Attempt, rank: EngineIndex },
    /// The frontend's DP coordinator broadcast START_DP_WAVE to a rank.
    StartWave {
        attempt: Attempt,
        /// Which rank's socket received it (all receive the same).
        rank: EngineIndex,
        /// The wave it names.
        wave: Wave,
    },
    /// A socket to the frontend's DP coordinator could not connect, or its connection has closed.
    CoordinatorLost { attempt: Attempt, rank: EngineIndex, reason: String },
    /// The data path of a rank to an API server is open.
    RouteOpen { attempt: Attempt, rank: EngineIndex, api_server: u32 },
    /// The data path could not be opened, or was lost.
    RouteLost { attempt: Attempt, rank: EngineIndex, api_server: u32, reason: String },
    /// [`Action::Teardown`] is complete: no socket of that attempt is left.
    TornDown { attempt: Attempt },
    /// The frontend is not wanted any more.
    Remove,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Try a plain TCP connection to the handshake address; look at the process behind it if it is
    /// on this host.
    Probe { attempt: Attempt },
    /// Connect a handshake socket with the rank's identity. Must not reconnect by itself.
    ConnectHandshake { attempt: Attempt, rank: EngineIndex },
    /// Send HELLO (remote, headless) for the rank.
    SendHello { attempt: Attempt, rank: EngineIndex },
    /// Connect a subscriber and a push socket of the rank to the frontend's DP coordinator, and
    /// subscribe.
    ConnectCoordinator {
        attempt: Attempt,
        rank: EngineIndex,
        /// INIT's `coordinator_input`.
        input: String,
        /// INIT's `coordinator_output`.
        output: String,
    },
    /// Open the data path of a rank to an API server, with the registration frame first.
    OpenRoute {
        attempt: Attempt,
        rank: EngineIndex,
        api_server: u32,
        /// INIT's `inputs[api_server]`.
        input: String,
        /// INIT's `outputs[api_server]`.
        output: String,
        /// INIT's `frontend_stats_publish_address`, to be put into the ready response.
        stats_address: Option<String>,
    },
    /// Watch over the data path of a rank to an API server, if it is open still; answered as [`Self::OpenRoute`].
    AdoptRoute { attempt: Attempt, rank: EngineIndex, api_server: u32 },
    /// From now on waves and stats of the engines go to this frontend's DP coordinator.
    JoinCoordinator { attempt: Attempt },
    /// Send READY for the rank.
    SendReady {
        attempt: Attempt,
        rank: EngineIndex,
        /// The frontend's own DP coordinator publishes here (part of READY up to 0.19.1).
        stats_address: Option<String>,
    },
    /// The handshake is over: close its sockets.
    CloseHandshake { attempt: Attempt },
    /// A request of this frontend is on its way to a paused group.
    StartWave {
        /// The wave it names.
        wave: Wave,
    },
    /// The frontend is served.
    Attached {
        attempt: Attempt,
        /// How many API servers it has.
        api_servers: u32,
    },
    /// Close everything of this attempt, then report [`Event::TornDown`].
    Teardown {
        attempt: Attempt,
        /// Output addresses of API servers that may still run: they are to be told
        /// ENGINE_CORE_DEAD, because a virtual engine cannot be rejoined.
        told_dead: Vec<String>,
        /// Why, for the log.
        reason: String,
    },
    /// The frontend cannot be attached as it is. Said once per cause.
    Refused {
        /// Who, at which stage, expected and actual.
        error: String,
    },
    /// Removed, and nothing is left.
    Done,
}

/// State names as they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The deployment is not complete, or there is no listener at the address.
    Waiting,
    /// Handshake sockets are connecting.
    Connecting,
    /// HELLO was said, INIT is awaited.
    Handshake,
    /// Data paths and coordinator sockets are being opened.
    Registering,
    /// Served.
    Attached,
    /// The frontend does not fit; see the detail.
    Refused,
    Removed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Plain data about an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What it is doing.
    pub state: State,
    /// Why it is not attached, or a remark.
    pub detail: Option<String>,
    /// API servers of the frontend; 0 until INIT came.
    pub api_servers: u32,
    /// Slots it holds, or is about to take, on each rank.
    pub slots_claimed: u32,
    /// How often it attached.
    pub attachments: u64,
    /// The attempt that is under way.
    pub attempt: Option<Attempt>,
}
