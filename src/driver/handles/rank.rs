//! Handle of a rank task: the data path of one DP rank.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
pub use dp_sidecar_protocol::machine::held_call::{HeldCall, Verdict};
pub use dp_sidecar_protocol::machine::memory::Memory;
use dp_sidecar_protocol::machine::virtual_engine::Limits;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot};
use futures::stream::{self, BoxStream, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::ask::asks;
use super::{Ask, CallResult, Handle, HandleError};

/// Between the deadline of what a command does and the end of the wait for its answer.
const MARGIN: Duration = Duration::from_secs(2);

/// Address pairs of one engine incarnation: position = slot, see [`Slot`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlotAddresses {
    /// `ipc://` address of the input ROUTER of each slot.
    pub inputs: Vec<String>,
    /// `ipc://` address of the output PULL of each slot.
    pub outputs: Vec<String>,
}

asks! {
    /// What a rank task can be asked for.
    RankAsk {
        Prepare -> SlotAddresses, "sockets for an engine", Repeat;
        EngineReady -> (), "engine ready", Life;
        Admit -> (), "admit", Life;
        EngineDown -> (), "engine down", End;
        GiveUp -> (), "engine given up", End;
        Admission -> (), "admission", Repeat;
        Call -> rmpv::Value, "call", Life, |call| call.timeout.saturating_add(MARGIN);
        SetLimits -> (), "bounds", Repeat;
        OpenRoute -> Slot, "route", Once, |route| route.connect_timeout.saturating_add(MARGIN);
        AdoptRoute -> Slot, "adoption of a route", Life;
        CloseRoutes -> (), "closing of routes", End;
        // A forwarded call is answered by the engine; whoever asks has the deadline.
        Release -> rmpv::Value, "release of a control call", Once, |_| Duration::from_secs(24 * 3600);
    }
}

/// Bind fresh sockets for a new incarnation; those of the old one are dropped, and what was in flight there is
/// answered. Asked for the incarnation whose sockets are open already, they stay as they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// The new incarnation.
    pub incarnation: Incarnation,
}

/// What a frontend is told about an engine when it attaches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineFacts {
    /// The registration frame of the engine, as it came.
    pub registration: Bytes,
    /// From READY.
    pub parallel_config_hash: Option<String>,
    /// From READY (0.19.1 and older).
    pub num_gpu_blocks: Option<u64>,
    /// Positions of its version.
    pub layout: Layout,
}

#[cfg(any(test, feature = "test-support"))]
impl EngineFacts {
    /// Of an engine about which nothing but its version is known.
    pub const fn of(layout: Layout) -> Self {
        Self { registration: Bytes::new(), parallel_config_hash: None, num_gpu_blocks: None, layout }
    }
}

/// The engine's handshake is complete: control calls may be sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineReady {
    pub incarnation: Incarnation,
    /// Field positions of its vLLM version, and what frontends are told about it: a link's serving side
    /// keeps it for a restarted sidecar.
    pub facts: Box<EngineFacts>,
}

/// Let the frontends' traffic through (what was held is sent).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Admit {
    pub incarnation: Incarnation,
}

/// The engine is gone: answer what is in flight, hold what comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineDown {
    pub incarnation: Incarnation,
    /// Why, for logs and failure messages.
    pub reason: String,
}

/// There will be no engine until the next [`Prepare`]: answer what is held, and what comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GiveUp {
    pub reason: String,
}

/// Open or close the gate for new requests of frontends. Closed: ADDs are held up to the bound. Answered when it is
/// in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Admission {
    /// Open?
    pub open: bool,
}

/// Call a method of the engine core on the control slot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Names the call, over all links that it crosses. Asked for again under the same key, it is not made again.
    pub key: Uuid,
    /// vLLM's method name.
    pub method: String,
    /// Positional arguments.
    pub args: Vec<rmpv::Value>,
    /// Answer with a deadline error after this long.
    pub timeout: Duration,
}

/// Keep to these bounds from now on: those that this sidecar was started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetLimits {
    pub limits: Limits,
}

/// Open the data path to one API server of a frontend. Its loss is a [`RouteLost`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenRoute {
    /// The attachment that asks.
    pub frontend: FrontendId,
    /// Position of the API server within its frontend (its own client index there).
    pub api_server: u32,
    /// Where to connect the DEALER.
    pub input_address: String,
    /// Where to connect the PUSH.
    pub output_address: String,
    /// First message on the DEALER: the engine's ready response as this frontend must see it.
    pub registration: Bytes,
    /// Give up connecting after this long.
    pub connect_timeout: Duration,
}

/// Tells the slot of a route that a restarted sidecar has found open. Fails if there is no such route (any more).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AdoptRoute {
    pub frontend: FrontendId,
    pub api_server: u32,
}

/// Close all routes of a frontend; its requests in flight are aborted on the engine, and slots are freed when the
/// engine has confirmed that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CloseRoutes {
    pub frontend: FrontendId,
    /// Nobody knows its addresses any more: the rank itself tells its API servers that this engine is dead.
    pub orphaned: bool,
}

/// What to do with a [`HeldCall`]. Answered when the engine has answered a forwarded call (its result also went to
/// the frontend); at once for the other verdicts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Release {
    /// Of the held call.
    pub ticket: u64,
    pub verdict: Verdict,
}

/// A route ended without being closed: its peer has gone, or does not read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RouteLost {
    pub frontend: FrontendId,
    /// On which rank.
    pub rank: EngineIndex,
    pub api_server: u32,
    /// Why, for the log.
    pub reason: String,
}

/// What a rank task reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum RankEvent {
    /// The first registration frame of an incarnation came in on the control slot.
    Registered {
        rank: EngineIndex,
        incarnation: Incarnation,
        /// The frame as it came: empty up to vLLM 0.19.1, else a msgpack map.
        frame: Bytes,
    },
    /// The engine is dead: it said ENGINE_CORE_DEAD, or its connection closed.
    Lost { rank: EngineIndex, incarnation: Incarnation, reason: String },
}

/// Plain data about a rank for status and metrics.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RankSnapshot {
    pub rank: EngineIndex,
    pub incarnation: Incarnation,
    /// Frontends' traffic is let through.
    pub admitted: bool,
    /// The gate for new requests is open.
    pub admission_open: bool,
    /// Requests in flight on the engine, by frontend.
    pub in_flight: BTreeMap<u64, u64>,
    /// Requests held in front of the engine.
    pub held: u64,
    /// Slots for frontends.
    pub slots: Slots,
    /// Bytes that they take.
    pub held_bytes: u64,
    /// Messages of frontends refused since start.
    pub refused: u64,
    /// Why the last of them was.
    pub last_refusal: Option<String>,
    /// What the engine's memory holds. A relay process of an earlier release does not say.
    #[serde(default)]
    pub memory: Memory,
}

/// Slots of an engine for API servers of frontends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// Taken.
    pub occupied: u32,
    /// Given up, and not free before the engine has nothing more for the last owner.
    pub draining: u32,
    /// All there are.
    pub all: u32,
}

/// Handle of a rank task.
#[derive(Clone, Debug)]
pub struct RankHandle {
    pub rank: EngineIndex,
    pub commands: Handle<RankAsk>,
    pub snapshot: watch::Receiver<RankSnapshot>,
}

impl RankHandle {
    /// See [`Handle::ask`].
    #[cfg(any(test, feature = "test-support"))]
    pub async fn ask<A: Ask>(&self, ask: A) -> Result<A::Answer, HandleError>
    where
        RankAsk: From<A>,
    {
        self.ask_within(ask.limit(), ask).await
    }

    /// See [`Handle::ask_within`].
    pub async fn ask_within<A: Ask>(&self, limit: Duration, ask: A) -> Result<A::Answer, HandleError>
    where
        RankAsk: From<A>,
    {
        self.commands.ask_within(limit, ask).await.map_err(|error| match error {
            HandleError::Deadline { what, limit } => {
                HandleError::Deadline { what: format!("{what} of rank {}", self.rank), limit }
            }
            error => error,
        })
    }

    /// Yields the rank whenever it is in another life, admitted, or not admitted any more, when its memory has changed,
    /// and once more when its task has ended.
    pub fn changes(&self) -> BoxStream<'static, EngineIndex> {
        let rank = self.rank;
        let life = |now: &RankSnapshot| (now.incarnation, now.admitted, now.memory);
        let seen = life(&self.snapshot.borrow());
        let changes = stream::unfold(Some((self.snapshot.clone(), seen)), move |watched| async move {
            let (mut snapshot, seen) = watched?;
            let now = snapshot.wait_for(|now| life(now) != seen).await.map(|now| life(&now));
            Some((rank, now.ok().map(|now| (snapshot, now))))
        });
        changes.boxed()
    }

    /// Calls a method of the engine core on the control slot.
    pub async fn call(&self, method: &str, args: Vec<rmpv::Value>, timeout: Duration) -> CallResult {
        let call = Call { key: Uuid::new_v4(), method: method.to_owned(), args, timeout };
        self.ask_within(call.limit(), call).await
    }
}
